// Runs every CPU kernel on random geometries, under the sanitizers it is compiled with, and holds
// the results against plain loops in double. Every buffer has exactly the size that the kernels are
// told, so a read or write beyond it is an error. Exit code 0, or a message and 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using namespace megatron_nuwa;

namespace {

std::mt19937 generator(1);

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

struct Grid {
  int side[3];  // rows, columns, frames
  int cells() const { return side[0] * side[1] * side[2]; }
  void cell(int n, int* at) const {
    at[1] = n % side[1];
    at[0] = n / side[1] % side[0];
    at[2] = n / side[1] / side[0];
  }
};

Grid random_grid() { return {{pick(1, 7), pick(1, 9), pick(1, 4)}}; }

using Seen = std::vector<std::vector<bool>>;

Seen random_seen(const Grid& grid, const Grid& context, bool causal) {
  int reach[3];
  for (int& r : reach) r = pick(0, 3) == 3 ? 100 : pick(0, 3);
  Seen seen(grid.cells(), std::vector<bool>(context.cells()));
  for (int n = 0; n < grid.cells(); ++n) {
    int query[3], key[3];
    grid.cell(n, query);
    for (int m = 0; m < context.cells(); ++m) {
      context.cell(m, key);
      bool near = !causal || m <= n;
      for (int a = 0; a < 3; ++a)
        near = near && std::abs(key[a] - query[a] * context.side[a] / grid.side[a]) <= reach[a];
      seen[n][m] = near;
    }
  }
  return seen;
}

struct OwnedTable {
  std::vector<int32_t> rows, starts{0}, counts, entries;
  int64_t longest = 0;

  // Blocks of up to four rows in random order, with a random number of empty places.
  OwnedTable(const Seen& seen, int64_t height, int64_t width, bool mirrored) {
    std::vector<int32_t> order(height);
    for (int64_t i = 0; i < height; ++i) order[i] = i;
    if (pick(0, 1)) std::shuffle(order.begin(), order.end(), generator);
    for (size_t next = 0; next < order.size();) {
      int32_t block[kBlockRows];
      for (int32_t& row : block) row = next < order.size() && pick(0, 9) ? order[next++] : -1;
      rows.insert(rows.end(), block, block + kBlockRows);
      const size_t start = entries.size();
      for (int64_t j = 0; j < width; ++j) {
        int32_t bits = 0;
        for (int r = 0; r < kBlockRows; ++r)
          if (block[r] >= 0 && (mirrored ? seen[j][block[r]] : seen[block[r]][j])) bits |= 1 << r;
        if (bits) entries.push_back(j << kEntryBits | bits);
      }
      counts.push_back(entries.size() - start);
      const int32_t last = entries.size() > start ? entries.back() & ~15 : 0;
      while ((entries.size() - start) % kListPadding) entries.push_back(last);
      longest = std::max<int64_t>(longest, entries.size() - start);
      starts.push_back(entries.size());
    }
    entries.shrink_to_fit();
  }

  BlockTable view() const {
    return {int64_t(counts.size()), longest,       rows.data(),
            starts.data(),          counts.data(), entries.data()};
  }
};

// A tensor in the kernels' element type, and what it holds as float.
struct Buffer {
  std::vector<float> values;
  std::vector<char> bytes;
  ElementType type;

  Buffer(int64_t size, ElementType type, bool random) : values(size), type(type) {
    bytes.resize(size * (type == ElementType::float32 ? 4 : 2));
    bytes.shrink_to_fit();
    for (float& x : values) {
      uint32_t bits;
      x = random ? normal() : NAN;
      std::memcpy(&bits, &x, 4);
      if (type == ElementType::bfloat16) bits &= 0xffff0000u;
      std::memcpy(&x, &bits, 4);
      const int64_t i = &x - values.data();
      if (type == ElementType::float32) std::memcpy(&bytes[4 * i], &x, 4);
      if (type == ElementType::bfloat16) std::memcpy(&bytes[2 * i], reinterpret_cast<char*>(&bits) + 2, 2);
    }
  }
  void* data() { return bytes.data(); }
  double operator[](int64_t i) const {
    uint32_t bits = 0;
    if (type == ElementType::float32) std::memcpy(&bits, &bytes[4 * i], 4);
    else std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes[2 * i], 2);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

void compare(const char* name, const Buffer& got, const std::vector<double>& wanted) {
  const double allowed = got.type == ElementType::float32 ? 2e-5 : 4e-2;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::abs(got[i] - wanted[i]);
    if (error <= allowed * std::max(1.0, std::abs(wanted[i]))) continue;
    std::printf("%s[%zu] is %g, not %g\n", name, i, got[i], wanted[i]);
    std::exit(1);
  }
}

void run(BlockKernel kernel, const Call& call, const BlockTable& table) {
  const int64_t bytes = scratch_bytes(table.longest, call.head_dim);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h)
      for (int64_t block = 0; block < table.blocks; ++block) {
        void* scratch = std::aligned_alloc(64, bytes);
        std::memset(scratch, 0xff, bytes);  // NaN: what is not written must not matter
        kernel(call, table, b, h, block, scratch);
        std::free(scratch);
      }
}

void one_geometry(InstructionSet set, ElementType type) {
  const Grid grid = random_grid();
  const bool causal = pick(0, 1);
  const Grid context = causal ? grid : random_grid();
  const Seen seen = random_seen(grid, context, causal);
  const int64_t N = grid.cells(), M = context.cells();
  const int64_t B = pick(1, 2), H = pick(1, 3), D = 16 * pick(1, 5);
  const OwnedTable keys_of(seen, N, M, false), queries_of(seen, M, N, true);

  std::vector<char> mask(B * M, 1);
  const bool masked = pick(0, 1);
  if (masked) for (char& bit : mask) bit = pick(0, 2) > 0;
  Buffer query(B * N * H * D, type, true), key(B * M * H * D, type, true);
  Buffer value(B * M * H * D, type, true), grad(B * N * H * D, type, true);
  Buffer output(B * N * H * D, type, false), grad_query(B * N * H * D, type, false);
  Buffer grad_key(B * M * H * D, type, false), grad_value(B * M * H * D, type, false);
  std::vector<float> log_sum(B * H * N, NAN), row_product(B * H * N, NAN);
  Call call{};
  call.query = query.data(), call.key = key.data(), call.value = value.data();
  call.context_mask = masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  call.output = output.data(), call.log_sum = log_sum.data(), call.grad = grad.data();
  call.row_product = row_product.data(), call.grad_query = grad_query.data();
  call.grad_key = grad_key.data(), call.grad_value = grad_value.data();
  call.batch = B, call.tokens = N, call.context_tokens = M, call.heads = H, call.head_dim = D;
  call.scale = 1 / std::sqrt(float(D));
  const Kernels chosen = kernels(set, type);
  run(chosen.forward, call, keys_of.view());
  run(chosen.backward_query, call, keys_of.view());
  run(chosen.backward_key_value, call, queries_of.view());

  std::vector<double> out(B * N * H * D), dq(out), dk(B * M * H * D), dv(dk);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t n = 0; n < N; ++n) {
        const auto at = [&](int64_t token, int64_t tokens) { return ((b * tokens + token) * H + h) * D; };
        const int64_t q = at(n, N);
        std::vector<double> weight(M), slope(M);
        double sum = 0, product = 0;
        for (int64_t m = 0; m < M; ++m) {
          if (!seen[n][m] || !mask[b * M + m]) continue;
          double score = 0;
          for (int64_t d = 0; d < D; ++d) {
            score += query[q + d] * key[at(m, M) + d] * call.scale;
            slope[m] += grad[q + d] * value[at(m, M) + d];
          }
          sum += weight[m] = std::exp(score);
        }
        for (int64_t m = 0; m < M; ++m) {
          if (weight[m] == 0) continue;
          product += (weight[m] /= sum) * slope[m];
        }
        for (int64_t m = 0; m < M; ++m) {
          if (weight[m] == 0) continue;
          const double change = weight[m] * (slope[m] - product) * call.scale;
          for (int64_t d = 0; d < D; ++d) {
            out[q + d] += weight[m] * value[at(m, M) + d];
            dq[q + d] += change * key[at(m, M) + d];
            dk[at(m, M) + d] += change * query[q + d];
            dv[at(m, M) + d] += weight[m] * grad[q + d];
          }
        }
      }
  compare("output", output, out);
  compare("grad_query", grad_query, dq);
  compare("grad_key", grad_key, dk);
  compare("grad_value", grad_value, dv);
}

}  // namespace

int main() {
  int done = 0;
  for (int64_t set = 0; set <= int64_t(best_instruction_set()); ++set)
    for (ElementType type : {ElementType::float32, ElementType::bfloat16})
      for (int i = 0; i < 25; ++i, ++done) one_geometry(InstructionSet(set), type);
  std::printf("%d geometries are right\n", done);
}
