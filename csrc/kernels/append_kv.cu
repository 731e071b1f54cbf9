// The append kernel: rotates q and new keys, converts these and writes them to the cache, all in one launch.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "common/seqlen_info.h"
#include "common/vector.h"
#include "host/cuda_check.h"
#include "kernels/append_kv.h"

namespace broadhead {
namespace {

constexpr int kThreads = 128;
constexpr int kMinBlocks = 8;  // 64 registers: enough threads to keep the memory busy
constexpr int kVectorBytes = 16;

enum PartIndex { kNewKeys, kNewValues, kQueries, kParts };

// One tensor that is moved: each thread of the CTAs from first_cta on moves two vectors of one row (token, head).
struct Part {
  const void* source;
  void* target;                    // a cache, or q_out
  const float* descale;            // nullable: 1
  const std::int32_t* cu_seqlens;  // nullable: dense
  TensorStrides source_strides;
  TensorStrides target_strides;
  DescaleStrides descale_strides;
  int first_cta;
  int tokens;  // tokens of the whole batch
  int seqlen;  // tokens of a sequence; when packed, a guess
  int heads;
  int vectors;         // vectors in a row
  int pairs;           // vector_pair
  int rotary_columns;  // rotary_dim; 0: the part is not rotated
};

struct AppendArgs {
  AppendKvParams params;
  Part parts[kParts];
  int lengths_cta;  // the first CTA of those that write seqlens_out
};

BROADHEAD_DEVICE void write_lengths(const AppendKvParams& params, int sequence) {
  if (sequence >= params.batch) return;
  const int added = params.cu_seqlens_k_new != nullptr
                        ? packed_rows(params.cu_seqlens_k_new, sequence, params.total_new).rows
                        : params.seqlen_new;
  // What does not fit is not written.
  const std::int64_t capacity = std::int64_t{params.block_size} * (params.page_table != nullptr ? params.max_pages : 1);
  const std::int64_t length = std::int64_t{params.cache_seqlens[sequence]} + added;
  params.seqlens_out[sequence] = static_cast<int>(length < 0 ? 0 : length < capacity ? length : capacity);
}

// kCount neighbouring cosines or sines as fp32. 16-bit ones are of type Element, but for 8-bit keys of either.
template <class Element, int kCount>
BROADHEAD_DEVICE void load_angles(const AppendKvParams& params, const void* table, std::int64_t offset, float* angles) {
  if constexpr (std::is_same_v<Element, E4m3>) {
    if (params.angles_dtype == DataType::kFloat16) {
      load_angles<__half, kCount>(params, table, offset, angles);
    } else {
      load_angles<__nv_bfloat16, kCount>(params, table, offset, angles);
    }
  } else if (params.angles_dtype == DataType::kFloat32) {
    constexpr int kStep = kCount < 4 ? kCount : 4;
    BROADHEAD_UNROLL
    for (int i = 0; i < kCount; i += kStep) {
      float some[kStep];
      unpack(load_vector<kStep>(static_cast<const float*>(table) + offset + i), some);
      BROADHEAD_UNROLL
      for (int j = 0; j < kStep; ++j) angles[i + j] = some[j];
    }
  } else {
    float all[kCount];
    unpack(load_vector<kCount>(static_cast<const Element*>(table) + offset), all);
    BROADHEAD_UNROLL
    for (int i = 0; i < kCount; ++i) angles[i] = all[i];
  }
}

// The angles of a thread's two vectors: of the first against the second, or half of them within each.
template <int kVec>
struct Angles {
  float cos[kVec];
  float sin[kVec];
};

template <class Element, int kVec>
BROADHEAD_DEVICE Angles<kVec> load_pair_angles(const AppendKvParams& params, const VectorPair& pair,
                                               const bool (&is_rotated)[2], std::int64_t position) {
  position = position < 0 ? 0 : position < params.num_positions ? position : params.num_positions - 1;
  const std::int64_t cos_row = position * params.cos_stride, sin_row = position * params.sin_stride;
  Angles<kVec> angles;
  if (pair.is_rotated) {
    load_angles<Element, kVec>(params, params.rotary_cos, cos_row + pair.first * kVec, angles.cos);
    load_angles<Element, kVec>(params, params.rotary_sin, sin_row + pair.first * kVec, angles.sin);
  } else if constexpr (kVec > 1) {
    constexpr int kHalf = kVec / 2;
    load_angles<Element, kHalf>(params, params.rotary_cos, cos_row + pair.first * kHalf, angles.cos);
    load_angles<Element, kHalf>(params, params.rotary_sin, sin_row + pair.first * kHalf, angles.sin);
    if (is_rotated[1]) {
      load_angles<Element, kHalf>(params, params.rotary_cos, cos_row + pair.second * kHalf, angles.cos + kHalf);
      load_angles<Element, kHalf>(params, params.rotary_sin, sin_row + pair.second * kHalf, angles.sin + kHalf);
    }
  }
  return angles;
}

// Each operation is rounded by itself, as in the torch implementation: a fused multiply-add would differ in a bit.
BROADHEAD_DEVICE void rotate(float& first, float& second, float cos, float sin) {
  const float a = first, b = second;
  first = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
  second = __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos));
}

template <int kVec>
BROADHEAD_DEVICE void rotate_pair(float (&y)[2][kVec], const VectorPair& pair, const bool (&is_rotated)[2],
                                  const Angles<kVec>& angles) {
  if (pair.is_rotated) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kVec; ++i) rotate(y[0][i], y[1][i], angles.cos[i], angles.sin[i]);
  } else if constexpr (kVec > 1) {
    BROADHEAD_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const int vector = i / (kVec / 2), first = 2 * i % kVec;
      if (is_rotated[vector]) rotate(y[vector][first], y[vector][first + 1], angles.cos[i], angles.sin[i]);
    }
  }
}

// Whether a kernel that moves vectors of kVec rotates them. Vectors of 16 numbers leave no registers for their angles.
template <int kVec>
constexpr bool kRotates = kVec <= 8;

// Stores a vector: unchanged (`x`), or as the numbers `y` when they were rotated or the type changes.
template <class To, class From, int kVec>
BROADHEAD_DEVICE void put(To* target, const Vector<From, kVec>& x, const float (&y)[kVec], bool is_rotated,
                          float divisor) {
  if constexpr (std::is_same_v<To, From>) {
    if (!kRotates<kVec> || !is_rotated) return store_vector(target, x);
  }
  // 8-bit keys have been divided by the descale already.
  constexpr bool kDivides = std::is_same_v<To, E4m3> && !std::is_same_v<From, E4m3>;
  float scaled[kVec];
  BROADHEAD_UNROLL
  for (int i = 0; i < kVec; ++i) scaled[i] = kDivides ? __fdiv_rn(y[i], divisor) : y[i];
  store_vector(target, pack<To>(scaled));
}

BROADHEAD_DEVICE std::int64_t row_offset(const Part& part, const TensorStrides& strides, int token, int sequence,
                                         int index, int head) {
  const std::int64_t offset = head * strides.head;
  if (part.cu_seqlens != nullptr) return offset + token * strides.row;
  return offset + sequence * strides.batch + index * strides.row;
}

template <class New, class Cache, int kVec>
__global__ void __launch_bounds__(kThreads, kMinBlocks) append_kv_kernel(const __grid_constant__ AppendArgs args) {
  const AppendKvParams& params = args.params;
  const int cta = static_cast<int>(blockIdx.x);
  if (cta >= args.lengths_cta) {
    write_lengths(params, (cta - args.lengths_cta) * kThreads + static_cast<int>(threadIdx.x));
    return;
  }
  const int part_index = cta < args.parts[kNewValues].first_cta ? kNewKeys
                         : cta < args.parts[kQueries].first_cta ? kNewValues
                                                                : kQueries;
  const Part& part = args.parts[part_index];
  const unsigned thread = (cta - part.first_cta) * kThreads + threadIdx.x;
  const unsigned units = ceil_div(part.vectors, 2);
  const unsigned row = thread / units;
  const int unit = static_cast<int>(thread - row * units);
  const int token = static_cast<int>(row / part.heads);
  const int head = static_cast<int>(row - token * static_cast<unsigned>(part.heads));
  if (token >= part.tokens) return;

  const VectorPair pair = vector_pair(unit, part.vectors, part.pairs);
  int column[2] = {pair.first * kVec, pair.second * kVec};
  if (kVec == 1 && pair.is_rotated && params.rotary_interleaved) {
    column[0] = 2 * unit;
    column[1] = column[0] + 1;
  }

  // The row is loaded before anything is known about where it goes, and so are its angles.
  int sequence = token / part.seqlen;
  int index = token - sequence * part.seqlen;  // the token's index in its sequence
  const New* source =
      static_cast<const New*>(part.source) + row_offset(part, part.source_strides, token, sequence, index, head);
  Vector<New, kVec> x[2] = {};
  x[0] = load_vector<kVec>(source + column[0]);
  if (pair.has_second) x[1] = load_vector<kVec>(source + column[1]);
  if (part.cu_seqlens != nullptr) {
    sequence = find_sequence(part.cu_seqlens, params.batch, token, sequence);
    if (sequence < 0) return;
    index = token - max_int(0, part.cu_seqlens[sequence]);
  }
  const std::int64_t cached = params.cache_seqlens[sequence];
  const bool is_rotated[2] = {column[0] < part.rotary_columns, pair.has_second && column[1] < part.rotary_columns};
  Angles<kVec> angles;
  if constexpr (kRotates<kVec>) {
    if (is_rotated[0]) {
      const std::int64_t start = params.rotary_seqlens != nullptr ? params.rotary_seqlens[sequence] : cached;
      const bool moves = part_index == kNewKeys || params.causal_or_local;
      angles = load_pair_angles<New, kVec>(params, pair, is_rotated, start + (moves ? index : 0));
    }
  }

  std::int64_t offset;
  if (part_index == kQueries) {
    offset = row_offset(part, part.target_strides, token, sequence, index, head);
  } else {
    const CachePlace place = cache_place(params, sequence, cached + index);
    if (!place.exists) return;
    offset = place.block * part.target_strides.batch + place.slot * part.target_strides.row +
             head * part.target_strides.head;
  }

  float y[2][kVec];
  if constexpr (kRotates<kVec>) {
    unpack(x[0], y[0]);
    unpack(x[1], y[1]);
    if (is_rotated[0]) rotate_pair(y, pair, is_rotated, angles);
    if (part_index == kQueries) {
      New* target = static_cast<New*>(part.target) + offset;
      put(target + column[0], x[0], y[0], is_rotated[0], 1.f);
      if (pair.has_second) put(target + column[1], x[1], y[1], is_rotated[1], 1.f);
      return;
    }
  }
  float divisor = 1.f;
  if (part.descale != nullptr) {
    divisor = part.descale[sequence * part.descale_strides.batch + head * part.descale_strides.head];
  }
  Cache* target = static_cast<Cache*>(part.target) + offset;
  put(target + column[0], x[0], y[0], is_rotated[0], divisor);
  if (pair.has_second) put(target + column[1], x[1], y[1], is_rotated[1], divisor);
}

bool is_multiple(const TensorStrides& strides, int count) {
  return strides.batch % count == 0 && strides.row % count == 0 && strides.head % count == 0;
}

bool is_aligned(const void* pointer, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// Whether every row of every tensor can be read and written `count` elements at a time.
bool vectors_fit(const AppendKvParams& params, int count, int new_bytes, int cache_bytes) {
  bool fit = params.head_dim % count == 0 && params.head_dim_v % count == 0;
  for (const void* pointer : {params.k_new, params.v_new, params.q, static_cast<const void*>(params.q_out)}) {
    fit = fit && is_aligned(pointer, count * new_bytes);
  }
  for (const void* pointer : {params.k_cache, params.v_cache}) fit = fit && is_aligned(pointer, count * cache_bytes);
  for (const TensorStrides* strides : {&params.k_cache_strides, &params.v_cache_strides, &params.k_new_strides,
                                       &params.v_new_strides, &params.q_strides, &params.q_out_strides}) {
    fit = fit && is_multiple(*strides, count);
  }
  if (params.rotary_dim == 0) return fit;
  const int pair_columns = params.rotary_interleaved ? params.rotary_dim : params.rotary_dim / 2;
  const int angle_step = kVectorBytes / (params.angles_dtype == DataType::kFloat32 ? 4 : 2);
  return fit && pair_columns % count == 0 && params.cos_stride % angle_step == 0 &&
         params.sin_stride % angle_step == 0 && is_aligned(params.rotary_cos, kVectorBytes) &&
         is_aligned(params.rotary_sin, kVectorBytes);
}

// Fills in what follows from the vectors' size; returns the CTAs of the part.
std::int64_t divide_rows(const AppendKvParams& params, int vec, int columns, Part& part) {
  part.vectors = columns / vec;
  const bool pairs_apart = !params.rotary_interleaved || vec == 1;
  part.pairs = pairs_apart ? part.rotary_columns / 2 / vec : 0;
  const std::int64_t threads = static_cast<std::int64_t>(part.tokens) * part.heads * ceil_div(part.vectors, 2);
  return (threads + kThreads - 1) / kThreads;
}

template <class New, class Cache>
cudaError_t launch(const AppendKvParams& params, cudaStream_t stream) {
  constexpr int kLongest = kVectorBytes / static_cast<int>(sizeof(New));
  constexpr int kRotated = min_int(kLongest, 8);
  int vec = params.rotary_dim > 0 ? kRotated : kLongest;
  if (!vectors_fit(params, vec, sizeof(New), sizeof(Cache))) vec = 1;
  AppendArgs args{};
  args.params = params;
  const int seqlen_new =
      params.cu_seqlens_k_new != nullptr ? params.total_new / max_int(params.batch, 1) : params.seqlen_new;
  const int seqlen_q = params.cu_seqlens_q != nullptr ? params.total_q / max_int(params.batch, 1) : params.seqlen_q;
  Part& k = args.parts[kNewKeys];
  k.source = params.k_new;
  k.target = params.k_cache;
  k.descale = params.k_descale;
  k.cu_seqlens = params.cu_seqlens_k_new;
  k.source_strides = params.k_new_strides;
  k.target_strides = params.k_cache_strides;
  k.descale_strides = params.k_descale_strides;
  k.tokens = params.total_new;
  k.seqlen = max_int(seqlen_new, 1);
  k.heads = params.num_heads_kv;
  k.rotary_columns = params.rotary_dim;
  Part& v = args.parts[kNewValues];
  v = k;
  v.source = params.v_new;
  v.target = params.v_cache;
  v.descale = params.v_descale;
  v.source_strides = params.v_new_strides;
  v.target_strides = params.v_cache_strides;
  v.descale_strides = params.v_descale_strides;
  v.rotary_columns = 0;
  Part& q = args.parts[kQueries];
  q.source = params.q;
  q.target = params.q_out;
  q.cu_seqlens = params.cu_seqlens_q;
  q.source_strides = params.q_strides;
  q.target_strides = params.q_out_strides;
  q.tokens = params.total_q;
  q.seqlen = max_int(seqlen_q, 1);
  q.heads = max_int(params.num_heads_q, 1);
  q.rotary_columns = params.rotary_dim;

  std::int64_t ctas = divide_rows(params, vec, params.head_dim, k);
  const std::int64_t first_v = ctas;
  ctas += divide_rows(params, vec, params.head_dim_v, v);
  const std::int64_t first_q = ctas;
  ctas += divide_rows(params, vec, params.head_dim, q);
  const std::int64_t lengths_cta = ctas;
  ctas += ceil_div(params.batch, kThreads);
  // The index of a thread has 31 bits.
  if (ctas > INT32_MAX / kThreads) return cudaErrorInvalidValue;
  if (ctas == 0) return cudaSuccess;
  v.first_cta = static_cast<int>(first_v);
  q.first_cta = static_cast<int>(first_q);
  args.lengths_cta = static_cast<int>(lengths_cta);
  const auto kernel = vec == 1          ? append_kv_kernel<New, Cache, 1>
                      : vec == kLongest ? append_kv_kernel<New, Cache, kLongest>
                                        : append_kv_kernel<New, Cache, kRotated>;
  kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int launch_append_kv(const AppendKvParams& params, CUstream_st* stream, char* error, std::size_t error_size) {
  cudaError_t status = cudaErrorInvalidValue;
  if (params.dtype == DataType::kBFloat16 && params.cache_dtype == DataType::kBFloat16) {
    status = launch<__nv_bfloat16, __nv_bfloat16>(params, stream);
  } else if (params.dtype == DataType::kFloat16 && params.cache_dtype == DataType::kFloat16) {
    status = launch<__half, __half>(params, stream);
  } else if (params.dtype == DataType::kBFloat16 && params.cache_dtype == DataType::kFloat8E4M3) {
    status = launch<__nv_bfloat16, E4m3>(params, stream);
  } else if (params.dtype == DataType::kFloat16 && params.cache_dtype == DataType::kFloat8E4M3) {
    status = launch<__half, E4m3>(params, stream);
  } else if (params.dtype == DataType::kFloat8E4M3 && params.cache_dtype == DataType::kFloat8E4M3) {
    status = launch<E4m3, E4m3>(params, stream);
  }
  char shape[160];
  std::snprintf(shape, sizeof(shape), "batch %d, new tokens %d, query tokens %d, heads %d and %d, head_dim %d and %d",
                params.batch, params.total_new, params.total_q, params.num_heads_q, params.num_heads_kv,
                params.head_dim, params.head_dim_v);
  return check_cuda(status, "append_kv", "launch", shape, error, error_size);
}

}  // namespace broadhead
