// The append of new keys to a cache: which sequence owns a row, where it goes, how threads divide a row; the launcher.
#pragma once

#include <cstddef>

#include "common/macros.h"
#include "common/math.h"
#include "host/params.h"

struct CUstream_st;

namespace broadhead {

// Among the sequences that have rows, the one that begins last at or in front of `token`, if it is the token's; else
// -1.
BROADHEAD_HOST_DEVICE int find_disordered_sequence(const std::int32_t* cu_seqlens, int batch, int token) {
  int owner = -1, first = 0;
  for (int b = 0; b < batch; ++b) {
    const int begin = max_int(0, cu_seqlens[b]);
    if (begin < first || begin > token || begin >= cu_seqlens[b + 1]) continue;
    owner = b;
    first = begin;
  }
  return owner >= 0 && token < cu_seqlens[owner + 1] ? owner : -1;
}

// The sequence that owns packed token `token`; -1 for padding. `guess` is tried first: it is right where all sequences
// have the same length.
BROADHEAD_HOST_DEVICE int find_sequence(const std::int32_t* cu_seqlens, int batch, int token, int guess) {
  if (batch == 0) return -1;
  int begin = 0, end = batch;  // the owner is in [begin, end), or there is none
  guess = min_int(guess, batch - 1);
  if (token < cu_seqlens[guess]) {
    end = guess;
  } else if (token < cu_seqlens[guess + 1]) {
    return guess;
  } else {
    begin = guess + 1;
  }
  const int last = end;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (cu_seqlens[middle + 1] <= token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  if (begin < last && cu_seqlens[begin] <= token && token < cu_seqlens[begin + 1]) return begin;
  // Padding, or offsets out of order have led the search astray.
  return find_disordered_sequence(cu_seqlens, batch, token);
}

// A row of the caches; `exists` is false past the cache, past the page table and on pages that the pool does not have.
struct CachePlace {
  std::int64_t block;
  int slot;
  bool exists;
};

BROADHEAD_HOST_DEVICE CachePlace cache_place(const AppendKvParams& params, int sequence, std::int64_t row) {
  const int owner = params.cache_batch_idx != nullptr ? params.cache_batch_idx[sequence] : sequence;
  if (owner < 0 || owner >= params.num_owners || row < 0) return {0, 0, false};
  if (params.page_table == nullptr) return {owner, static_cast<int>(row), row < params.block_size};
  // The sum of two non-negative 32-bit numbers fits 32 bits without a sign.
  const unsigned column = static_cast<unsigned>(row) / static_cast<unsigned>(params.block_size);
  if (column >= static_cast<unsigned>(params.max_pages)) return {0, 0, false};
  const std::int64_t page = params.page_table[owner * params.page_table_batch_stride + column];
  const unsigned slot = static_cast<unsigned>(row) - column * static_cast<unsigned>(params.block_size);
  return {page, static_cast<int>(slot), page >= 0 && page < params.num_blocks};
}

// The two vectors that a thread moves of a row of `vectors`, which takes ceil(vectors / 2) threads. The first 2 *
// `pairs` vectors are rotated in pairs that lie `pairs` apart. The others are paired so that neighbouring threads read
// neighbouring vectors.
struct VectorPair {
  int first;
  int second;
  bool has_second;
  bool is_rotated;
};

BROADHEAD_HOST_DEVICE VectorPair vector_pair(int unit, int vectors, int pairs) {
  if (unit < pairs) return {unit, unit + pairs, true, true};
  const int rest = vectors - 2 * pairs;
  const int first = unit + pairs;
  const int second = first + ceil_div(rest, 2);
  return {first, second, second < vectors, false};
}

// Writes new keys and values to their places, the rotated q to q_out and the new lengths to seqlens_out.
int launch_append_kv(const AppendKvParams& params, CUstream_st* stream, char* error, std::size_t error_size);

}  // namespace broadhead
