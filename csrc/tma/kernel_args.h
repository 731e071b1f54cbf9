// The one argument of a persistent kernel: the call, the division of its work, its tensor maps.
#pragma once

#include "host/params.h"
#include "tma/tensor_maps.h"
#include "tma/work_source.h"

namespace broadhead::tma {

struct KernelArgs {
  AttnParams params;
  WorkPlan plan;
  TensorMaps maps;
};

}  // namespace broadhead::tma
