// common/tile_scheduler.h: every (query tile, head, sequence) once, sections one after the other, longest tiles first;
// the size of sections.
#include <set>
#include <tuple>

#include "check.h"
#include "common/tile_scheduler.h"

int main() {
  using broadhead::work_tile;
  for (int m_blocks : {1, 2, 5}) {
    for (int heads : {1, 3, 8}) {
      for (int batch : {1, 2, 7}) {
        for (int per_section : {0, 1, 2, 5, 100}) {
          std::set<std::tuple<int, int, int>> seen;
          const int total = m_blocks * heads * batch;
          int last_section = 0, last_m = m_blocks;
          for (int index = 0; index < total; ++index) {
            const auto tile = work_tile(index, m_blocks, heads, batch, per_section);
            CHECK(tile.m_block >= 0 && tile.m_block < m_blocks && tile.head >= 0 && tile.head < heads &&
                      tile.batch >= 0 && tile.batch < batch,
                  "block %d of %d x %d x %d, sections of %d", index, m_blocks, heads, batch, per_section);
            seen.insert({tile.m_block, tile.head, tile.batch});
            const int section = per_section > 0 ? (tile.batch * heads + tile.head) / per_section : 0;
            CHECK(section >= last_section, "section %d after %d", section, last_section);
            if (section > last_section) last_m = m_blocks;
            CHECK(tile.m_block <= last_m, "tile %d after %d in one section", tile.m_block, last_m);
            last_section = section;
            last_m = tile.m_block;
          }
          CHECK(static_cast<int>(seen.size()) == total, "%d x %d x %d, sections of %d: %zu of %d tiles", m_blocks,
                heads, batch, per_section, seen.size(), total);
        }
      }
    }
  }
  // CTAs that take tiles in turn take each once, and tiles that shrink evenly make the same work for all in two rounds.
  for (int ctas : {1, 2, 5, 132}) {
    for (int rounds : {1, 2, 3, 8}) {
      std::set<int> taken;
      for (int cta = 0; cta < ctas; ++cta) {
        int sum = 0;
        for (int round = 0; round < rounds; ++round) {
          const int tile = broadhead::tile_of_round(round, cta, ctas);
          CHECK(tile >= round * ctas && tile < (round + 1) * ctas, "tile %d in round %d of %d CTAs", tile, round, ctas);
          taken.insert(tile);
          sum += tile;
        }
        CHECK(rounds != 2 || sum == 2 * ctas - 1, "CTA %d of %d: %d", cta, ctas, sum);
      }
      CHECK(static_cast<int>(taken.size()) == ctas * rounds, "%zu tiles of %d CTAs, %d rounds", taken.size(), ctas,
            rounds);
    }
  }
  // In the L2, to fill the device, heads; found. Sections are equal, fill the device where the heads can, and exceed
  // what the L2 holds only for one of these.
  const long long sections[][4] = {{1, 2, 8, 2},  {5, 2, 32, 4},  {11, 2, 64, 8}, {0, 0, 3, 1},  {0, 2, 2, 2},
                                   {3, 1, 13, 1}, {5, 4, 13, 13}, {9, 1, 24, 8},  {99, 1, 6, 6}, {1, 99, 6, 6}};
  for (const auto& [in_l2, fill, heads, expected] : sections) {
    const long long found = broadhead::section_kv_heads(in_l2, fill, heads);
    CHECK(found == expected, "sections of %lld of %lld heads, %lld in the L2, %lld to fill: %lld", expected, heads,
          in_l2, fill, found);
  }
  for (long long heads = 1; heads <= 40; ++heads) {
    for (long long in_l2 = 0; in_l2 <= 41; ++in_l2) {
      for (long long fill = 0; fill <= 41; ++fill) {
        const long long found = broadhead::section_kv_heads(in_l2, fill, heads);
        CHECK(found >= 1 && heads % found == 0 && (found >= fill || found == heads), "%lld heads, %lld, %lld: %lld",
              heads, in_l2, fill, found);
      }
    }
  }
  return host_test::finish();
}
