// Forward: online softmax over the groups of a tile of queries.
#pragma once

#include "tile_walk.cuh"

namespace megatron_nuwa {

template <class T, int size>
class Forward {
 public:
  using Element = T;
  static constexpr int kSize = size;
  static constexpr Sums kSums = Sums::kOutputs;
  static constexpr bool kMirrored = false;
  static constexpr bool kInRegisters = true;
  static constexpr int kRowTensors = 1, kRowSources = 1;

  struct Arguments {
    Problem problem;
    const T* rows[1];     // query
    const T* columns[2];  // key, value
    T* output;
    float* log_sum;  // (batch, heads, queries)
  };

  __device__ __forceinline__ Forward(const Arguments& arguments, const Place&, const TileRows&)
      : arguments_(arguments),
        // Not 0, which would make NaN of the products that are not to be seen.
        to_log2_(fmaxf(arguments.problem.scale * kLog2E, 1e-30f)) {}

  __device__ __forceinline__ void add(const Group& columns, uint32_t ring, const char* is_seen) {
    const uint32_t visible = arguments_.problem.context_mask == nullptr
                                 ? columns.visible()
                                 : columns.template visible<2 * size>(is_seen);
#pragma unroll 1  // as much at once as there are registers for
    for (int half = 0; half < 2; half += kHalves)
      add_halves(columns, half, visible >> 8 * half, ring);
  }

  __device__ __forceinline__ void store(const Place& place, const TileRows& rows) {
    const Problem& problem = arguments_.problem;
    float* log_sum = place.statistics(arguments_.log_sum, problem, problem.row_tokens);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_of_row(sum_[half]);
      const float inverse = sum > 0 ? inverse_fast(sum) : 0;
#pragma unroll
      for (int n = 0; n < size / 8; ++n) {
        output_[n][2 * half] *= inverse;
        output_[n][2 * half + 1] *= inverse;
      }
      const int token = rows[place.lane / 4 + 8 * half];
      if (token >= 0 && place.lane % 4 == 0)
        log_sum[token] =
            sum > 0 ? (reference_[half] * to_log2_ + log2_fast(sum)) * kLn2 : INFINITY;
    }
    store_tile<size>(arguments_.output, output_, rows, problem, place);
  }

  TileFragments<size, kInRegisters> tile[kRowTensors];

 private:
  static constexpr float kLag = 8;
  static constexpr int kOctets = layout_of(kSums, size, kIsLarge).at_once / 8;
  static constexpr int kHalves = kOctets / 2;

  // The columns of a group from half `first` on; bit 4 · octet + i of `visible` is of the octet's
  // accumulator i.
  __device__ __forceinline__ void add_halves(const Group& columns, int first, uint32_t visible,
                                             uint32_t ring) {
    float products[kOctets][4] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      add_products<T, size>(products[2 * half], products[2 * half + 1], tile[0], ring,
                            columns.as_columns(first + half));
    float weights[kOctets][4];
    if constexpr (kHalves == 1) {
      // Values are on their way while weights are found; for more there are no registers.
      const Weighted<T, size> values(ring + Memory<Forward>::kTensor, columns.as_rows(first));
      find_weights(weights, products, visible);
      values.add(output_, weights[0], weights[1]);
    } else {
      find_weights(weights, products, visible);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        Weighted<T, size>(ring + Memory<Forward>::kTensor, columns.as_rows(first + half))
            .add(output_, weights[2 * half], weights[2 * half + 1]);
    }
  }

  __device__ __forceinline__ void find_weights(float (&weights)[kOctets][4],
                                               float (&products)[kOctets][4], uint32_t visible) {
    float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& product = products[octet][i];
        product = visible >> (4 * octet + i) & 1 ? product : -INFINITY;
        high[i / 2] = fmaxf(high[i / 2], product);
      }
    // A reference that lags behind by a factor of 2^8 is as good; it saves most rescaling. Weights
    // are found without waiting for the answer, and seldom once more.
    weigh(weights, products);
    const bool is_far = (high[0] - reference_[0]) * to_log2_ > kLag ||
                        (high[1] - reference_[1]) * to_log2_ > kLag;
    if (__any_sync(kAllLanes, is_far)) {
      raise_reference(high);
      weigh(weights, products);
    }
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_[i / 2] += weights[octet][i];
  }

  __device__ __forceinline__ void weigh(float (&weights)[kOctets][4],
                                        const float (&products)[kOctets][4]) const {
    const float shift[2] = {-reference_[0] * to_log2_, -reference_[1] * to_log2_};
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[octet][i] = exp2_fast(fmaf(products[octet][i], to_log2_, shift[i / 2]));
  }

  __device__ __forceinline__ void raise_reference(const float (&high)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(reference_[half], max_of_row(high[half]));
      const float factor = exp2_fast((reference_[half] - raised) * to_log2_);
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
  const float to_log2_;
  // The largest product seen, or one not far below, of rows lane / 4 and lane / 4 + 8. Finite from
  // the start, as is its product with to_log2_: -inf - -inf is NaN.
  float reference_[2] = {-1e30f, -1e30f};
  float sum_[2] = {};  // this lane's share
  float output_[size / 8][4] = {};
};

}  // namespace megatron_nuwa
