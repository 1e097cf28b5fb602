// Backward, in two passes of one shape and without atomics, so that every run gives the same bits.
//
// With tiles of queries and columns of keys it sums dQ; mirrored, with tiles of keys and columns of
// queries, dK and dV. Both recompute P = exp(S - log_sum) and dS = P · (dP - D), where
// D = Σ dO · O of each query, and (log2(e) · log_sum, D) are the query's statistics.
#pragma once

#include "tile_walk.cuh"

namespace megatron_nuwa {

template <class T, int size, bool mirrored>
class Backward {
 public:
  using Element = T;
  static constexpr int kSize = size;
  static constexpr bool kMirrored = mirrored;
  static constexpr bool kInRegisters = size <= 64;
  static constexpr int kRowTensors = 2;
  static constexpr int kBlocksPerProcessor = size > 64 || (mirrored && size > 32) ? 1 : 2;
  static constexpr int kOutputs = mirrored ? 2 : 1;

  struct Arguments {
    Problem problem;
    const T* rows[2];          // query, grad; mirrored: key, value
    const T* columns[2];       // key, value; mirrored: query, grad
    const float2* statistics;  // (batch, heads, queries)
    T* outputs[kOutputs];      // grad_query; mirrored: grad_key, grad_value
  };

  __device__ Backward(const Arguments& arguments, const int32_t* rows, const Place& place)
      : arguments_(arguments), rows_(rows), place_(place) {
    if constexpr (!mirrored) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = max(rows_[place_.lane / 4 + 8 * half], 0);
        const Problem& problem = arguments_.problem;
        statistics_[half] =
            arguments_.statistics[place_.statistic(problem, problem.row_tokens, token)];
      }
    }
  }

  // `beside` is what the ring holds for each column: is it to be seen; mirrored: its statistics.
  __device__ __forceinline__ void add(Group& columns, uint32_t address, const char* beside) {
    if constexpr (!mirrored)
      if (arguments_.problem.context_mask != nullptr) columns.hide(beside, place_.lane);
    float weights[2][4] = {}, changes[2][4] = {};
    add_products<T, size>(weights, tile[0], address);
    add_products<T, size>(changes, tile[1], address + kNext);
    const float to_log2 = arguments_.problem.scale * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 of_column[2];
      if constexpr (mirrored) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * half + 2 * (place_.lane % 4) + i;
          const int slot = __shfl_sync(kAllLanes, columns.slot, column);
          of_column[i] = reinterpret_cast<const float2*>(beside)[slot];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 statistic = mirrored ? of_column[i % 2] : statistics_[i / 2];
        const float weight = exp2_fast(weights[half][i] * to_log2 - statistic.x);
        weights[half][i] = columns.sees(half, i) ? weight : 0;
        changes[half][i] = weights[half][i] * (changes[half][i] - statistic.y);
      }
    }
    add_weighted<T, size>(sums_[0], changes, address);
    if constexpr (mirrored) add_weighted<T, size>(sums_[1], weights, address + kNext);
  }

  __device__ __forceinline__ void store(char* staging) {
    const Problem& problem = arguments_.problem;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool is_seen = true;
      if constexpr (mirrored) {
        const int token = rows_[place_.lane / 4 + 8 * half];
        is_seen = token >= 0 && (problem.context_mask == nullptr ||
                                 problem.context_mask[static_cast<int64_t>(place_.batch) *
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
    for (int output = 0; output < kOutputs; ++output) {
      store_tile<size>(arguments_.outputs[output], sums_[output], staging, rows_, problem, place_);
      __syncwarp();
    }
  }

  TileFragments<size, kInRegisters> tile[kRowTensors];

 private:
  static constexpr int kNext = Shape<size>::kRing * Shape<size>::kRowBytes;

  const Arguments& arguments_;
  const int32_t* rows_;
  const Place& place_;
  float2 statistics_[2];
  float sums_[kOutputs][size / 8][4] = {};
};

}  // namespace megatron_nuwa
