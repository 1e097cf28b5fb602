// fp32 without matrix units: one warp a row, `size / 8` of its lanes a column, eight numbers a
// lane. Each set of lanes walks every few columns of the row's list; the sets are merged at the end
// in a fixed order.
#pragma once

#include "primitives.cuh"

namespace megatron_nuwa {

constexpr int kDirectWarps = 8;

// RowTables of warp_tables.py.
struct RowTables {
  const int64_t* starts;
  const int32_t* columns;
};

template <int size>
struct DirectPlace {
  static constexpr int kLanes = size / 8;
  static constexpr int kSets = 32 / kLanes;

  int row, head, batch, set, first;
  bool is_inside;

  __device__ DirectPlace(int row_tokens, int heads, int64_t rows) {
    const int64_t number = static_cast<int64_t>(blockIdx.x) * kDirectWarps + threadIdx.x / 32;
    is_inside = number < rows;
    row = number % row_tokens;
    head = number / row_tokens % heads;
    batch = number / row_tokens / heads;
    set = threadIdx.x % 32 / kLanes;
    first = threadIdx.x % kLanes * 8;
  }
};

__device__ __forceinline__ void load_eight(float (&values)[8], const float* source) {
  const float4 low = reinterpret_cast<const float4*>(source)[0];
  const float4 high = reinterpret_cast<const float4*>(source)[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ __forceinline__ void store_eight(float* target, const float (&values)[8]) {
  reinterpret_cast<float4*>(target)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(target)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

// The product of two rows, known to each of the `lanes` lanes that share them.
template <int lanes>
__device__ __forceinline__ float product(const float (&a)[8], const float (&b)[8]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

struct DirectProblem {
  int32_t heads;
  int32_t row_tokens;
  int32_t column_tokens;
  int64_t rows;  // batch · heads · row_tokens
  float scale;
  const bool* context_mask;  // (batch, context tokens), or null

  __device__ __forceinline__ int64_t offset(int batch, int tokens, int token, int head,
                                            int size) const {
    return ((static_cast<int64_t>(batch) * tokens + token) * heads + head) * size;
  }
  __device__ __forceinline__ int64_t statistic(int batch, int tokens, int token, int head) const {
    return (static_cast<int64_t>(batch) * heads + head) * tokens + token;
  }
  __device__ __forceinline__ bool shows(int batch, int tokens, int token) const {
    return context_mask == nullptr || context_mask[static_cast<int64_t>(batch) * tokens + token];
  }
};

struct DirectForward {
  DirectProblem problem;
  const float *query, *key, *value;
  float *output, *log_sum;
};

template <int size>
__global__ void __launch_bounds__(32 * kDirectWarps, 2)
    direct_forward(const __grid_constant__ DirectForward arguments,
                   const __grid_constant__ RowTables tables) {
  const DirectProblem& problem = arguments.problem;
  using Here = DirectPlace<size>;
  const Here place(problem.row_tokens, problem.heads, problem.rows);
  if (!place.is_inside) return;
  const int64_t own =
      problem.offset(place.batch, problem.row_tokens, place.row, place.head, size) + place.first;
  float query[8], output[8] = {}, reference = -FLT_MAX, sum = 0;
  load_eight(query, arguments.query + own);
  const int64_t end = tables.starts[place.row + 1];
  for (int64_t base = tables.starts[place.row]; base < end; base += Here::kSets) {
    const int column = tables.columns[min(base + place.set, end - 1)];
    const bool is_seen = base + place.set < end &&
                         problem.shows(place.batch, problem.column_tokens, column);
    const int64_t there =
        problem.offset(place.batch, problem.column_tokens, column, place.head, size) + place.first;
    float row[8];
    load_eight(row, arguments.key + there);
    const float score = product<Here::kLanes>(query, row) * (problem.scale * kLog2E);
    if (!is_seen) continue;
    load_eight(row, arguments.value + there);
    const float raised = fmaxf(reference, score);
    const float factor = exp2_fast(reference - raised), weight = exp2_fast(score - raised);
    reference = raised;
    sum = sum * factor + weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) output[i] = output[i] * factor + weight * row[i];
  }
#pragma unroll
  for (int step = Here::kLanes; step < 32; step *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, reference, step);
    const float raised = fmaxf(reference, other);
    const float factor = exp2_fast(reference - raised), other_factor = exp2_fast(other - raised);
    reference = raised;
    sum = sum * factor + __shfl_xor_sync(kAllLanes, sum, step) * other_factor;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      output[i] = output[i] * factor + __shfl_xor_sync(kAllLanes, output[i], step) * other_factor;
  }
  if (place.set != 0) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) output[i] = sum > 0 ? output[i] / sum : 0;
  store_eight(arguments.output + own, output);
  if (place.first == 0)
    arguments.log_sum[problem.statistic(place.batch, problem.row_tokens, place.row, place.head)] =
        sum > 0 ? (reference + log2f(sum)) * kLn2 : INFINITY;
}

// As in backward.cuh: rows are (query, grad) and columns (key, value), or mirrored.
struct DirectBackward {
  DirectProblem problem;
  const float* rows[2];
  const float* columns[2];
  const float2* statistics;
  float* outputs[2];  // grad_query, -; mirrored: grad_key, grad_value
};

template <int size, bool mirrored>
__global__ void __launch_bounds__(32 * kDirectWarps, 2)
    direct_backward(const __grid_constant__ DirectBackward arguments,
                    const __grid_constant__ RowTables tables) {
  const DirectProblem& problem = arguments.problem;
  using Here = DirectPlace<size>;
  const Here place(problem.row_tokens, problem.heads, problem.rows);
  if (!place.is_inside) return;
  const int64_t own =
      problem.offset(place.batch, problem.row_tokens, place.row, place.head, size) + place.first;
  float rows[2][8], sums[2][8] = {};
  load_eight(rows[0], arguments.rows[0] + own);
  load_eight(rows[1], arguments.rows[1] + own);
  const bool is_shown = !mirrored || problem.shows(place.batch, problem.row_tokens, place.row);
  const int64_t start = tables.starts[place.row];
  const int64_t end = is_shown ? tables.starts[place.row + 1] : start;
  for (int64_t base = start; base < end; base += Here::kSets) {
    const int column = tables.columns[min(base + place.set, end - 1)];
    const bool is_seen =
        base + place.set < end &&
        (mirrored || problem.shows(place.batch, problem.column_tokens, column));
    const int64_t there =
        problem.offset(place.batch, problem.column_tokens, column, place.head, size) + place.first;
    const int query = mirrored ? column : place.row;
    const int queries = mirrored ? problem.column_tokens : problem.row_tokens;
    const float2 statistic =
        arguments.statistics[problem.statistic(place.batch, queries, query, place.head)];
    float columns[2][8];
    load_eight(columns[0], arguments.columns[0] + there);
    load_eight(columns[1], arguments.columns[1] + there);
    const float score = product<Here::kLanes>(rows[0], columns[0]) * (problem.scale * kLog2E);
    const float change = product<Here::kLanes>(rows[1], columns[1]) - statistic.y;
    if (!is_seen) continue;
    const float weight = exp2_fast(score - statistic.x);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[0][i] += weight * change * columns[0][i];
      if constexpr (mirrored) sums[1][i] += weight * columns[1][i];
    }
  }
#pragma unroll
  for (int output = 0; output < (mirrored ? 2 : 1); ++output) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int step = Here::kLanes; step < 32; step *= 2)
        sums[output][i] += __shfl_xor_sync(kAllLanes, sums[output][i], step);
      if (output == 0) sums[output][i] *= problem.scale;
    }
    if (place.set == 0) store_eight(arguments.outputs[output] + own, sums[output]);
  }
}

// (log2(e) · log_sum, Σ grad · output) of each query; one warp a few rows.
struct Statistics {
  const float *grad, *output;  // (batch, tokens, heads, size)
  const float* log_sum;        // (batch, heads, tokens)
  float2* statistics;          // (batch, heads, tokens)
  int64_t rows;                // batch · tokens · heads
  int32_t tokens, heads;
};

template <int size>
__global__ void __launch_bounds__(32 * kDirectWarps)
    query_statistics(const __grid_constant__ Statistics arguments) {
  constexpr int kLanes = size / 8;
  const int64_t number =
      (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  const int64_t row = min(number, arguments.rows - 1);  // all lanes must reach the shuffles
  const int64_t own = row * size + threadIdx.x % kLanes * 8;
  float grad[8], output[8];
  load_eight(grad, arguments.grad + own);
  load_eight(output, arguments.output + own);
  const float sum = product<kLanes>(grad, output);
  if (threadIdx.x % kLanes != 0 || number >= arguments.rows) return;
  const int64_t head = row % arguments.heads, token = row / arguments.heads % arguments.tokens;
  const int64_t batch = row / arguments.heads / arguments.tokens;
  const int64_t place = (batch * arguments.heads + head) * arguments.tokens + token;
  arguments.statistics[place] = make_float2(arguments.log_sum[place] * kLog2E, sum);
}

}  // namespace megatron_nuwa
