// What the kernels' tables, shapes and places are, and how tiles of 16 rows are read and written.
#pragma once

#include "primitives.cuh"

namespace megatron_nuwa {

constexpr int kTileRows = 16;
constexpr int kGroup = 32;

// Whether a multiprocessor has the shared memory of compute capability 9.0.
#if defined(MEGATRON_NUWA_SMALL) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
constexpr bool kIsLarge = false;
#else
constexpr bool kIsLarge = true;
#endif

// WarpTables of warp_tables.py.
struct Tables {
  const int32_t* block_chunks;
  const int32_t* columns;
  const int32_t* rows;
  const int32_t* group_starts;
  const int32_t* group_ends;
  const uint32_t* entries;
};

// Tensors are (batch, tokens, heads, size); "rows" are what tiles are made of, "columns" what is
// gathered: queries and keys, or the other way round in the mirrored pass.
struct Problem {
  int32_t heads;
  int32_t row_tokens;
  int32_t column_tokens;
  float scale;
  const bool* context_mask;  // (batch, context tokens), or null
};

// What a pass sums: outputs, the gradient of queries, those of keys and values.
enum class Sums { kOutputs, kQueryGradients, kContextGradients };

// How a pass is spread over a multiprocessor.
struct Layout {
  int warps;      // of a block that compute
  int gatherers;  // and that do nothing but gather; without any, those that compute gather as well
  int blocks;     // that a multiprocessor is to hold
  int chunk;      // columns that are gathered at once
  int stages;     // of the ring
  int ahead;      // by how many steps columns are fetched ahead of their use
  int at_once;    // columns of a group that the forward pass computes at once: 32 or 16
};

// What is shipped; shape_of() of warp_tables.py says the same. benchmarks.kernel_layouts compiles
// others for head size 64 on large devices, to see which one is the fastest.
constexpr Layout layout_of(Sums sums, int size, bool is_large) {
  [[maybe_unused]] const bool is_tuned = size == 64 && is_large;
#ifdef MEGATRON_NUWA_OUTPUTS
  if (is_tuned && sums == Sums::kOutputs) return {MEGATRON_NUWA_OUTPUTS};
#endif
#ifdef MEGATRON_NUWA_QUERY_GRADIENTS
  if (is_tuned && sums == Sums::kQueryGradients) return {MEGATRON_NUWA_QUERY_GRADIENTS};
#endif
#ifdef MEGATRON_NUWA_CONTEXT_GRADIENTS
  if (is_tuned && sums == Sums::kContextGradients) return {MEGATRON_NUWA_CONTEXT_GRADIENTS};
#endif
  // Sums of two gradients take so many registers that two blocks of eight warps do not fit.
  if (sums == Sums::kContextGradients && size == 64) return {6, 0, 2, is_large ? 96 : 48, 4, 2, 16};
  const int blocks = size > 64 ? 1 : 2, chunk = size > 64 ? 32 : 64;
  return is_large ? Layout{8, 0, blocks, chunk, 6, 3, 32} : Layout{8, 0, blocks, chunk, 4, 2, 32};
}

// What follows from a pass's layout.
template <class Pass, bool is_large = kIsLarge>
struct Shape {
  static constexpr int kSize = Pass::kSize;
  static constexpr Layout kLayout = layout_of(Pass::kSums, kSize, is_large);
  static constexpr int kWarps = kLayout.warps;
  static constexpr bool kIsApart = kLayout.gatherers > 0;
  static constexpr int kGatherers = kIsApart ? kLayout.gatherers : kWarps;
  static constexpr int kThreads = 32 * (kIsApart ? kWarps + kGatherers : kWarps);
  static constexpr int kRowBytes = 2 * kSize;
  static constexpr int kSegments = kRowBytes / 16;
  static constexpr int kChunk = kLayout.chunk, kStages = kLayout.stages, kAhead = kLayout.ahead;
  // The threads that gather copy kRowsAPass columns at once, and kPasses times so many make a chunk:
  // a thread's columns are every kStep-th from its first one on, which is kFirst times its row.
  static constexpr int kRowsAPass = 32 * kGatherers / kSegments;
  static constexpr int kPasses = kChunk / kRowsAPass;
  static constexpr int kStep = kIsApart ? 1 : kRowsAPass;
  static constexpr int kFirst = kIsApart ? kPasses : 1;
  // The turn of a thread's first column is that of its row alone, and a table's entry has 16 bits
  // for a place.
  static_assert(kChunk % kRowsAPass == 0 && (kIsApart ? kPasses : kRowsAPass) % 8 == 0);
  static_assert(kChunk % 32 == 0 || !kIsApart);
  static_assert(kStages * kChunk * kRowBytes <= 1 << 16);
};

// Where 16-byte segment `segment` of row `slot` lies: eight rows whose slots differ modulo 8 give
// the same segment from eight different groups of banks. Segments differ by exclusive or alone.
template <int size>
__device__ __forceinline__ constexpr uint32_t turn_of(int slot) {
  return (size == 32 ? slot >> 1 & 3 : slot & 7) << 4;
}
template <int size>
__device__ __forceinline__ uint32_t swizzled(int slot, int segment) {
  return slot * (2 * size) + (segment << 4 ^ turn_of<size>(slot));
}

// From the segment of columns 0 … 7 of a row, or 8 … 15, to that of step's 16.
__device__ __forceinline__ uint32_t at_step(uint32_t offset, int step) {
  return offset ^ (step << 5);
}

// Everything a warp needs to know of its place.
struct Place {
  int lane, warp, block, head, batch;

  __device__ Place() {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    block = blockIdx.x;
    head = blockIdx.y;
    batch = blockIdx.z;
  }

  // Where a lane finds `token` among the statistics (batch, heads, tokens).
  template <class Statistic>
  __device__ __forceinline__ Statistic* statistics(Statistic* first, const Problem& problem,
                                                   int tokens) const {
    return first + (static_cast<int64_t>(batch) * problem.heads + head) * tokens;
  }
};

// The tokens of a tile's rows; an index, for a pointer would take two registers.
struct TileRows {
  const int32_t* const& all;
  uint32_t first;

  __device__ __forceinline__ int operator[](int row) const { return all[first + row]; }
};

// A tensor's rows of one head of one batch item.
class Rows {
 public:
  // From `byte` of each row on; `Byte` is const char, or char where rows are written.
  __device__ __forceinline__ Rows(const void* tensor, int tokens, int row_bytes,
                                  const Problem& problem, const Place& place, int byte)
      : stride_(problem.heads * row_bytes),
        first_(static_cast<const char*>(tensor) +
               (static_cast<int64_t>(place.batch) * tokens * problem.heads + place.head) *
                   row_bytes +
               byte) {}
  __device__ __forceinline__ const char* operator[](int token) const {
    return first_ + static_cast<int64_t>(token) * stride_;
  }

 private:
  int stride_;
  const char* first_;
};

// The tokens whose rows a lane copies when a warp copies a tile, 16 bytes a lane.
template <int size>
struct TileTokens {
  static constexpr int kSegments = size / 8, kRowsAPass = 32 / kSegments;
  int tokens[kTileRows / kRowsAPass];  // -1 = none

  __device__ __forceinline__ TileTokens(const TileRows& rows, int lane) {
#pragma unroll
    for (int pass = 0; pass < kTileRows / kRowsAPass; ++pass) tokens[pass] = rows[row(pass, lane)];
  }
  __device__ static __forceinline__ int row(int pass, int lane) {
    return pass * kRowsAPass + lane / kSegments;
  }
  __device__ static __forceinline__ int segment(int lane) { return lane % kSegments; }
};

// 16 rows of a tile from global memory to `target` in shared memory; zeros for rows of no token.
template <int size>
__device__ __forceinline__ void copy_tile(uint32_t target, const void* tensor,
                                          const TileTokens<size>& tile, const Problem& problem,
                                          const Place& place) {
  using Tile = TileTokens<size>;
  const int segment = Tile::segment(place.lane);
  const Rows source(tensor, problem.row_tokens, 2 * size, problem, place, 16 * segment);
#pragma unroll
  for (int pass = 0; pass < kTileRows / Tile::kRowsAPass; ++pass) {
    const int token = tile.tokens[pass];
    copy_async_16(target + swizzled<size>(Tile::row(pass, place.lane), segment),
                  source[max(token, 0)], token >= 0);
  }
}

// A tile's accumulators to global memory by way of `staging`, 16 rows of this warp's own.
template <int size, class T>
__device__ __forceinline__ void store_tile(T* tensor, const float (&sums)[size / 8][4],
                                           char* staging, const TileTokens<size>& tile,
                                           const Problem& problem, const Place& place) {
  using Tile = TileTokens<size>;
  char* const low = staging + swizzled<size>(place.lane / 4, 0) + 4 * (place.lane % 4);
  const uint32_t turn = swizzled<size>(place.lane / 4, 0) & 0x70;
#pragma unroll
  for (int n = 0; n < size / 8; ++n) {
    // Row g + 8 has the turn of row g.
    char* const here = low - turn + (turn ^ n << 4);
    *reinterpret_cast<uint32_t*>(here) = pack<T>(sums[n][0], sums[n][1]);
    *reinterpret_cast<uint32_t*>(here + 16 * size) = pack<T>(sums[n][2], sums[n][3]);
  }
  __syncwarp();
  const int segment = Tile::segment(place.lane);
  const Rows target(tensor, problem.row_tokens, 2 * size, problem, place, 16 * segment);
#pragma unroll
  for (int pass = 0; pass < kTileRows / Tile::kRowsAPass; ++pass) {
    const int token = tile.tokens[pass];
    if (token < 0) continue;
    *reinterpret_cast<uint4*>(const_cast<char*>(target[token])) = *reinterpret_cast<const uint4*>(
        staging + swizzled<size>(Tile::row(pass, place.lane), segment));
  }
}

}  // namespace megatron_nuwa
