// Checks the tensors of an attention call by the names of its arguments; what packing shares in both directions.
//
// The Python side has validated the call; what is checked here keeps a mistake there from reading foreign memory.
#pragma once

#include "bindings/argument_reader.h"
#include "bindings/attention_call.h"
#include "bindings/packing.h"

namespace broadhead {

class CallChecker : public ArgumentChecker {
 public:
  CallChecker(const char* function, const AttentionCall& call) : ArgumentChecker(function), call_(call) {}

  bool has(Argument argument) const { return call_.tensors[argument].present(); }

  const TensorView& tensor(Argument argument, ElementType type = ElementType::kOther, int ndim = 0) const {
    call_.tensors[argument].check(function_, name_of(argument), type, ndim);
    return call_.tensors[argument];
  }

  const TensorView& required(Argument argument, ElementType type, int ndim = 0) const {
    if (!has(argument)) fail(name_of(argument), "must be a tensor, got None");
    return tensor(argument, type, ndim);
  }

  // An int32 vector with an entry a sequence; see check_lengths.
  void lengths(Argument argument, std::int64_t* batch, int extra = 0) const {
    check_lengths(*this, name_of(argument), tensor(argument, ElementType::kInt32, 1), batch, extra);
  }

  // A tensor of rows and heads on the device of q.
  void rows(const TensorView& rows, const char* name, const TensorView& q) const {
    require((rows.ndim() == 3 || rows.ndim() == 4) && last_dim_contiguous(rows), name,
            "of 3 or 4 dimensions, the last contiguous", rows);
    require(rows.device() == q.device(), name, "on the device of q", rows);
  }

  // Dense q, or packed q with its offsets. Returns the batch.
  std::int64_t queries(const TensorView& q) const {
    std::int64_t batch = q.ndim() == 4 ? q.size(0) : -1;
    lengths(kCuSeqlensQ, &batch, 1);
    if (has(kCuSeqlensQ) != (q.ndim() == 3)) {
      fail("cu_seqlens_q", "must be given exactly when q has 3 dimensions, got q " + q.describe());
    }
    return batch;
  }

  // Packed or dense k without pages.
  void keys(const TensorView& k) const {
    const bool packed = has(kCuSeqlensK);
    require(k.ndim() == (packed ? 3 : 4), "k",
            packed ? "[tokens, heads, head_dim] with cu_seqlens_k"
                   : "[batch, tokens, heads, head_dim] without cu_seqlens_k",
            k);
  }

  // Whether the sinks, if there are any, are fp32.
  bool sinks_are_fp32(ElementType out_dtype, const TensorView& q) const {
    const TensorView& sinks = tensor(kSinks, ElementType::kOther, 1);
    if (!sinks.present()) return false;
    const bool fp32 = sinks.type() == ElementType::kFloat32;
    require((fp32 || sinks.type() == out_dtype) && contiguous(sinks) && sinks.size(0) == q.size(-2), "sinks",
            "one logit for each head of q, fp32 or the dtype of out", sinks);
    return fp32;
  }

  // The masks that the call gives as values, all but their addresses.
  MaskValues mask_values(const TensorView& q, std::int64_t batch) const {
    MaskValues values{};
    const bool packed = q.ndim() == 3;
    const TensorView& ranges = tensor(kQueryRanges, ElementType::kInt32, packed ? 2 : 3);
    if (ranges.present()) {
      require(of_tokens(ranges, q) && ranges.size(-1) == 2 && ranges.stride(-1) == 1, "query_ranges",
              "of the tokens of q and 2, the last dimension contiguous", ranges);
      values.ranges_batch_stride = packed ? 0 : ranges.stride(0);
      values.ranges_row_stride = ranges.size(-2) == 1 ? 0 : ranges.stride(-2);
      require(values.ranges_row_stride >= 0 && values.ranges_row_stride <= INT32_MAX, "query_ranges",
              "with rows less than 2^31 elements apart", ranges);  // gradients multiply it in 32 bits
    }
    const int in_window = PyObject_IsTrue(call_.arguments[kRangesInWindow]);
    if (in_window < 0) throw pybind11::error_already_set();
    values.ranges_in_window = in_window;
    const TensorView& tree = tensor(kTreeMask, ElementType::kInt64, packed ? 1 : 2);
    if (tree.present()) {
      require(of_tokens(tree, q), "tree_mask", "a word for each token of q", tree);
      values.tree_batch_stride = packed ? 0 : tree.stride(0);
      values.tree_row_stride = tree.stride(-1);
    }
    const TensorView& causal = tensor(kCausalBySequence, ElementType::kOther, 1);
    if (causal.present()) {
      values.causal_is_bool = causal.type() == ElementType::kBool;
      require(values.causal_is_bool != 0 || causal.type() == ElementType::kInt32, "causal_by_sequence", "bool or int32",
              causal);
      check_lengths(*this, "causal_by_sequence", causal, &batch);
    }
    return values;
  }

  // Sizes and counts that both argument blocks have.
  template <class Params>
  void sizes(const TensorView& q, const TensorView& k, const TensorView& v, std::int64_t batch, Params& params) const {
    params.batch = static_cast<std::int32_t>(batch);
    params.num_heads_q = static_cast<std::int32_t>(q.size(-2));
    params.num_heads_kv = static_cast<std::int32_t>(k.size(-2));
    require(params.num_heads_kv > 0 && params.num_heads_q % params.num_heads_kv == 0, "k",
            "of a head count that divides that of q", k);
    params.head_dim = static_cast<std::int32_t>(q.size(-1));
    params.head_dim_v = static_cast<std::int32_t>(v.size(-1));
    params.total_q = q.ndim() == 4 ? q.size(0) * q.size(1) : q.size(0);
    // Packed: no sequence is longer than all rows, whatever bound the caller gave.
    if (q.ndim() == 3 && params.total_q < params.seqlen_q) params.seqlen_q = static_cast<std::int32_t>(params.total_q);
  }

 private:
  // Whether a tensor begins with the dimensions that q has before its heads, on the device of q.
  static bool of_tokens(const TensorView& tensor, const TensorView& q) {
    bool same = tensor.device() == q.device();
    for (int dim = 0; dim < q.ndim() - 2; ++dim) same = same && tensor.size(dim) == q.size(dim);
    return same;
  }

  const AttentionCall& call_;
};

}  // namespace broadhead
