// The walk that all tensor-core kernels share: a block gathers its columns chunk by chunk into a
// ring in shared memory, and each of its warps computes 16 rows against 32 columns at a time, as
// the tables of warp_tables.py say. What is computed of a group is the pass's business.
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

// shape_of() of warp_tables.py.
template <int size, bool mirrored, bool is_large = kIsLarge>
struct Shape {
  // Sums of two gradients take so many registers that two blocks of eight warps do not fit.
  static constexpr bool kIsNarrow = mirrored && size == 64;
  static constexpr int kWarps = kIsNarrow ? 6 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowBytes = 2 * size;
  static constexpr int kSegments = kRowBytes / 16;
  // Stages of the ring, and by how many steps columns are fetched ahead of their use, in memory
  // that leaves room for a second block.
  static constexpr int kChunk = kIsNarrow ? (is_large ? 96 : 48) : size > 64 ? 32 : 64;
  static constexpr int kStages = is_large && !kIsNarrow ? 6 : 4;
  static constexpr int kAhead = is_large && !kIsNarrow ? 3 : 2;
  static constexpr int kRowsAPass = kThreads / kSegments;
  static constexpr int kPasses = kChunk / kRowsAPass;
  // A thread's rows lie in one place of the swizzle, and a table's entry has 16 bits for a place.
  static_assert(kChunk % kRowsAPass == 0 && kRowsAPass % 8 == 0);
  static_assert(kStages * kChunk * kRowBytes <= 1 << 16);
};

// Where 16-byte segment `segment` of row `slot` lies: eight rows whose slots differ modulo 8 give
// the same segment from eight different groups of banks. Segments differ by exclusive or alone.
template <int size>
__device__ __forceinline__ uint32_t swizzled(int slot, int segment) {
  const int turn = size == 32 ? slot >> 1 & 3 : slot & 7;
  return slot * (2 * size) + ((segment ^ turn) << 4);
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

// What lies where in shared memory.
//
// Tiles wait in the ring's last two stages, which fill up only after the tiles have gone to
// registers, or behind the ring where they are read again and again.
template <class Pass, bool is_large = kIsLarge>
struct Memory {
  using S = Shape<Pass::kSize, Pass::kMirrored, is_large>;
  static constexpr int kStages = S::kStages;
  static constexpr int kTensor = kStages * S::kChunk * S::kRowBytes;
  static constexpr int kBeside = 2 * kTensor;  // what goes with each column
  static constexpr int kColumnBytes = Pass::kMirrored ? sizeof(float2) : 1;
  static constexpr int kBarriers = (kBeside + kStages * S::kChunk * kColumnBytes + 255) / 256 * 256;
  static constexpr int kTiles = kBarriers + 256;
  static constexpr int kTileRowCount = Pass::kRowTensors * S::kWarps * kTileRows;
  static constexpr int kFree = 2 * S::kChunk;  // rows of one tensor in two stages
  static constexpr int kBytes = kTiles + (Pass::kInRegisters ? 0 : kTileRowCount * S::kRowBytes);
  static_assert(!Pass::kInRegisters || kTileRowCount <= 2 * kFree);

  // A warp's tile of row tensor `i`.
  __device__ static __forceinline__ int tile(int i, int warp) {
    const int row = (i * S::kWarps + warp) * kTileRows;
    if constexpr (Pass::kInRegisters)
      return row / kFree * kTensor +
             ((kStages - 2) * S::kChunk + row % kFree) * S::kRowBytes;
    return kTiles + row * S::kRowBytes;
  }
  // The barriers of a stage: its columns have come; all warps are done with the step that bears
  // the stage's number, and so with the chunk before.
  __device__ static __forceinline__ int full(int stage) { return kBarriers + 8 * stage; }
  __device__ static __forceinline__ int done(int stage) {
    return kBarriers + 8 * (kStages + stage);
  }
};

// The stage of a step, and whether the ring has been round an odd number of times before it.
template <int stages>
struct Turn {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance() {
    const bool is_last = stage == stages - 1;
    stage = is_last ? 0 : stage + 1;
    phase ^= is_last;
  }
  __device__ __forceinline__ Turn before(int steps) const {
    const bool is_round = stage < steps;
    return {stage - steps + (is_round ? stages : 0), phase ^ is_round};
  }
  __device__ __forceinline__ int stage_after(int steps) const {
    return stage + steps - (stage >= stages - steps ? stages : 0);
  }
};

// The gathering side: two tensors' rows, and what goes with each column.
//
// Warps do not march in step: one may be a few steps ahead of another, as far as the ring reaches.
template <class Pass>
class Ring {
  using T = typename Pass::Element;
  using S = Shape<Pass::kSize, Pass::kMirrored>;
  using M = Memory<Pass>;
  using Turn = megatron_nuwa::Turn<S::kStages>;

 public:
  __device__ Ring(const typename Pass::Arguments& arguments, const Tables& tables,
                  const Place& place, char* memory)
      : problem_(arguments.problem), columns_(tables.columns), place_(place), first_{rows_of(arguments, place, 0)},
        second_{rows_of(arguments, place, 1)}, memory_(shared_address(memory)),
        is_seen_(memory + M::kBeside + row()),
        target_(memory_ + swizzled<Pass::kSize>(row(), segment())) {
    if constexpr (Pass::kMirrored)
      statistics_ =
          place.statistics(arguments.statistics, arguments.problem, arguments.problem.column_tokens);
    const int first = tables.block_chunks[place.block];
    chunks = tables.block_chunks[place.block + 1] - first;
    next_column_ = first * S::kChunk + row();
    if (threadIdx.x < M::kStages) {
      // Where there is a mask, each warp says besides that it has written its part.
      const bool is_masked = !Pass::kMirrored && problem_.context_mask != nullptr;
      start_barrier(memory_ + M::full(threadIdx.x), S::kThreads + (is_masked ? S::kWarps : 0));
      start_barrier(memory_ + M::done(threadIdx.x), S::kWarps);
    }
  }

  // Start copying the first chunks; all threads' barriers must have started.
  __device__ __forceinline__ void gather_first() {
    int columns[S::kAhead][S::kPasses];
#pragma unroll
    for (int chunk = 0; chunk < S::kAhead; ++chunk)
      if (chunk < chunks) fetch(columns[chunk]);
#pragma unroll
    for (int chunk = 0; chunk < S::kAhead; ++chunk)
      if (chunk < chunks) copy(columns[chunk], chunk);
    if (S::kAhead < chunks) fetch(next_);
  }

  // At a step, start copying the chunk of kAhead steps later as soon as no warp reads what lies in
  // its place: the last step that may is the one after that chunk's own.
  __device__ __forceinline__ void gather(const Turn& turn) {
    // Of a barrier that has just started, the phase before counts as ended.
    const Turn last = turn.before(S::kStages - 1 - S::kAhead);
    wait_for_phase(memory_ + M::done(last.stage), last.phase);
    copy(next_, turn.stage_after(S::kAhead));
    // The numbers of the next one's columns, so that they are there when its turn comes; after the
    // last chunk comes a spare one.
    fetch(next_);
  }

  __device__ __forceinline__ void wait_for(const Turn& turn) const {
    wait_for_phase(memory_ + M::full(turn.stage), turn.phase);
  }

  // This warp will not read the chunk before this one any more.
  __device__ __forceinline__ void finish(const Turn& turn) const {
    arrive_for_warp(M::done(turn.stage));
  }

  int chunks;

 private:
  __device__ static __forceinline__ Rows rows_of(const typename Pass::Arguments& arguments,
                                                 const Place& place, int tensor) {
    const Problem& problem = arguments.problem;
    return {arguments.columns[tensor], problem.column_tokens, S::kRowBytes, problem, place,
            16 * segment()};
  }

  __device__ __forceinline__ void arrive_for_warp(int barrier) const {
    __syncwarp();
    if (place_.lane == 0) arrive(memory_ + barrier);
  }

  __device__ __forceinline__ void fetch(int (&columns)[S::kPasses]) {
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass)
      columns[pass] = columns_[next_column_ + pass * S::kRowsAPass];
    next_column_ += S::kChunk;
  }

  __device__ __forceinline__ void copy(const int (&columns)[S::kPasses], int stage) {
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass)
      copy_column(stage * S::kChunk + pass * S::kRowsAPass, columns[pass]);
    arrive_with_copies(memory_ + M::full(stage));
    if (!Pass::kMirrored && problem_.context_mask != nullptr) arrive_for_warp(M::full(stage));
  }

  // Slots of no column become zeros; no group names them.
  __device__ __forceinline__ void copy_column(int slot, int number) {
    const int column = max(number, 0);
    int is_seen = number >= 0;
    if constexpr (Pass::kMirrored) {
      if (segment() == 0)
        copy_async_8(memory_ + M::kBeside + (slot + row()) * sizeof(float2), statistics_ + column,
                     is_seen);
    } else if (problem_.context_mask != nullptr) {
      // Masked rows are zeros here, lest 0 · inf of a padding token spoil a sum.
      is_seen &= problem_.context_mask[static_cast<int64_t>(place_.batch) * problem_.column_tokens +
                                       column];
      if (segment() == 0) is_seen_[slot] = is_seen;
    }
    const uint32_t target = target_ + slot * S::kRowBytes;
    copy_async_16(target, first_[column], is_seen);
    copy_async_16(target + M::kTensor, second_[column], is_seen);
  }

  __device__ static __forceinline__ int row() { return threadIdx.x / S::kSegments; }
  __device__ static __forceinline__ int segment() { return threadIdx.x % S::kSegments; }

  const Problem& problem_;
  const int32_t* const& columns_;
  const Place& place_;
  const Rows first_, second_;
  const uint32_t memory_;
  char* const is_seen_;
  const uint32_t target_;
  const float2* statistics_;
  uint32_t next_column_;
  int next_[S::kPasses];
};

// One group's columns as a lane sees them; all lanes of a warp ask together.
class Group {
 public:
  __device__ __forceinline__ Group(uint32_t entry, int lane) : entry_(entry), lane_(lane) {}

  // Which of this lane's scores are to be seen: bit 4 · octet + i of the octet's accumulator i.
  __device__ __forceinline__ uint32_t visible() const { return entry_ >> 16; }

  // The same without the columns that the context mask hides.
  template <int row_bytes>
  __device__ __forceinline__ uint32_t visible(const char* is_seen) const {
    const uint32_t shown = __ballot_sync(kAllLanes, is_seen[(entry_ & 0xffff) / row_bytes]);
    uint32_t of_lane = 0;
#pragma unroll
    for (int octet = 0; octet < kGroup / 8; ++octet) {
      const uint32_t two = shown >> (8 * octet + 2 * (lane_ % 4)) & 3;
      of_lane |= (two | two << 2) << 4 * octet;
    }
    return visible() & of_lane;
  }

  // The slot of a column.
  template <int row_bytes>
  __device__ __forceinline__ int slot(int column) const {
    return row_of(column) / row_bytes;
  }

  // Where in the ring lies what this lane names to `ldmatrix`, for a half of the columns: with the
  // ring's rows as columns of B (two matrices of an octet, two of the next), and, transposed, as
  // its rows.
  __device__ __forceinline__ uint32_t as_columns(int half) const {
    return row_of(16 * half + (lane_ & 7) + (lane_ >> 1 & 8)) ^ (lane_ << 1 & 16);
  }
  __device__ __forceinline__ uint32_t as_rows(int half) const {
    return row_of(16 * half + lane_ % 16) ^ (lane_ & 16);
  }

 private:
  __device__ __forceinline__ uint32_t row_of(int column) const {
    return __shfl_sync(kAllLanes, entry_, column) & 0xffff;
  }
  const uint32_t entry_;
  const int lane_;
};

// Scores (16 rows × 16 columns) += A · Bᵀ, with `Fragments` giving A's fragment of each step.
template <class T, int size, class Fragments>
__device__ __forceinline__ void add_products(float (&left)[4], float (&right)[4],
                                             const Fragments& a, uint32_t ring, uint32_t offset) {
#pragma unroll
  for (int step = 0; step < size / 16; ++step) {
    uint32_t b[4], rows[4];
    load_matrices(b, ring + at_step(offset, step));
    a.get(rows, step);
    multiply_add<T>(left, rows, b[0], b[1]);
    multiply_add<T>(right, rows, b[2], b[3]);
  }
}

// Sums (16 rows × size) += weights (16 × 16) · B.
template <class T, int size>
__device__ __forceinline__ void add_weighted(float (&sums)[size / 8][4], const float (&left)[4],
                                             const float (&right)[4], uint32_t ring,
                                             uint32_t offset) {
  const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                         pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
  for (int step = 0; step < size / 16; ++step) {
    uint32_t b[4];
    load_matrices_transposed(b, ring + at_step(offset, step));
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
  __device__ __forceinline__ void load(uint32_t tile, uint32_t offset) {
#pragma unroll
    for (int step = 0; step < size / 16; ++step)
      load_matrices(fragments_[step], tile + at_step(offset, step));
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = fragments_[step][i];
  }

 private:
  uint32_t fragments_[size / 16][4];
};

template <int size>
class TileFragments<size, false> {
 public:
  __device__ __forceinline__ void load(uint32_t tile, uint32_t offset) {
    tile_ = tile, offset_ = offset;
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int step) const {
    load_matrices(fragment, tile_ + at_step(offset_, step));
  }

 private:
  uint32_t tile_, offset_;
};

template <class Pass>
__global__ void __launch_bounds__(Shape<Pass::kSize, Pass::kMirrored>::kThreads,
                                  Pass::kBlocksPerProcessor)
    walk(const __grid_constant__ typename Pass::Arguments arguments,
         const __grid_constant__ Tables tables) {
  extern __shared__ __align__(1024) char memory[];
  using S = Shape<Pass::kSize, Pass::kMirrored>;
  const Problem& problem = arguments.problem;
  const Place place;
  const int tile = place.block * S::kWarps + place.warp;
  const TileRows rows{tables.rows, static_cast<uint32_t>(tile * kTileRows)};

  Ring<Pass> ring(arguments, tables, place, memory);
  const TileTokens<Pass::kSize> tokens(rows, place.lane);
  __syncthreads();  // the barriers have started
#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    copy_tile(shared_address(memory + Memory<Pass>::tile(i, place.warp)), arguments.rows[i], tokens,
              problem, place);
  commit_copies();
  ring.gather_first();
  Pass pass(arguments, rows, place);
  wait_for_copies();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    pass.tile[i].load(shared_address(memory + Memory<Pass>::tile(i, place.warp)),
                      swizzled<Pass::kSize>(place.lane % 16, place.lane / 16));
  pass.start();
  __syncthreads();  // the tiles' place is free

  // Indices, not pointers, which would take two registers each.
  const uint32_t base = shared_address(memory);
  uint32_t ready = tables.block_chunks[place.block] * S::kWarps + place.warp;
  uint32_t group = tables.group_starts[tile];
  uint32_t next = tables.entries[group * kGroup + place.lane], next_end = tables.group_ends[ready];
  Turn<S::kStages> turn;
  for (int left = ring.chunks; left > 0; --left, turn.advance()) {
    if (left > S::kAhead) ring.gather(turn);
    const uint32_t end = next_end;
    ready += S::kWarps;
    next_end = tables.group_ends[ready];  // after the last chunk comes a spare one
    ring.wait_for(turn);
    while (group < end) {
      const Group columns(next, place.lane);
      ++group;
      next = tables.entries[group * kGroup + place.lane];  // the tables end with a spare group
      pass.add(columns, base, memory + Memory<Pass>::kBeside);
    }
    ring.finish(turn);
  }
  const TileTokens<Pass::kSize> stored(rows, place.lane);
  __syncthreads();
  pass.store(memory + place.warp * kTileRows * S::kRowBytes, stored);
}

}  // namespace megatron_nuwa
