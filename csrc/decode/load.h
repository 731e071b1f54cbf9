// A warp's copies of K and V: they run ahead of the products, slice by slice, over all items of the CTA.
//
// The load of a page-table entry is PTX: CUTLASS's global_load is under a predicate.
#pragma once

#include "decode/traits.h"
#include "mma_sync/atoms.h"

namespace broadhead::decode {

using namespace mma_sync;

// `x` where the compiler does not know that it is the same as before: what follows from it is not computed early.
template <class T>
BROADHEAD_DEVICE const T& fresh(const T& x) {
  const T* pointer = &x;
  asm volatile("" : "+l"(pointer));
  return *pointer;
}

// Finds the page of a row, by a shift where the page size is a power of two.
struct PageSize {
  int size;   // 0: not paged
  int shift;  // -1: no power of two

  BROADHEAD_DEVICE explicit PageSize(int page_size) : size(page_size), shift(-1) {
    if ((page_size & (page_size - 1)) == 0) shift = 31 - __clz(page_size);
  }
  BROADHEAD_DEVICE int page(int row) const { return shift >= 0 ? row >> shift : row / size; }
};

template <class Traits>
class Loader {
 public:
  using KvElement = typename Traits::KvElement;

  BROADHEAD_DEVICE Loader(const DecodeParams& params, typename Traits::SharedStorage& smem)
      : params_(params),
        smem_(smem),
        page_size_(params.page_size),
        target_(kept(smem_address(smem.ring[warp()]) + slice_offset<Traits>(first_row(), unit()))),
        end_of_ring_(kept(target_ + Traits::kStages * Traits::kStageBytes)),
        k_cols_(kept(params.head_dim - first_col())),
        v_cols_(kept(params.head_dim_v - first_col())) {}

  // Copies the next n_block's slice of K (with qv also that of V) as one cp.async group of every lane. Items up to
  // `found` are in the queue; false when they hold no further n_block. Without qv, issue_v of the same n_block must
  // follow.
  BROADHEAD_DEVICE bool issue_k(int found) {
    if (__builtin_expect(n_block_ >= n_block_end_, 0) && !find_n_block(found)) return false;
    resolve_n_block();
    if constexpr (Traits::kWithQv) {
      copy(v_row_, params_.v_strides.row, v_cols_);
      copy_beside();
    } else {
      copy(k_row_, params_.k_strides.row, k_cols_);
    }
    advance();
    ++ahead_;
    return true;
  }

  BROADHEAD_DEVICE void issue_v() {
    if constexpr (Traits::kWithQv) return;
    copy(v_row_, params_.v_strides.row, v_cols_);
    advance();
  }

  // The missing keys of the stage in which `address` lies: a bit for each key of a slice of K that does not exist.
  // Whoever multiplies the slice clears them.
  BROADHEAD_DEVICE std::uint32_t& missing_beside(std::uint32_t address) const {
    return smem_.missing[(address - smem_address(smem_.ring)) / Traits::kStageBytes];
  }

  // How many n_blocks were issued and not yet multiplied.
  BROADHEAD_DEVICE int ahead() const { return ahead_; }
  BROADHEAD_DEVICE void n_block_done() { --ahead_; }

 private:
  // Eight lanes copy 128 bytes of a row (four lanes, where a row has 64), so a lane issues kSubtiles copies a row.
  static constexpr int kLanesPerRow = Traits::kSubtileBytes / 16;
  static constexpr int kRowsPerCopy = 32 / kLanesPerRow;
  static constexpr int kSubtiles = Traits::kSliceBytes / Traits::kSubtileBytes;
  static constexpr int kUnitElements = 16 / static_cast<int>(sizeof(KvElement));
  static constexpr int kSubtileElements = kLanesPerRow * kUnitElements;
  static constexpr int kRowsBeside = 16;  // rows of K that the lanes copy at a time, two lanes a row

  BROADHEAD_DEVICE static int lane() { return threadIdx.x % 32; }
  BROADHEAD_DEVICE static int warp() { return threadIdx.x / 32; }
  BROADHEAD_DEVICE static int key_group() { return Traits::key_group(warp()); }
  BROADHEAD_DEVICE static int unit() { return lane() % kLanesPerRow; }
  BROADHEAD_DEVICE static int first_row() { return lane() / kLanesPerRow; }
  BROADHEAD_DEVICE static int first_col() { return Traits::col_group(warp()) * Traits::kCols + unit() * kUnitElements; }
  BROADHEAD_DEVICE const CopySource<KvElement>& source() const { return smem_.source[warp()]; }

  BROADHEAD_DEVICE void advance() {
    cute::cp_async_fence();
    target_ += Traits::kStageBytes;
    if (target_ == end_of_ring_) target_ -= Traits::kStages * Traits::kStageBytes;
  }

  // Goes to the next item in the queue that has an n_block for this warp.
  BROADHEAD_DEVICE bool find_n_block(int found) {
    const WorkItem* items = smem_.queue[warp()].items;
    do {
      if (item_ == found) return false;
      const BlockRange range = items[item_ % kQueueItems].range;
      ++item_;
      n_block_ = range.begin + key_group();
      n_block_end_ = range.end;
    } while (n_block_ >= n_block_end_);
    const WorkItem& item = items[(item_ - 1) % kQueueItems];
    __syncwarp();  // all lanes have read the source of the item before
    if (lane() == 0) set_source(item);
    __syncwarp();
    const CopySource<KvElement>& from = source();
    // The n_blocks without a dead key; there is none where the rows of an n_block may lie in several pages.
    const bool even =
        from.table == nullptr || (page_size_.size % Traits::kTileN == 0 && from.leftpad % Traits::kTileN == 0);
    even_begin_ = even ? ceil_div(from.live.interval.begin, Traits::kTileN) : 0;
    even_end_ = even ? from.live.interval.end / Traits::kTileN : 0;
    page_ = load_page();
    return true;
  }

  // One lane does this, step by step: it runs in the midst of the products, when registers are short.
  BROADHEAD_DEVICE void set_source(const WorkItem& item) {
    const DecodeParams& params = params_;
    CopySource<KvElement>& source = smem_.source[warp()];
    const SeqlenInfo& seqlen = item.seqlen;
    // No copy is issued before this ends, so branches around the masks and their divisions pay.
    if (params.sees_all) {
      source.live.prefix_len = 0;
      source.live.interval = {0, seqlen.seqlen_k};
    } else {
      const AttentionMask mask = make_mask(params, seqlen, item.batch);
      source.live.prefix_len = mask.prefix_len;
      if (seqlen.seqlen_q == 1) {
        source.live.interval = mask.row_interval(0);
      } else {
        const RowMap rows{item.m_block * Traits::kTileM, params.rows_per_token, 0};
        const int last = min_int(rows.token(Traits::kTileM - 1), mask.seqlen_q - 1);
        source.live.interval = mask.tile_interval(rows.token(0), last);
      }
    }
    compile_barrier();
    const bool paged = params.page_table != nullptr;
    source.leftpad = static_cast<int>(seqlen.row_k);
    source.table = paged ? params.page_table + seqlen.batch_k * params.page_table_batch_stride : nullptr;
    compile_barrier();
    if (is_shared(params, item.batch)) source.table = params.shared_page_table;
    source.k = static_cast<const KvElement*>(params.k) + first_element(item, params.k_strides);
    compile_barrier();
    source.v = static_cast<const KvElement*>(params.v) + first_element(item, params.v_strides);
  }

  // The offset, in elements, of the head's first key, or of its first page.
  BROADHEAD_DEVICE std::int64_t first_element(const WorkItem& item, const TensorStrides& strides) const {
    const std::int64_t head = kv_head_of(params_, item.head) * strides.head;
    if (params_.page_table != nullptr) return head;
    return head + item.seqlen.batch_k * strides.batch + item.seqlen.row_k * strides.row;
  }

  // Whether some query sees a key of the item that is copied.
  BROADHEAD_DEVICE bool contains(int key) const {
    if (source().live.contains(key)) return true;
    if (!gives_masks(params_)) return false;
    const DecodeParams& params = fresh(params_);  // 32 rows leave no registers for its fields
    const WorkItem& item = smem_.queue[warp()].items[(item_ - 1) % kQueueItems];
    const SequenceMask& mask = params.sequence_masks[item.batch];
    return key >= mask.within.begin && key < mask.within.end && key < item.seqlen.seqlen_k &&
           mask.extents.contains(key);
  }

  BROADHEAD_DEVICE bool is_even() const { return n_block_ >= even_begin_ && n_block_ < even_end_; }

  // The page of `n_block_`, or of its key lane % kTileN where the keys may lie in several pages. Page-table entries of
  // keys that no row sees are never read, since they may be garbage.
  BROADHEAD_DEVICE int load_page() const {
    if (page_size_.size == 0 || n_block_ >= n_block_end_) return 0;
    const CopySource<KvElement>& from = source();
    int key = n_block_ * Traits::kTileN;
    if (!is_even()) {
      key += lane() % Traits::kTileN;
      if (!contains(key)) return 0;
    }
    // This must not be a read-only load: with programmatic launch the kernel before may have written the table.
    int page;
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(page) : "l"(from.table + page_size_.page(from.leftpad + key)));
    return page;
  }

  // Computes where the keys of `n_block_` lie, then goes to the next n_block and loads its page-table entry.
  BROADHEAD_DEVICE void resolve_n_block() {
    const CopySource<KvElement>& from = source();
    const bool even = is_even();
    const int key = n_block_ * Traits::kTileN + (even ? 0 : lane() % Traits::kTileN);
    const bool exists = static_cast<unsigned>(page_) < params_.pages;
    even_ = even && exists;
    if (__builtin_expect(!even_, 0)) {
      const unsigned live = __ballot_sync(0xffffffffu, contains(key));
      alive_ = live & __ballot_sync(0xffffffffu, exists);
      if (live != alive_) {
        missing_beside(target_) = live & ~alive_;
        smem_.some_missing = 1;
      }
      if (!exists) page_ = 0;
    }
    int slot = key;
    if (page_size_.size != 0) {
      slot += from.leftpad;
      slot -= page_size_.page(slot) * page_size_.size;
    }
    k_row_ = from.k + place(params_.k_strides, slot);
    v_row_ = from.v + place(params_.v_strides, slot);
    n_block_ += Traits::kKeyGroups;
    page_ = load_page();
  }

  // The offset of a slot of the page (page 0 when not paged). Neither number is negative for a key that is alive.
  BROADHEAD_DEVICE long long place(const TensorStrides& strides, int slot) const {
    return static_cast<unsigned>(page_) * strides.batch + static_cast<unsigned>(slot) * strides.row;
  }

  // Copies a slice. `row` is the row of the n_block's first key, or of the lane's key.
  BROADHEAD_DEVICE void copy(const KvElement* row, long long row_stride, int cols) const {
    if (__builtin_expect(even_, 1)) {
      row += first_col() + first_row() * row_stride;
      BROADHEAD_UNROLL
      for (int i = 0; i < Traits::kTileN; i += kRowsPerCopy) {
        copy_row(row, i, true, cols);
        row += kRowsPerCopy * row_stride;
      }
    } else {
#pragma unroll 2
      for (int i = 0; i < Traits::kTileN; i += kRowsPerCopy) {
        const bool live = ((alive_ >> (i + first_row())) & 1) != 0;
        const long long address = __shfl_sync(0xffffffffu, reinterpret_cast<long long>(row), i + first_row());
        copy_row(reinterpret_cast<const KvElement*>(address) + first_col(), i, live, cols);
      }
    }
  }

  BROADHEAD_DEVICE void copy_row(const KvElement* row, int i, bool row_live, int cols) const {
    const std::uint32_t target = slice_step<Traits>(target_, i, 0);
    BROADHEAD_UNROLL
    for (int s = 0; s < kSubtiles; ++s) {
      cp_async_16(target + s * (Traits::kTileN * Traits::kSubtileBytes), row + s * kSubtileElements,
                  row_live && s * kSubtileElements < cols);
    }
  }

  // Copies the warp's columns of K into the rows beside a slice of V.
  BROADHEAD_DEVICE void copy_beside() const {
    const int row = lane() / 2;
    const int col = Traits::col_group(warp()) * Traits::kBesideCols + lane() % 2 * kUnitElements;
    // target_ is where the lane's first copy of V goes.
    const std::uint32_t stage = target_ - slice_offset<Traits>(first_row(), unit());
    const bool in_columns = col < params_.head_dim;
    BROADHEAD_UNROLL
    for (int i = 0; i < Traits::kTileN; i += kRowsBeside) {
      const std::uint32_t target = stage + beside_offset<Traits>(row, lane() % 2) + i * Traits::kBesideBytes;
      if (__builtin_expect(even_, 1)) {
        cp_async_16(target, k_row_ + col + (i + row) * params_.k_strides.row, in_columns);
      } else {
        const long long address = __shfl_sync(0xffffffffu, reinterpret_cast<long long>(k_row_), i + row);
        const bool live = ((alive_ >> (i + row)) & 1) != 0;
        cp_async_16(target, reinterpret_cast<const KvElement*>(address) + col, live && in_columns);
      }
    }
  }

  const DecodeParams& params_;
  typename Traits::SharedStorage& smem_;
  PageSize page_size_;
  std::uint32_t target_;       // shared address of the lane's first copy in the stage to fill
  std::uint32_t end_of_ring_;  // the same in the stage behind the last, which does not exist
  int k_cols_;                 // how many columns of K the call has from the lane's first column on
  int v_cols_;                 // likewise of V
  int n_block_ = 0;            // the next n_block of this warp
  int n_block_end_ = 0;        // the end of the item's n_blocks
  int even_begin_ = 0;         // n_blocks whose keys are all alive, at equal distances
  int even_end_ = 0;
  int page_ = 0;  // page-table entry of `n_block_`
  int ahead_ = 0;
  int item_ = 0;  // the next item of the queue
  // The n_block whose slices are being issued. Even: all keys are alive and at equal distances, and the rows below are
  // those of its first key. Else the rows are those of the lane's key, and dead keys become zero.
  bool even_ = true;
  unsigned alive_ = 0;
  const KvElement* k_row_ = nullptr;
  const KvElement* v_row_ = nullptr;
};

}  // namespace broadhead::decode
