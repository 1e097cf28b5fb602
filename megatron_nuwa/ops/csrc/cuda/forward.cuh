// Forward: online softmax over the groups of a tile of queries.
#pragma once

#include "tile_walk.cuh"

namespace megatron_nuwa {

template <class T, int size>
class Forward {
 public:
  using Element = T;
  static constexpr int kSize = size;
  static constexpr bool kMirrored = false;
  static constexpr bool kInRegisters = true;
  static constexpr int kRowTensors = 1;
  static constexpr int kBlocksPerProcessor = size > 64 ? 1 : 2;

  struct Arguments {
    Problem problem;
    const T* rows[1];     // query
    const T* columns[2];  // key, value
    T* output;
    float* log_sum;  // (batch, heads, queries)
  };

  __device__ Forward(const Arguments& arguments, const int32_t* rows, const Place& place)
      : arguments_(arguments), rows_(rows), place_(place) {}

  __device__ __forceinline__ void add(Group& columns, uint32_t address, const char* is_seen) {
    if (arguments_.problem.context_mask != nullptr) columns.hide(is_seen, place_.lane);
    float scores[2][4] = {};
    add_products<T, size>(scores, tile[0], address);
    const float to_log2 = arguments_.problem.scale * kLog2E;
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[half][i] = columns.sees(half, i) ? scores[half][i] * to_log2 : -INFINITY;
        high[i / 2] = fmaxf(high[i / 2], scores[half][i]);
      }
    // A reference that lags behind by a factor of 2^8 is as good; it saves most rescaling.
    const bool is_far = high[0] > reference_[0] + kLag || high[1] > reference_[1] + kLag;
    if (__any_sync(kAllLanes, is_far)) raise_reference(high);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[half][i] = exp2_fast(scores[half][i] - reference_[i / 2]);
        sum_[i / 2] += scores[half][i];
      }
    add_weighted<T, size>(output_, scores, address + Ring<Forward>::kTensorBytes);
  }

  __device__ __forceinline__ void store(char* staging) {
    const Problem& problem = arguments_.problem;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_of_row(sum_[half]);
      const float inverse = sum > 0 ? 1 / sum : 0;
#pragma unroll
      for (int n = 0; n < size / 8; ++n) {
        output_[n][2 * half] *= inverse;
        output_[n][2 * half + 1] *= inverse;
      }
      const int token = rows_[place_.lane / 4 + 8 * half];
      if (token >= 0 && place_.lane % 4 == 0)
        arguments_.log_sum[place_.statistic(problem, problem.row_tokens, token)] =
            sum > 0 ? (reference_[half] + log2f(sum)) * kLn2 : INFINITY;
    }
    store_tile<size>(arguments_.output, output_, staging, rows_, problem, place_);
  }

  TileFragments<size, kInRegisters> tile[kRowTensors];

 private:
  static constexpr float kLag = 8;

  __device__ __forceinline__ void raise_reference(const float (&high)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(reference_[half], max_of_row(high[half]));
      const float factor = exp2_fast(reference_[half] - raised);
      reference_[half] = raised;
      sum_[half] *= factor;
#pragma unroll
      for (int n = 0; n < size / 8; ++n) {
        output_[n][2 * half] *= factor;
        output_[n][2 * half + 1] *= factor;
      }
    }
  }

  const Arguments& arguments_;
  const int32_t* rows_;
  const Place& place_;
  // Of rows lane / 4 and lane / 4 + 8, in units of log2. Finite from the start: -inf - -inf is NaN.
  float reference_[2] = {-FLT_MAX, -FLT_MAX};
  float sum_[2] = {};  // this lane's share
  float output_[size / 8][4] = {};
};

}  // namespace megatron_nuwa
