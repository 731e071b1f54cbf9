// common/tile_scheduler.h: every (query tile, head, sequence) once, sections one after the other, longest tiles first.
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
  return host_test::finish();
}
