// What the library derives from an argument block before a kernel has it, so that kernels do not divide for it.
#pragma once

#include "host/params.h"

namespace broadhead {

inline void derive(AttnParams& params) {
  const int group = params.num_heads_kv > 0 ? params.num_heads_q / params.num_heads_kv : 1;
  params.rows_per_token = params.pack_gqa ? group : 1;
  params.heads_in_grid = params.pack_gqa ? params.num_heads_kv : params.num_heads_q;
  params.heads_per_kv = params.pack_gqa ? 1 : group;
}

inline void derive(AttnBwdParams& params) {
  params.heads_per_kv = params.num_heads_kv > 0 ? params.num_heads_q / params.num_heads_kv : 1;
}

}  // namespace broadhead
