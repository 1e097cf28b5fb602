// The walk that all tensor-core kernels share: a block gathers its columns chunk by chunk into a
// ring in shared memory, and each of its warps computes 16 rows against 32 columns at a time, as
// the tables of warp_tables.py say. What is computed of a group is the pass's business.
#pragma once

#include "ring.cuh"

namespace megatron_nuwa {

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

// What a warp does that computes: its tile against all its groups.
template <class Pass>
__device__ __forceinline__ void compute(const typename Pass::Arguments& arguments,
                                        const Tables& tables, const Place& place,
                                        Ring<Pass>& ring, char* memory) {
  using S = Shape<Pass>;
  const Problem& problem = arguments.problem;
  const int tile = place.block * S::kWarps + place.warp;
  const TileRows rows{tables.rows, static_cast<uint32_t>(tile * kTileRows)};
  const TileTokens<Pass::kSize> tokens(rows, place.lane);
  if constexpr (!S::kIsApart) ring.fetch_first();
  __syncthreads();  // the barriers have started
#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    copy_tile(shared_address(memory + Memory<Pass>::tile(i, place.warp)), arguments.rows[i], tokens,
              problem, place);
  const uint32_t base = shared_address(memory);
  arrive_with_copies(base + Memory<Pass>::kTilesCame);
  if constexpr (!S::kIsApart) ring.gather_first();
  // What is needed next is asked for before the tiles are waited for. Indices, not pointers, which
  // would take two registers each.
  uint32_t ready = tables.block_chunks[place.block] * S::kWarps + place.warp;
  uint32_t group = tables.group_starts[tile];
  uint32_t next = tables.entries[group * kGroup + place.lane], next_end = tables.group_ends[ready];
  Pass pass(arguments, rows, place);
  wait_for_phase(base + Memory<Pass>::kTilesCame, 0);
#pragma unroll
  for (int i = 0; i < Pass::kRowTensors; ++i)
    pass.tile[i].load(shared_address(memory + Memory<Pass>::tile(i, place.warp)),
                      swizzled<Pass::kSize>(place.lane % 16, place.lane / 16));
  pass.start();
  __syncthreads();  // the tiles' place is free

  Turn<S::kStages> turn;
  for (int left = ring.chunks; left > 0; --left, turn.advance()) {
    if constexpr (!S::kIsApart)
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

template <class Pass>
__global__ void __launch_bounds__(Shape<Pass>::kThreads, Shape<Pass>::kLayout.blocks)
    walk(const __grid_constant__ typename Pass::Arguments arguments,
         const __grid_constant__ Tables tables) {
  extern __shared__ __align__(1024) char memory[];
  using S = Shape<Pass>;
  const Place place;
  Ring<Pass> ring(arguments, tables, place, memory);
  if (!S::kIsApart || place.warp < S::kWarps) {
    compute<Pass>(arguments, tables, place, ring, memory);
  } else {
    // The barriers of compute(), where a block's warps meet.
    ring.fetch_first();
    __syncthreads();
    ring.gather_first();
    __syncthreads();
    ring.gather_rest();
    __syncthreads();
  }
}

}  // namespace megatron_nuwa
