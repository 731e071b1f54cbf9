// The workspaces of decode kernels (decode/workspace.h) and of splits (host/split_workspace.h): sizes and addresses.
#include <algorithm>
#include <vector>

#include "check.h"
#include "decode/workspace.h"
#include "host/derived.h"
#include "host/split_workspace.h"

using namespace broadhead;
using decode::plan_workspace;
using decode::WorkspacePlan;

namespace {

constexpr long long kCtaSplits = 12;  // fp32: what a CTA notes of itself

// 3 sequences of 1000 keys, 8 query heads over 2 KV heads, packed.
AttnParams call(int seqlen_q, int num_splits, int cell_tokens) {
  AttnParams params{};
  params.batch = 3;
  params.seqlen_q = seqlen_q;
  params.total_q = 3 * seqlen_q;
  params.seqlen_k = 1000;
  params.num_heads_q = 8;
  params.num_heads_kv = 2;
  params.head_dim = params.head_dim_v = 64;
  params.pack_gqa = 1;
  params.num_splits = num_splits;
  params.cell_blocks = cell_tokens / decode::kSplitUnitTokens;
  derive(params);
  return params;
}

void check_size(AttnParams params, int tile_m, int ctas, long long floats) {
  derive(params);
  const WorkspacePlan plan = plan_workspace(params, tile_m, ctas);
  CHECK(plan.bytes == 4 * floats, "seqlen_q %d, splits %d, cells %d, shared %d: %lld, not %lld bytes", params.seqlen_q,
        params.num_splits, params.cell_blocks, params.shared_seqlen_k, static_cast<long long>(plan.bytes), 4 * floats);
  CHECK((plan.bytes > 0) == (plan.merged > 0), "what is left behind is merged: %lld", plan.merged);
}

void decode_sizes() {
  // What the blocks, or the cells of all tiles, leave behind.
  check_size(call(1, 0, 0), 16, 132, 132 * (kCtaSplits + 2 * 4 * 65));
  check_size(call(1, 7, 0), 16, 132, 132 * (kCtaSplits + 2 * 4 * 65));
  check_size(call(5, 0, 0), 32, 132, 132 * (kCtaSplits + 2 * 20 * 65));  // 20 of the 32 rows of a tile
  check_size(call(1, 0, 0), 16, 100, 100 * (kCtaSplits + 2 * 4 * 65));
  check_size(call(1, 1, 0), 16, 132, 0);
  check_size(call(1, 1, 128), 16, 132, 3 * 2 * 8 * 4 * 65);  // sequences x KV heads x cells of 1000 keys x rows
  check_size(call(5, 1, 128), 32, 132, 3 * 2 * 8 * 20 * 65);
  check_size(call(1, 1, 1024), 16, 132, 0);                              // one cell
  check_size(call(9, 0, 0), 16, 132, 132 * (kCtaSplits + 2 * 16 * 65));  // more rows than a tile has
}

// Without cells nothing follows from the lengths of the keys.
void bounded_sizes() {
  for (const int keys : {64, 4096, 1 << 20, 1 << 30}) {
    AttnParams params = call(4, 0, 0);
    params.seqlen_k = keys;
    check_size(params, 16, 264, 264 * (kCtaSplits + 2 * 16 * 65));
    params = call(4, 1, 4096);
    params.seqlen_k = keys;
    const long long cells = (keys + 4095ll) / 4096;
    check_size(params, 16, 264, cells > 1 ? cells * 3 * 4 * 8 * 65 : 0);
  }
}

// Two slots a block, and one for each tile, over the shared keys too; each has as many rows as the larger kind.
void shared_sizes() {
  struct {
    int batch, tokens, heads_q, heads_kv, head_dim, tile_m;
    long long floats;
  } const cases[] = {
      {2, 1, 8, 1, 64, 16, 2 * 4 + (2 * 132 + 3) * 16 * 65},      // a pair of ints a tile, rounded up to 16 bytes
      {4, 3, 8, 2, 128, 16, 2 * 14 + (2 * 132 + 14) * 16 * 129},  // 4 own tiles and three of the prefix, twice
      {3, 1, 32, 4, 512, 32, 2 * 16 + (2 * 132 + 16) * 24 * 513},
  };
  for (const auto& c : cases) {
    AttnParams params = call(c.tokens, 0, 0);
    params.batch = c.batch;
    params.total_q = c.batch * c.tokens;
    params.num_heads_q = c.heads_q;
    params.num_heads_kv = c.heads_kv;
    params.head_dim = params.head_dim_v = c.head_dim;
    params.shared_seqlen_k = 40;
    check_size(params, c.tile_m, 132, c.floats);
  }
}

// What a plan places lies side by side and within its bytes.
void placed() {
  std::vector<float> memory(1 << 20);
  AttnParams params = call(5, 0, 0);
  params.out_partial = memory.data();
  const WorkspacePlan plan = plan_workspace(params, 32, 7);
  const decode::Workspace at = plan.place(params);
  CHECK(static_cast<void*>(at.ctas) == memory.data() && at.tiles == nullptr, "what blocks say comes first");
  CHECK(reinterpret_cast<char*>(at.out) == reinterpret_cast<char*>(at.ctas + 7), "then out");
  const float* end = at.lse_row(plan.slots - 1, at.slot_rows - 1) + 1;
  decode::DecodeParams line{};
  line.head_dim_v = params.head_dim_v;
  CHECK(at.out_row(line, plan.slots - 1, at.slot_rows - 1) + 64 == at.lse, "then the LSE");
  CHECK(4 * (end - memory.data()) == plan.bytes, "%td bytes of %lld", 4 * (end - memory.data()),
        static_cast<long long>(plan.bytes));
  params.shared_seqlen_k = 40;
  const decode::Workspace shared = plan_workspace(params, 32, 7).place(params);
  CHECK(static_cast<void*>(shared.tiles) == memory.data() && shared.ctas == nullptr, "what tiles say comes first");
}

void splits() {
  std::vector<float> memory(3 * 8 * 6 * 65 + 1);
  for (const int num_splits : {1, 3}) {
    for (const bool counts : {false, true}) {
      AttnParams params = call(2, num_splits, 0);
      const long long rows = num_splits > 1 ? num_splits * 8ll * 6 : 0;
      const std::int64_t bytes = split_workspace_bytes(params, counts);
      CHECK(bytes == 4 * (rows * 65 + counts), "%d splits: %lld bytes", num_splits, static_cast<long long>(bytes));
      CHECK(place_split_workspace(params, counts) == (bytes == 0), "%d splits without a workspace", num_splits);
      params.out_partial = memory.data();
      params.workspace_bytes = bytes - 1;
      CHECK(place_split_workspace(params, counts) == (bytes == 0), "%d splits in one byte less", num_splits);
      params.workspace_bytes = bytes;
      CHECK(place_split_workspace(params, counts), "%d splits", num_splits);
      CHECK(params.lse_partial == (rows > 0 ? memory.data() + rows * 64 : nullptr), "%d splits: LSE", num_splits);
      void* counter = counts ? memory.data() + rows * 65 : nullptr;
      CHECK(static_cast<void*>(params.tile_counter) == counter, "%d splits: counter", num_splits);
    }
  }
}

}  // namespace

int main() {
  decode_sizes();
  bounded_sizes();
  shared_sizes();
  placed();
  splits();
  return host_test::finish();
}
