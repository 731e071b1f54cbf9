// Calls of the backward kernels with their gradients in fp64, for test_backward_kernel.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "emulation/emulator.h"
#include "given_masks.h"
#include "host/derived.h"
#include "kernels/mask_extents.h"
#include "sm80/backward/kernel.h"
#include "sm80/backward/kernel_fused.h"

namespace broadhead {

struct Options {
  int seqlen_q, seqlen_k, heads, head_dim, head_dim_v;
  int window_left = -1, window_right = -1, attention_chunk = 0;
  float softcap = 0.f, scale = 1.f;
  bool prefix = false;
  bool ranges = false, in_window = false;
  bool causal_by_sequence = false;
  bool lse_by_head = false;  // an LSE may be -inf for one head of a query alone: it has no gradient there
};

// Two packed sequences, the second one shorter and with rows behind its end. One KV head.
template <class Element>
class BackwardCall {
 public:
  BackwardCall(const Options& options, std::mt19937& random) : options_(options) {
    const auto below = [&](int end) { return static_cast<int>(random() % (end + 1)); };
    rows_q_ = {0, options.seqlen_q, options.seqlen_q + below(options.seqlen_q)};
    rows_k_ = {0, options.seqlen_k, options.seqlen_k + below(options.seqlen_k)};
    used_q_ = {options.seqlen_q, below(rows_q_[2] - rows_q_[1])};
    used_k_ = {options.seqlen_k, below(rows_k_[2] - rows_k_[1])};
    prefix_ = {below(used_k_[0]), below(used_k_[1])};
    causal_ = {below(1), below(1)};
    give_ranges(random);
    const auto draw = [&](int rows, int heads, int columns) {
      std::normal_distribution<float> normal;
      std::vector<Element> x(static_cast<std::size_t>(rows) * heads * columns);
      for (Element& element : x) element.bits = to_16_bits<Element>(normal(random));
      return x;
    };
    // Eight columns more than a head has: NaN.
    q_ = draw(rows_q_[2], options.heads, options.head_dim + 8);
    k_ = draw(rows_k_[2], 1, options.head_dim + 8);
    v_ = draw(rows_k_[2], 1, options.head_dim_v + 8);
    dout_ = draw(rows_q_[2], options.heads, options.head_dim_v + 8);
    lse_.assign(options.heads * rows_q_[2], NAN);
    delta_ = lse_;
    dq_.assign(rows_q_[2] * options.heads * options.head_dim, 0.);
    dk_.assign(rows_k_[2] * options.head_dim, 0.);
    dv_.assign(rows_k_[2] * options.head_dim_v, 0.);
    seen_q_.assign(rows_q_[2], false);
    seen_k_.assign(rows_k_[2], false);
    for (int sequence = 0; sequence < 2; ++sequence) {
      for (int query = 0; query < used_q_[sequence]; ++query) {
        for (int head = 0; head < options.heads; ++head) differentiate(sequence, query, head);
      }
    }
    poison(q_, seen_q_, options.heads, options.head_dim);
    poison(dout_, seen_q_, options.heads, options.head_dim_v);
    poison(k_, seen_k_, 1, options.head_dim);
    poison(v_, seen_k_, 1, options.head_dim_v);
  }

  // Runs the kernels of a row. Returns what is wrong with the gradients, or nothing.
  template <class Traits>
  std::string run(bool early) const {
    const Options& o = options_;
    std::vector<Element> dq(dq_.size(), kNaN), dk(dk_.size(), kNaN), dv(dv_.size(), kNaN);
    AttnBwdParams params{};
    params.q = q_.data(), params.k = k_.data(), params.v = v_.data(), params.dout = dout_.data();
    params.dq = dq.data(), params.dk = dk.data(), params.dv = dv.data();
    params.softmax_lse = lse_.data();
    params.delta = const_cast<float*>(delta_.data());
    const auto set = [](TensorStrides& strides, int heads, int columns) {
      strides.row = heads * columns;
      strides.head = columns;
    };
    set(params.q_strides, o.heads, o.head_dim + 8), set(params.dq_strides, o.heads, o.head_dim);
    set(params.dout_strides, o.heads, o.head_dim_v + 8);
    set(params.k_strides, 1, o.head_dim + 8), set(params.dk_strides, 1, o.head_dim);
    set(params.v_strides, 1, o.head_dim_v + 8), set(params.dv_strides, 1, o.head_dim_v);
    params.lse_head_stride = params.total_q = rows_q_[2];
    params.total_k = rows_k_[2];
    params.cu_seqlens_q = rows_q_.data(), params.cu_seqlens_k = rows_k_.data();
    params.seqused_q = used_q_.data(), params.seqused_k = used_k_.data();
    if (o.prefix) params.prefix_lens = prefix_.data();
    params.batch = 2, params.num_heads_q = o.heads, params.num_heads_kv = 1;
    params.seqlen_q = o.seqlen_q, params.seqlen_k = o.seqlen_k;
    params.head_dim = o.head_dim, params.head_dim_v = o.head_dim_v;
    params.mask_rule.window_left = o.window_left, params.mask_rule.window_right = o.window_right;
    params.mask_rule.attention_chunk = o.attention_chunk;
    params.softmax_scale = o.scale, params.softcap = o.softcap;
    derive(params);
    std::vector<SequenceMask> masks;
    if (o.causal_by_sequence || o.ranges) {
      if (o.causal_by_sequence) params.mask_values.causal_by_sequence = causal_.data();
      if (o.ranges) params.mask_values.query_ranges = ranges_.data();
      params.mask_values.ranges_row_stride = 2;
      params.mask_values.ranges_in_window = o.in_window;
      for (int sequence = 0; sequence < 2; ++sequence) {
        masks.push_back(make_sequence_mask(params, make_seqlen_info(params, sequence), sequence, query_extents_.data(),
                                           key_extents_.data()));
      }
      params.sequence_masks = masks.data();
    }
    if constexpr (Traits::Keys::kFused) {
      launch_fused<typename Traits::Keys>(params, early);
    } else {
      launch<typename Traits::Keys>(params, o.seqlen_k, 1, early);
      launch<typename Traits::Queries>(params, o.seqlen_q, o.heads, early);
    }
    return compare("dq", dq, dq_, rows_q_, used_q_, o.heads * o.head_dim) +
           compare("dk", dk, dk_, rows_k_, used_k_, o.head_dim) +
           compare("dv", dv, dv_, rows_k_, used_k_, o.head_dim_v);
  }

 private:
  static constexpr Element kNaN{0x7fff};

  int window_right(int sequence) const {
    return options_.causal_by_sequence && causal_[sequence] != 0 ? 0 : options_.window_right;
  }

  // Ranges of both sequences, and of rows that belong to none. Extents that no sequence has are as if they held all.
  void give_ranges(std::mt19937& random) {
    if (!options_.ranges) return;
    query_extents_.assign(rows_q_[2] / 16 + 3, {0, INT32_MAX});
    key_extents_.assign(rows_k_[2] / 32 + 3, {~0u, 0, INT32_MAX});
    for (int sequence = 0; sequence < 2; ++sequence) {
      const int rows = rows_q_[sequence + 1] - rows_q_[sequence];
      host_test::GivenMasks& given = given_[sequence];
      given.ranges = host_test::draw_ranges(rows, used_k_[sequence], random);
      given.in_window = options_.in_window;
      given.find_extents(used_q_[sequence], used_k_[sequence], options_.window_left);
      ranges_.insert(ranges_.end(), given.ranges.begin(), given.ranges.end());
      std::copy(given.query_extents.begin(), given.query_extents.end(),
                query_extents_.begin() + rows_q_[sequence] / 16 + sequence);
      std::copy(given.key_extents.begin(), given.key_extents.end(),
                key_extents_.begin() + rows_k_[sequence] / 32 + sequence);
    }
  }

  bool sees(int sequence, int query, int key) const {
    if (options_.prefix && key < prefix_[sequence]) return true;
    if (given_[sequence].shows(query, key, used_q_[sequence], used_k_[sequence], options_.window_left)) return true;
    const int position = query + used_k_[sequence] - used_q_[sequence];
    const int chunk = options_.attention_chunk;
    if (options_.window_left >= 0 && key < position - options_.window_left) return false;
    if (window_right(sequence) >= 0 && key > position + window_right(sequence)) return false;
    return chunk == 0 || std::floor(static_cast<double>(position) / chunk) == key / chunk;
  }

  static double dot(const Element* a, const Element* b, int columns) {
    double sum = 0;
    for (int i = 0; i < columns; ++i) {
      sum += static_cast<double>(from_16_bits<Element>(a[i].bits)) * from_16_bits<Element>(b[i].bits);
    }
    return sum;
  }

  static void add(double* sum, double factor, const Element* x, int columns) {
    for (int i = 0; i < columns; ++i) sum[i] += factor * from_16_bits<Element>(x[i].bits);
  }

  // LSE and D of a query, and what it adds to the gradients.
  void differentiate(int sequence, int query, int head) {
    const Options& o = options_;
    const int row = rows_q_[sequence] + query, of_head = row * o.heads + head;
    const Element* q = &q_[static_cast<std::size_t>(of_head) * (o.head_dim + 8)];
    const Element* dout = &dout_[static_cast<std::size_t>(of_head) * (o.head_dim_v + 8)];
    std::vector<int> keys;
    std::vector<double> scores, slopes, dp;
    double largest = -INFINITY, sum = 0, delta = 0;
    for (int key = 0; key < used_k_[sequence]; ++key) {
      if (!sees(sequence, query, key)) continue;
      const std::size_t of_key = rows_k_[sequence] + key;
      double score = o.scale * dot(q, &k_[of_key * (o.head_dim + 8)], o.head_dim), slope = 1;
      if (o.softcap > 0) {
        const double t = std::tanh(score / o.softcap);
        score = o.softcap * t;
        slope = 1 - t * t;
      }
      keys.push_back(static_cast<int>(of_key));
      scores.push_back(score), slopes.push_back(slope);
      dp.push_back(dot(dout, &v_[of_key * (o.head_dim_v + 8)], o.head_dim_v));
      largest = std::max(largest, score);
      seen_q_[row] = seen_k_[of_key] = true;
    }
    for (const double score : scores) sum += std::exp(score - largest);
    const bool given_none = o.lse_by_head && head == query % (2 * o.heads);
    const double lse = keys.empty() || given_none ? -INFINITY : largest + std::log(sum);
    if (given_none) keys.clear();
    for (std::size_t i = 0; i < keys.size(); ++i) delta += std::exp(scores[i] - lse) * dp[i];
    delta += 0.125;  // as the gradient of an LSE does
    lse_[head * rows_q_[2] + row] = static_cast<float>(lse);
    delta_[head * rows_q_[2] + row] = static_cast<float>(delta);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double p = std::exp(scores[i] - lse), ds = p * (dp[i] - delta) * slopes[i] * o.scale;
      add(&dq_[of_head * o.head_dim], ds, &k_[static_cast<std::size_t>(keys[i]) * (o.head_dim + 8)], o.head_dim);
      add(&dk_[keys[i] * o.head_dim], ds, q, o.head_dim);
      add(&dv_[keys[i] * o.head_dim_v], p, dout, o.head_dim_v);
    }
  }

  // NaN in rows that no pair needs, and behind the columns of a head.
  static void poison(std::vector<Element>& x, const std::vector<bool>& seen, int heads, int columns) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t row = i / (heads * (columns + 8)), column = i % (columns + 8);
      if (!seen[row] || column >= static_cast<std::size_t>(columns)) x[i] = kNaN;
    }
  }

  template <class Side>
  static void launch(const AttnBwdParams& params, int rows, int heads, bool early) {
    const int tiles = ceil_div(rows, Side::kRows);
    for (int block = 0; block < tiles * heads * params.batch; ++block) {
      emulation::run(Side::kThreads, {block, 0, 0}, early, [&] { sm80::backward_kernel<Side>(params, tiles); });
    }
  }

  // Behind the sums of dQ there are numbers that nothing may change.
  template <class Keys>
  static void launch_fused(const AttnBwdParams& params, bool early) {
    using DqSums = typename Keys::DqSums;
    const std::size_t count = params.num_heads_q * dq_tiles(params, DqSums::kRows) * DqSums::kRows * DqSums::kColumns;
    std::vector<float> sums(count, 0.f);
    sums.resize(count + 1024, 1.f);
    const int tiles = ceil_div(params.seqlen_k, Keys::kRows);
    for (int block = 0; block < tiles * params.num_heads_kv * params.batch; ++block) {
      emulation::run(Keys::kThreads, {block, 0, 0}, early,
                     [&] { sm80::fused_kernel<Keys>(params, tiles, sums.data()); });
    }
    for (std::size_t i = count; i < sums.size(); ++i) {
      if (sums[i] != 1.f) emulation::fail("something is added behind the sums of dQ");
    }
    for (int head = 0; head < params.num_heads_q; ++head) {
      for (int batch = 0; batch < params.batch; ++batch) {
        for (int block = 0; block < ceil_div(params.seqlen_q, kFinishRows); ++block) {
          emulation::run(kFinishThreads, {block, head, batch}, early,
                         [&] { finish_dq<Element, DqSums>(params, sums.data()); });
        }
      }
    }
  }

  static std::string compare(const char* name, const std::vector<Element>& found, const std::vector<double>& expected,
                             const std::vector<int>& rows, const std::vector<int>& used, int columns) {
    for (int sequence = 0; sequence < 2; ++sequence) {
      for (int row = rows[sequence]; row < rows[sequence + 1]; ++row) {
        const bool exists = row - rows[sequence] < used[sequence];
        double norm = 0, error = 0;
        for (int i = row * columns; i < (row + 1) * columns; ++i) {
          if (!exists && found[i].bits != kNaN.bits) return std::string(name) + " has a row behind the end; ";
          const double x = from_16_bits<Element>(found[i].bits) - expected[i];
          norm += expected[i] * expected[i];
          error += x * x;
        }
        if (exists && !(std::sqrt(error) < 0.02 * (std::sqrt(norm) + 0.3))) {
          return std::string(name) + " is wrong in row " + std::to_string(row) + "; ";
        }
      }
    }
    return "";
  }

  Options options_;
  std::vector<int> rows_q_, rows_k_, used_q_, used_k_, prefix_, causal_;
  host_test::GivenMasks given_[2];
  std::vector<std::int32_t> ranges_;
  std::vector<KeyInterval> query_extents_;
  std::vector<KeyExtent> key_extents_;
  std::vector<Element> q_, k_, v_, dout_;
  std::vector<float> lse_, delta_;
  std::vector<double> dq_, dk_, dv_;
  std::vector<bool> seen_q_, seen_k_;
};

}  // namespace broadhead
