// The kernels, written once and compiled for each instruction set.
//
// Every one has the same shape: four rows against the list of their neighbours. `dot` makes the
// 4 x n products of rows and neighbours, a softmax (or its derivative) turns them into weights in a
// buffer of the thread, and `mix` adds up the neighbours by their weights. A list holds a few
// hundred neighbours, so all scores are at hand and no online softmax is needed. All sums are in
// float and in an order that depends on the table alone: same input, same bits.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

using megatron_nuwa::BlockTable;
using megatron_nuwa::Call;
using megatron_nuwa::kBlockRows;
using megatron_nuwa::kEntryBits;
using megatron_nuwa::kListPadding;

constexpr int kDotRows = LANES == 16 ? 4 : 2;     // tile of `dot`: as many sums as registers hold
constexpr int kMixVectors = LANES == 16 ? 4 : 2;  // the same for `mix`

struct List {
  const int32_t* entries;
  int64_t count;   // without padding
  int64_t padded;  // a multiple of kListPadding
};

// One head of a (batch, tokens, heads, head_dim) tensor.
template <class T>
struct Head {
  T* first;
  int64_t stride;

  T* row(int64_t token) const { return first + token * stride; }
};

template <class T>
Head<T> head_of(T* tensor, const Call& call, int64_t tokens, int64_t batch, int64_t head) {
  const int64_t stride = call.heads * call.head_dim;
  return {tensor + batch * tokens * stride + head * call.head_dim, stride};
}

inline const bool* mask_of(const Call& call, int64_t batch) {
  return call.context_mask ? call.context_mask + batch * call.context_tokens : nullptr;
}

// The thread's memory, cut into what a kernel needs.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<float*>(memory)) {}

  float* floats(int64_t count) {
    float* taken = next_;
    next_ += count;
    return taken;
  }
  int32_t* ints(int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); }

 private:
  float* next_;
};

// The block's list without what the context mask hides: neighbours, where they are the context, or
// rows, where those are. `storage` holds the list that is left, if it differs from the table's.
List visible(const BlockTable& table, int64_t block, const bool* neighbour_mask,
             const bool* row_mask, int32_t* storage) {
  const int32_t* entries = table.entries + table.starts[block];
  const int64_t count = table.counts[block];
  const int32_t* rows = table.rows + block * kBlockRows;
  int32_t seen = (1 << kBlockRows) - 1;
  for (int r = 0; row_mask && r < kBlockRows; ++r)
    if (rows[r] >= 0 && !row_mask[rows[r]]) seen &= ~(1 << r);
  if (!neighbour_mask && seen == (1 << kBlockRows) - 1)
    return {entries, count, table.starts[block + 1] - table.starts[block]};

  constexpr int32_t kRowBits = (1 << kEntryBits) - 1;
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t entry = entries[i] & (seen | ~kRowBits);
    storage[kept] = entry;
    kept += (entry & kRowBits) && (!neighbour_mask || neighbour_mask[entry >> kEntryBits]);
  }
  int64_t padded = kept;
  for (; padded % kListPadding; ++padded) storage[padded] = entries[0] & ~kRowBits;
  return {storage, kept, padded};
}

// Copies of the block's rows as float, times a factor; zeros for rows that the block has not.
template <class T>
void copy_rows(Head<const T> from, const int32_t* rows, int64_t size, float factor, float* to) {
  for (int r = 0; r < kBlockRows; ++r, to += size) {
    if (rows[r] < 0) {
      for (int64_t d = 0; d < size; d += LANES) store(to + d, Floats{});
      continue;
    }
    const T* row = from.row(rows[r]);
    for (int64_t d = 0; d < size; d += LANES) store(to + d, load(row + d) * factor);
  }
}

// scores[r][i] = left[r] . right(entry i)
template <class T>
void dot(const float* left, Head<const T> right, const List& list, int64_t size, float* scores) {
  for (int64_t i = 0; i < list.count; i += 4) {
    const T* row[4];
    for (int k = 0; k < 4; ++k) row[k] = right.row(list.entries[i + k] >> kEntryBits);
    for (int first = 0; first < kBlockRows; first += kDotRows) {
      Floats total[kDotRows][4] = {};
      const float* rows = left + first * size;
      for (int64_t d = 0; d < size; d += LANES) {
        Floats x[4];
        for (int k = 0; k < 4; ++k) x[k] = load(row[k] + d);
        for (int r = 0; r < kDotRows; ++r) {
          const Floats y = load(rows + r * size + d);
          for (int k = 0; k < 4; ++k) total[r][k] += y * x[k];
        }
      }
      for (int r = 0; r < kDotRows; ++r) {
        const Quad four = sums(total[r][0], total[r][1], total[r][2], total[r][3]);
        std::memcpy(scores + (first + r) * list.padded + i, &four, sizeof four);
      }
    }
  }
}

template <int VECTORS, class T>
void mix_part(const float* weights, Head<const T> right, const List& list, int64_t d,
              const float* factor, const int32_t* rows, Head<T> out) {
  Floats total[kBlockRows][VECTORS] = {};
  for (int64_t i = 0; i < list.count; ++i) {
    const int32_t entry = list.entries[i];
    const T* row = right.row(entry >> kEntryBits) + d;
    Floats x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) x[v] = load(row + v * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRows; ++r) {
      // Not a product with weight 0: what a row does not see must not reach it, even a NaN.
      if (!(entry & 1 << r)) continue;
      const Floats weight = broadcast(weights[r * list.padded + i]);
      for (int v = 0; v < VECTORS; ++v) total[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kBlockRows; ++r) {
    if (rows[r] < 0) continue;
    T* to = out.row(rows[r]) + d;
    for (int v = 0; v < VECTORS; ++v) store(to + v * LANES, total[r][v] * factor[r]);
  }
}

// out(row r) = factor[r] * sum over i of weights[r][i] * right(entry i)
template <class T>
void mix(const float* weights, Head<const T> right, const List& list, int64_t size,
         const float* factor, const int32_t* rows, Head<T> out) {
  int64_t d = 0;
  for (; d + kMixVectors * LANES <= size; d += kMixVectors * LANES)
    mix_part<kMixVectors>(weights, right, list, d, factor, rows, out);
  for (; d < size; d += LANES) mix_part<1>(weights, right, list, d, factor, rows, out);
}

inline Floats where_seen(const int32_t* entries, int row, Floats seen, Floats other) {
  return ((load(entries) & (1 << row)) != 0) ? seen : other;
}

// Scores of one row become e^(score - maximum); returns the logarithm of the sum of e^score
// and gives its reciprocal, relative to the maximum. Infinity and 0 for a row that sees nothing.
float softmax(float* scores, const List& list, int row, float* reciprocal) {
  const Floats lowest = broadcast(-INFINITY);
  Floats best = lowest;
  for (int64_t i = 0; i < list.padded; i += LANES) {
    const Floats x = where_seen(list.entries + i, row, load(scores + i), lowest);
    store(scores + i, x);
    best = (best < x) ? x : best;
  }
  const float highest = maximum(best);
  const float shift = highest == -INFINITY ? 0.0f : highest;
  Floats total{};
  for (int64_t i = 0; i < list.padded; i += LANES) {
    const Floats weight = exponential(load(scores + i) - shift);
    store(scores + i, weight);
    total += weight;
  }
  const float all = sum(total);
  *reciprocal = all == 0.0f ? 0.0f : 1.0f / all;
  return all == 0.0f ? INFINITY : shift + logf(all);
}

template <class T>
void forward(const Call& call, const BlockTable& table, int64_t batch, int64_t head, int64_t block,
             void* memory) {
  Scratch scratch(memory);
  const int64_t size = call.head_dim;
  const int32_t* rows = table.rows + block * kBlockRows;
  const auto of = [&](const void* tensor, int64_t tokens) {
    return head_of(static_cast<const T*>(tensor), call, tokens, batch, head);
  };
  float* queries = scratch.floats(kBlockRows * size);
  copy_rows(of(call.query, call.tokens), rows, size, call.scale, queries);
  const List list =
      visible(table, block, mask_of(call, batch), nullptr, scratch.ints(table.longest));
  float* scores = scratch.floats(kBlockRows * table.longest);
  dot(queries, of(call.key, call.context_tokens), list, size, scores);

  float reciprocal[kBlockRows];
  float* log_sum = call.log_sum + (batch * call.heads + head) * call.tokens;
  for (int r = 0; r < kBlockRows; ++r) {
    if (rows[r] < 0) continue;
    log_sum[rows[r]] = softmax(scores + r * list.padded, list, r, &reciprocal[r]);
  }
  mix(scores, of(call.value, call.context_tokens), list, size, reciprocal, rows,
      head_of(static_cast<T*>(call.output), call, call.tokens, batch, head));
}

const float kOnes[kBlockRows] = {1, 1, 1, 1};

template <class T>
void backward_query(const Call& call, const BlockTable& table, int64_t batch, int64_t head,
                    int64_t block, void* memory) {
  Scratch scratch(memory);
  const int64_t size = call.head_dim;
  const int32_t* rows = table.rows + block * kBlockRows;
  const auto of = [&](const void* tensor, int64_t tokens) {
    return head_of(static_cast<const T*>(tensor), call, tokens, batch, head);
  };
  float* queries = scratch.floats(kBlockRows * size);
  float* grads = scratch.floats(kBlockRows * size);
  copy_rows(of(call.query, call.tokens), rows, size, call.scale, queries);
  copy_rows(of(call.grad, call.tokens), rows, size, 1.0f, grads);
  const List list =
      visible(table, block, mask_of(call, batch), nullptr, scratch.ints(table.longest));
  float* scores = scratch.floats(kBlockRows * table.longest);
  float* grad_weights = scratch.floats(kBlockRows * table.longest);
  dot(queries, of(call.key, call.context_tokens), list, size, scores);
  dot(grads, of(call.value, call.context_tokens), list, size, grad_weights);

  const int64_t per_head = (batch * call.heads + head) * call.tokens;
  for (int r = 0; r < kBlockRows; ++r) {
    if (rows[r] < 0) continue;
    const float log_sum = call.log_sum[per_head + rows[r]];
    float* score = scores + r * list.padded;
    const float* grad_weight = grad_weights + r * list.padded;
    Floats total{};
    for (int64_t i = 0; i < list.padded; i += LANES) {
      const Floats weight = exponential(load(score + i) - log_sum);
      total += where_seen(list.entries + i, r, weight * load(grad_weight + i), Floats{});
      store(score + i, weight);
    }
    const float product = sum(total);
    call.row_product[per_head + rows[r]] = product;
    for (int64_t i = 0; i < list.padded; i += LANES) {
      const Floats grad_score = load(score + i) * (load(grad_weight + i) - product) * call.scale;
      store(score + i, where_seen(list.entries + i, r, grad_score, Floats{}));
    }
  }
  mix(scores, of(call.key, call.context_tokens), list, size, kOnes, rows,
      head_of(static_cast<T*>(call.grad_query), call, call.tokens, batch, head));
}

template <class T>
void backward_key_value(const Call& call, const BlockTable& table, int64_t batch, int64_t head,
                        int64_t block, void* memory) {
  Scratch scratch(memory);
  const int64_t size = call.head_dim;
  const auto of = [&](const void* tensor, int64_t tokens) {
    return head_of(static_cast<const T*>(tensor), call, tokens, batch, head);
  };
  const int32_t* rows = table.rows + block * kBlockRows;
  const Head<T> grad_key =
      head_of(static_cast<T*>(call.grad_key), call, call.context_tokens, batch, head);
  const Head<T> grad_value =
      head_of(static_cast<T*>(call.grad_value), call, call.context_tokens, batch, head);
  float* keys = scratch.floats(kBlockRows * size);
  float* values = scratch.floats(kBlockRows * size);
  copy_rows(of(call.key, call.context_tokens), rows, size, call.scale, keys);
  copy_rows(of(call.value, call.context_tokens), rows, size, 1.0f, values);
  const List list =
      visible(table, block, nullptr, mask_of(call, batch), scratch.ints(table.longest));
  float* scores = scratch.floats(kBlockRows * table.longest);
  float* grad_weights = scratch.floats(kBlockRows * table.longest);
  dot(keys, of(call.query, call.tokens), list, size, scores);
  dot(values, of(call.grad, call.tokens), list, size, grad_weights);

  float* log_sum = scratch.floats(table.longest);
  float* product = scratch.floats(table.longest);
  const int64_t per_head = (batch * call.heads + head) * call.tokens;
  for (int64_t i = 0; i < list.padded; ++i) {
    const int64_t query = per_head + (list.entries[i] >> kEntryBits);
    log_sum[i] = call.log_sum[query];
    product[i] = call.row_product[query];
  }
  for (int r = 0; r < kBlockRows; ++r) {
    float* score = scores + r * list.padded;
    float* grad_weight = grad_weights + r * list.padded;
    for (int64_t i = 0; i < list.padded; i += LANES) {
      Floats weight = exponential(load(score + i) - load(log_sum + i));
      weight = where_seen(list.entries + i, r, weight, Floats{});
      store(score + i, weight);
      const Floats grad_score = weight * (load(grad_weight + i) - load(product + i)) * call.scale;
      store(grad_weight + i, grad_score);
    }
  }
  mix(scores, of(call.grad, call.tokens), list, size, kOnes, rows, grad_value);
  mix(grad_weights, of(call.query, call.tokens), list, size, kOnes, rows, grad_key);
}

template <class T>
constexpr megatron_nuwa::Kernels kernels_for() {
  return {forward<T>, backward_query<T>, backward_key_value<T>};
}

inline megatron_nuwa::Kernels kernels_of(megatron_nuwa::ElementType type) {
  return type == megatron_nuwa::ElementType::float32 ? kernels_for<float>()
                                                     : kernels_for<bfloat16>();
}

}  // namespace
