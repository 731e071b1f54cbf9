// One append of new keys and values to a cache: its tensors, and how they are packed.
#pragma once

#include "bindings/argument_reader.h"
#include "bindings/tensor_view.h"
#include "host/params.h"

namespace broadhead {

// Absent tensors are views that are not present. Shapes: AppendKvParams.
struct AppendTensors {
  const TensorView& k_cache;
  const TensorView& v_cache;
  const TensorView& k_new;
  const TensorView& v_new;
  const TensorView& cache_seqlens;
  const TensorView& seqlens_out;
  const TensorView& q;
  const TensorView& q_out;
  const TensorView& rotary_cos;
  const TensorView& rotary_sin;
  const TensorView& rotary_seqlens;
  const TensorView& cu_seqlens_q;
  const TensorView& cu_seqlens_k_new;
  const TensorView& page_table;
  const TensorView& cache_batch_idx;
  const TensorView& k_descale;
  const TensorView& v_descale;
};

struct AppendFlags {
  bool rotary_interleaved;
  bool causal_or_local;
};

// Checks the tensors and fills in what follows from them but addresses.
AppendKvParams pack_append(const ArgumentChecker& checker, const AppendTensors& tensors, const AppendFlags& flags);

void set_append_addresses(const AppendTensors& tensors, AppendKvParams& params);

}  // namespace broadhead
