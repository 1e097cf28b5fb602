// Backward, in two passes of one shape and without atomics, so that every run gives the same bits.
//
// With tiles of queries and columns of keys it sums dQ; mirrored, with tiles of keys and columns of
// queries, dK and dV. Both recompute P = exp(S - log_sum) and dS = P · (dP - D), where
// D = Σ dO · O of each query. (log2(e) · log_sum, D) are the query's statistics: the first pass
// finds them on its way, and leaves them for the mirrored one.
#pragma once

#include "tile_walk.cuh"

namespace megatron_nuwa {

template <class T, int size, bool mirrored>
class Backward {
 public:
  using Element = T;
  static constexpr int kSize = size;
  static constexpr Sums kSums = mirrored ? Sums::kContextGradients : Sums::kQueryGradients;
  static constexpr bool kMirrored = mirrored;
  static constexpr bool kInRegisters = size <= 64;
  static constexpr int kRowTensors = 2, kRowSources = mirrored ? 2 : 3;
  static constexpr int kOutputs = mirrored ? 2 : 1;

  struct Arguments {
    Problem problem;
    const T* rows[kRowSources];  // query, grad, output; mirrored: key, value
    const T* columns[2];         // key, value; mirrored: query, grad
    float2* statistics;          // (batch, heads, queries)
    T* outputs[kOutputs];        // grad_query; mirrored: grad_key, grad_value
    const float* log_sum;        // (batch, heads, queries); not read when mirrored
  };

  __device__ __forceinline__ Backward(const Arguments& arguments, const Place& place,
                                      const TileRows& rows)
      : arguments_(arguments) {
    if constexpr (!mirrored) {
      const Problem& problem = arguments_.problem;
      const float* log_sum = place.statistics(arguments_.log_sum, problem, problem.row_tokens);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        statistics_[half].x = log_sum[max(rows[place.lane / 4 + 8 * half], 0)] * kLog2E;
    }
  }

  // The tile of the forward pass's outputs, of which D alone is kept.
  __device__ __forceinline__ void take(const char* outputs, const Place& place,
                                       const TileRows& rows) {
    const uint32_t offset =
        shared_address(outputs) + swizzled<size>(place.lane % 16, place.lane / 16);
    float sums[2] = {};
#pragma unroll
    for (int step = 0; step < size / 16; ++step) {
      uint32_t grad[4], output[4];
      tile[1].get(grad, step);
      load_matrices(output, at_step(offset, step));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 theirs = unpack<T>(grad[i]), ours = unpack<T>(output[i]);
        sums[i % 2] += theirs.x * ours.x + theirs.y * ours.y;
      }
    }
    const Problem& problem = arguments_.problem;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      statistics_[half].y = sum_of_row(sums[half]);
      const int token = rows[place.lane / 4 + 8 * half];
      if (token >= 0 && place.lane % 4 == 0)
        place.statistics(arguments_.statistics, problem, problem.row_tokens)[token] =
            statistics_[half];
    }
  }

  // `beside` is what the ring holds for each column: is it to be seen; mirrored: its statistics.
  __device__ __forceinline__ void add(const Group& columns, uint32_t ring, const char* beside) {
    uint32_t visible = columns.visible();
    if constexpr (!mirrored)
      if (arguments_.problem.context_mask != nullptr)
        visible = columns.template visible<2 * size>(beside);
#pragma unroll 1  // registers are short for both at once
    for (int half = 0; half < 2; ++half)
      add_half(columns, half, visible >> 8 * half, ring, beside);
  }

  __device__ __forceinline__ void store(const Place& place, const TileRows& rows) {
    const Problem& problem = arguments_.problem;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool is_seen = true;
      if constexpr (mirrored) {
        const int token = rows[place.lane / 4 + 8 * half];
        is_seen = token >= 0 && (problem.context_mask == nullptr ||
                                 problem.context_mask[static_cast<int64_t>(place.batch) *
                                                          problem.row_tokens +
                                                      token]);
      }
#pragma unroll
      for (int n = 0; n < size / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          sums_[0][n][i] = is_seen ? sums_[0][n][i] * problem.scale : 0;
          if constexpr (mirrored) sums_[1][n][i] = is_seen ? sums_[1][n][i] : 0;
        }
    }
#pragma unroll
    for (int output = 0; output < kOutputs; ++output)
      store_tile<size>(arguments_.outputs[output], sums_[output], rows, problem, place);
  }

  TileFragments<size, kInRegisters> tile[kRowTensors];

 private:
  static constexpr int kNext = Memory<Backward>::kTensor;

  // 16 of a group's columns; bit 4 · octet + i of `visible` is of the octet's accumulator i.
  __device__ __forceinline__ void add_half(const Group& columns, int half, uint32_t visible,
                                           uint32_t ring, const char* beside) {
    float weights[2][4] = {}, changes[2][4] = {};
    add_products<T, size>(weights[0], weights[1], tile[0], ring, columns.as_columns(half));
    add_products<T, size>(changes[0], changes[1], tile[1], ring + kNext,
                          columns.as_columns(half));
    const float to_log2 = arguments_.problem.scale * kLog2E;
#pragma unroll
    for (int octet = 0; octet < 2; ++octet) {
      float2 of_column[2];
      if constexpr (mirrored) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 16 * half + 8 * octet + 2 * (columns.lane() % 4) + i;
          of_column[i] = reinterpret_cast<const float2*>(
              beside)[columns.template slot<2 * size>(column)];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 statistic = mirrored ? of_column[i % 2] : statistics_[i / 2];
        const float weight = exp2_fast(fmaf(weights[octet][i], to_log2, -statistic.x));
        weights[octet][i] = visible >> (4 * octet + i) & 1 ? weight : 0;
        changes[octet][i] = weights[octet][i] * (changes[octet][i] - statistic.y);
      }
    }
    Weighted<T, size>(ring, columns.as_rows(half)).add(sums_[0], changes[0], changes[1]);
    if constexpr (mirrored)
      Weighted<T, size>(ring + kNext, columns.as_rows(half)).add(sums_[1], weights[0], weights[1]);
  }

  const Arguments& arguments_;
  float2 statistics_[2];
  float sums_[kOutputs][size / 8][4] = {};
};

}  // namespace megatron_nuwa
