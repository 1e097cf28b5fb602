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
  static constexpr int kRowTensors = 2;
  static constexpr int kOutputs = mirrored ? 2 : 1;

  struct Arguments {
    Problem problem;
    const T* rows[2];          // query, grad; mirrored: key, value
    const T* columns[2];       // key, value; mirrored: query, grad
    float2* statistics;  // (batch, heads, queries)
    T* outputs[kOutputs];  // grad_query; mirrored: grad_key, grad_value
    const T* output;       // of the forward pass; not read when mirrored
    const float* log_sum;  // (batch, heads, queries); not read when mirrored
  };

  __device__ Backward(const Arguments& arguments, const TileRows& rows, const Place& place)
      : arguments_(arguments), rows_(rows), place_(place) {
    if constexpr (!mirrored) {
      const Problem& problem = arguments_.problem;
      // What a lane holds of a fragment: columns 2t, 2t + 1, 2t + 8, 2t + 9 of rows g and g + 8.
      const Rows output(arguments_.output, problem.row_tokens, 2 * size, problem, place_,
                        4 * (place_.lane % 4));
      const float* log_sum = place_.statistics(arguments_.log_sum, problem, problem.row_tokens);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = rows_[place_.lane / 4 + 8 * half];
        const char* row = output[max(token, 0)];
        statistics_[half].x = log_sum[max(token, 0)] * kLog2E;
#pragma unroll
        for (int step = 0; step < size / 16; ++step)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            outputs_[step][half + 2 * i] =
                *reinterpret_cast<const uint32_t*>(row + 32 * step + 16 * i);
      }
    }
  }

  // With the tile's rows in place.
  __device__ __forceinline__ void start() {
    if constexpr (!mirrored) {
      float sums[2] = {};
#pragma unroll
      for (int step = 0; step < size / 16; ++step) {
        uint32_t grad[4];
        tile[1].get(grad, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 theirs = unpack<T>(grad[i]), ours = unpack<T>(outputs_[step][i]);
          sums[i % 2] += theirs.x * ours.x + theirs.y * ours.y;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        statistics_[half].y = sum_of_row(sums[half]);
        const int token = rows_[place_.lane / 4 + 8 * half];
        if (token >= 0 && place_.lane % 4 == 0)
          place_.statistics(arguments_.statistics, arguments_.problem,
                            arguments_.problem.row_tokens)[token] = statistics_[half];
      }
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

  __device__ __forceinline__ void store(char* staging, const TileTokens<size>& tokens) {
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
      store_tile<size>(arguments_.outputs[output], sums_[output], staging, tokens, problem, place_);
      __syncwarp();
    }
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
          const int column = 16 * half + 8 * octet + 2 * (place_.lane % 4) + i;
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
    add_weighted<T, size>(sums_[0], changes[0], changes[1], ring, columns.as_rows(half));
    if constexpr (mirrored)
      add_weighted<T, size>(sums_[1], weights[0], weights[1], ring + kNext, columns.as_rows(half));
  }

  const Arguments& arguments_;
  const TileRows rows_;
  const Place& place_;
  float2 statistics_[2];
  uint32_t outputs_[size / 16][4];  // of the forward pass, as fragments; read by start() alone
  float sums_[kOutputs][size / 8][4] = {};
};

}  // namespace megatron_nuwa
