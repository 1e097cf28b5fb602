// The walk that all tensor-core kernels share: a block gathers its columns chunk by chunk into a
// ring in shared memory, and each of its warps computes 16 rows against 16 columns at a time, as
// the tables of warp_tables.py say. What is computed of a group is the pass's business.
#pragma once

#include "primitives.cuh"

namespace megatron_nuwa {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;
constexpr int kStages = 4;

// WarpTables of warp_tables.py.
struct Tables {
  const int32_t* block_chunks;
  const int32_t* columns;
  const int32_t* rows;
  const int32_t* group_starts;
  const int32_t* group_ends;
  const uint16_t* entries;
  int32_t blocks;
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

template <int size>
struct Shape {
  static constexpr int kRowBytes = 2 * size;
  static constexpr int kSegments = kRowBytes / 16;
  static constexpr int kSteps = size / 16;  // matrix instructions along a row
  static constexpr int kChunk = size > 64 ? 32 : 64;
  static constexpr int kRing = kStages * kChunk;
  static constexpr int kRowsAPass = kThreads / kSegments;
  static constexpr int kPasses = kChunk / kRowsAPass;
  static_assert(kChunk % kRowsAPass == 0);
};

// Where 16-byte segment `segment` of row `slot` lies: eight rows whose slots differ modulo 8 give
// the same segment from eight different groups of banks.
template <int size>
__device__ __forceinline__ uint32_t swizzled(int slot, int segment) {
  const int turn = size == 32 ? slot >> 1 & 3 : slot & 7;
  return slot * Shape<size>::kRowBytes + ((segment ^ turn) << 4);
}

// One fragment of A, or two of B, of columns 16·step … 16·step + 15 of a row: `address` is that
// of segment `lane / 16` of the lane's row, and segments differ by exclusive or alone.
__device__ __forceinline__ uint32_t at_step(uint32_t address, int step) {
  return address ^ (step << 5);
}

// Everything a warp needs to know of its place.
struct Place {
  int lane, warp, block, head, batch;

  __device__ Place(const Tables& tables, const Problem& problem) {
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    block = blockIdx.x % tables.blocks;
    const int image = blockIdx.x / tables.blocks;
    head = image % problem.heads;
    batch = image / problem.heads;
  }

  // Offset of a token's row in a tensor of `tokens` tokens.
  __device__ __forceinline__ int64_t offset(const Problem& problem, int tokens, int token,
                                            int size) const {
    return ((static_cast<int64_t>(batch) * tokens + token) * problem.heads + head) * size;
  }

  // Offset of a token in the statistics (batch, heads, tokens).
  __device__ __forceinline__ int64_t statistic(const Problem& problem, int tokens,
                                               int token) const {
    return (static_cast<int64_t>(batch) * problem.heads + head) * tokens + token;
  }
};

// 16 rows of a tile from global memory to `target` in shared memory; zeros for rows of no token.
template <int size, class T>
__device__ __forceinline__ void copy_tile(uint32_t target, const T* tensor, const int32_t* rows,
                                          const Problem& problem, const Place& place) {
  using S = Shape<size>;
#pragma unroll
  for (int i = place.lane; i < kTileRows * S::kSegments; i += 32) {
    const int row = i / S::kSegments, segment = i % S::kSegments;
    const int token = rows[row];
    const T* source = tensor + place.offset(problem, problem.row_tokens, max(token, 0), size);
    copy_async_16(target + swizzled<size>(row, segment), source + 8 * segment, token >= 0);
  }
}

// A tile's accumulators to global memory by way of `staging`, 16 rows of this warp's own.
template <int size, class T>
__device__ __forceinline__ void store_tile(T* tensor, const float (&sums)[size / 8][4],
                                           char* staging, const int32_t* rows,
                                           const Problem& problem, const Place& place) {
  using S = Shape<size>;
  const int g = place.lane / 4, t = place.lane % 4;
#pragma unroll
  for (int n = 0; n < size / 8; ++n) {
    char* low = staging + swizzled<size>(g, n) + 4 * t;
    char* high = staging + swizzled<size>(g + 8, n) + 4 * t;
    *reinterpret_cast<uint32_t*>(low) = pack<T>(sums[n][0], sums[n][1]);
    *reinterpret_cast<uint32_t*>(high) = pack<T>(sums[n][2], sums[n][3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = place.lane; i < kTileRows * S::kSegments; i += 32) {
    const int row = i / S::kSegments, segment = i % S::kSegments;
    if (rows[row] < 0) continue;
    T* target = tensor + place.offset(problem, problem.row_tokens, rows[row], size);
    *reinterpret_cast<uint4*>(target + 8 * segment) =
        *reinterpret_cast<const uint4*>(staging + swizzled<size>(row, segment));
  }
}

// The gathering side: two tensors' rows, and what goes with each column.
template <class Pass>
class Ring {
  using T = typename Pass::Element;
  using S = Shape<Pass::kSize>;

 public:
  static constexpr int kTensorBytes = S::kRing * S::kRowBytes;
  static constexpr int kColumnBytes = Pass::kMirrored ? sizeof(float2) : 1;
  static constexpr int kBytes = 2 * kTensorBytes + S::kRing * kColumnBytes;

  __device__ Ring(const typename Pass::Arguments& arguments, const Tables& tables,
                  const Place& place, char* memory)
      : arguments_(arguments), place_(place), memory_(memory) {
    columns_ = tables.columns + static_cast<int64_t>(tables.block_chunks[place.block]) * S::kChunk;
    chunks = tables.block_chunks[place.block + 1] - tables.block_chunks[place.block];
    fetch(0);
  }

  // Start copying the chunk fetched last, and fetch the numbers of the next one's columns, so
  // that they are there when its turn comes.
  __device__ __forceinline__ void gather(int chunk) {
    if (chunk < chunks) {
#pragma unroll
      for (int pass = 0; pass < S::kPasses; ++pass) copy_column(chunk, pass);
    }
    commit_copies();
    fetch(chunk + 1);
  }

  int chunks;

 private:
  __device__ __forceinline__ void fetch(int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass)
      column_[pass] = columns_[chunk * S::kChunk + pass * S::kRowsAPass + row()];
  }

  __device__ __forceinline__ void copy_column(int chunk, int pass) {
    const Problem& problem = arguments_.problem;
    const int column = column_[pass];
    if (column < 0) return;  // no group names this slot
    const int slot = chunk % kStages * S::kChunk + pass * S::kRowsAPass + row();
    bool is_seen = true;
    if constexpr (Pass::kMirrored) {
      if (segment() == 0)
        copy_async_8(shared_address(memory_ + 2 * kTensorBytes) + slot * sizeof(float2),
                     arguments_.statistics +
                         place_.statistic(problem, problem.column_tokens, column),
                     true);
    } else if (problem.context_mask != nullptr) {
      is_seen = problem.context_mask[static_cast<int64_t>(place_.batch) * problem.column_tokens +
                                     column];
      if (segment() == 0) memory_[2 * kTensorBytes + slot] = is_seen;
    }
    // Masked rows are zeros here, lest 0 · inf of a padding token spoil a sum.
    const int64_t offset = place_.offset(problem, problem.column_tokens, column, Pass::kSize) +
                           8 * segment();
    const uint32_t target = shared_address(memory_) + swizzled<Pass::kSize>(slot, segment());
    copy_async_16(target, arguments_.columns[0] + offset, is_seen);
    copy_async_16(target + kTensorBytes, arguments_.columns[1] + offset, is_seen);
  }

  __device__ __forceinline__ int row() const { return threadIdx.x / S::kSegments; }
  __device__ __forceinline__ int segment() const { return threadIdx.x % S::kSegments; }

  const typename Pass::Arguments& arguments_;
  const Place& place_;
  char* memory_;
  const int32_t* columns_;
  int column_[S::kPasses];
};

// One group's columns as a lane sees them.
struct Group {
  int slot;          // of column lane % 16
  uint32_t visible;  // bit e: is this lane's score e (accumulator e % 4 of half e / 4) to be seen?

  __device__ __forceinline__ explicit Group(uint16_t entry)
      : slot(entry & 0xff), visible(entry >> 8) {}

  // Take out the columns that the context mask hides.
  __device__ __forceinline__ void hide(const char* is_seen, int lane) {
    const uint32_t columns = __ballot_sync(kAllLanes, is_seen[slot]) >> 2 * (lane % 4);
    const uint32_t left = columns & 3, right = columns >> 8 & 3;
    visible &= left | left << 2 | right << 4 | right << 6;
  }

  __device__ __forceinline__ bool sees(int half, int i) const {
    return visible >> (4 * half + i) & 1;
  }
};

// Scores (16 rows × 16 columns) += A · Bᵀ, with `Fragments` giving A's fragment of each step.
template <class T, int size, class Fragments>
__device__ __forceinline__ void add_products(float (&scores)[2][4], const Fragments& a,
                                             uint32_t address) {
#pragma unroll
  for (int step = 0; step < Shape<size>::kSteps; ++step) {
    uint32_t b[4], rows[4];
    load_matrices(b, at_step(address, step));
    a.get(rows, step);
    multiply_add<T>(scores[0], rows, b[0], b[2]);
    multiply_add<T>(scores[1], rows, b[1], b[3]);
  }
}

// Sums (16 rows × size) += weights (16 × 16) · B.
template <class T, int size>
__device__ __forceinline__ void add_weighted(float (&sums)[size / 8][4],
                                             const float (&weights)[2][4], uint32_t address) {
  const uint32_t a[4] = {
      pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[0][2], weights[0][3]),
      pack<T>(weights[1][0], weights[1][1]), pack<T>(weights[1][2], weights[1][3])};
#pragma unroll
  for (int step = 0; step < Shape<size>::kSteps; ++step) {
    uint32_t b[4];
    load_matrices_transposed(b, at_step(address, step));
    multiply_add<T>(sums[2 * step], a, b[0], b[1]);
    multiply_add<T>(sums[2 * step + 1], a, b[2], b[3]);
  }
}

// The fragments of a tile's rows: kept in registers, or read again from shared memory for each
// group where registers are short.
template <int size, bool in_registers>
class TileFragments;

template <int size>
class TileFragments<size, true> {
 public:
  __device__ __forceinline__ void load(uint32_t address) {
#pragma unroll
    for (int step = 0; step < Shape<size>::kSteps; ++step)
      load_matrices(fragments_[step], at_step(address, step));
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = fragments_[step][i];
  }

 private:
  uint32_t fragments_[Shape<size>::kSteps][4];
};

template <int size>
class TileFragments<size, false> {
 public:
  __device__ __forceinline__ void load(uint32_t address) { address_ = address; }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int step) const {
    load_matrices(fragment, at_step(address_, step));
  }

 private:
  uint32_t address_;
};

// Where tiles wait: in the ring's last two stages, which fill up only after the tiles have gone to
// registers, or behind the ring where they are read again and again.
template <class Pass>
struct Memory {
  using S = Shape<Pass::kSize>;
  static constexpr int kTiles = Pass::kRowTensors * kWarps * kTileRows;
  static constexpr int kFree = 2 * S::kChunk;  // rows of one tensor in two stages
  static constexpr int kBehind = (Ring<Pass>::kBytes + 255) / 256 * 256;
  static constexpr int kBytes =
      Pass::kInRegisters ? Ring<Pass>::kBytes : kBehind + kTiles * S::kRowBytes;
  static_assert(!Pass::kInRegisters || kTiles <= 2 * kFree);

  // Byte offset of a warp's tile of row tensor `i`.
  __device__ static __forceinline__ int tile(int i, int warp) {
    const int row = (i * kWarps + warp) * kTileRows;
    if constexpr (Pass::kInRegisters)
      return row / kFree * Ring<Pass>::kTensorBytes + (kFree + row % kFree) * S::kRowBytes;
    return kBehind + row * S::kRowBytes;
  }
};

template <class Pass>
__global__ void __launch_bounds__(kThreads, Pass::kBlocksPerProcessor)
    walk(const __grid_constant__ typename Pass::Arguments arguments,
         const __grid_constant__ Tables tables) {
  extern __shared__ __align__(1024) char memory[];
  using S = Shape<Pass::kSize>;
  const Problem& problem = arguments.problem;
  const Place place(tables, problem);
  const int tile = place.block * kWarps + place.warp;
  const int32_t* rows = tables.rows + static_cast<int64_t>(tile) * kTileRows;

#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    copy_tile<Pass::kSize>(shared_address(memory + Memory<Pass>::tile(i, place.warp)),
                           arguments.rows[i], rows, problem, place);
  commit_copies();

  Ring<Pass> ring(arguments, tables, place, memory);
  ring.gather(0);
  ring.gather(1);
  wait_for_copies<2>();
  __syncwarp();
  Pass pass(arguments, rows, place);
  const uint32_t own_row = swizzled<Pass::kSize>(place.lane % 16, place.lane / 16);
#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    pass.tile[i].load(shared_address(memory + Memory<Pass>::tile(i, place.warp)) + own_row);

  const uint32_t base = shared_address(memory);
  const int64_t first_chunk = tables.block_chunks[place.block];
  const int32_t* group_ends = tables.group_ends + first_chunk * kWarps + place.warp;
  int group = tables.group_starts[tile];
  const uint16_t* entry = tables.entries + static_cast<int64_t>(group) * 32 + place.lane;
  uint16_t next = *entry;
  for (int chunk = 0; chunk < ring.chunks; ++chunk) {
    wait_for_copies<1>();
    // Chunk `chunk` has come for every thread, and no warp reads chunk - 2 any more.
    __syncthreads();
    ring.gather(chunk + 2);
    for (const int end = group_ends[chunk * kWarps]; group < end; ++group) {
      Group columns(next);
      entry += 32;
      next = *entry;  // the tables end with a spare group
      const uint32_t address =
          base + swizzled<Pass::kSize>(columns.slot, place.lane / 16);
      pass.add(columns, address, memory + 2 * Ring<Pass>::kTensorBytes);
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  pass.store(memory + place.warp * kTileRows * S::kRowBytes);
}

}  // namespace megatron_nuwa
