// The one argument of a persistent kernel: the call, the division of its work, its tensor maps.
#pragma once

#include "common/plain_call.h"
#include "host/params.h"
#include "tma/tensor_maps.h"
#include "tma/work_source.h"

namespace broadhead::tma {

struct KernelArgs {
  AttnParams params;
  WorkPlan plan;
  TensorMaps maps;
};

template <class Traits>
BROADHEAD_DEVICE void assume_call(const KernelArgs& args) {
  assume_call<Traits>(args.params);
  if constexpr (!Traits::kPages) BROADHEAD_ASSUME(args.maps.gather == 0);
}

}  // namespace broadhead::tma
