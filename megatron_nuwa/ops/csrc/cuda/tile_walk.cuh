// The walk that all tensor-core kernels share: warps that gather bring rows and columns chunk by
// chunk into a ring in shared memory, and each of the others computes 16 rows against 32 columns at
// a time, as the tables of warp_tables.py say. What is computed of a group is the pass's business.
//
// Blocks of threads stay on their multiprocessor and take one item after another, so that the next
// one's chunks are on their way while this one is computed and stored.
#pragma once

#include "ring.cuh"

namespace megatron_nuwa {

// One group's columns as a lane sees them; all lanes of a warp ask together.
class Group {
 public:
  // `start` is where in the ring of so many bytes the item's first chunk lies.
  __device__ __forceinline__ Group(uint32_t entry, uint32_t start, uint32_t ring_bytes, int lane)
      : visible_(entry >> 16), lane_(lane) {
    const uint32_t row = (entry & 0xffff) + start;
    row_ = min(row, row - ring_bytes);  // unsigned: the second is huge before the ring's end
  }

  // Which of this lane's scores are to be seen: bit 4 · octet + i of the octet's accumulator i.
  __device__ __forceinline__ uint32_t visible() const { return visible_; }

  // The same without the columns that the context mask hides.
  template <int row_bytes>
  __device__ __forceinline__ uint32_t visible(const char* is_seen) const {
    const uint32_t shown = __ballot_sync(kAllLanes, is_seen[row_ / row_bytes]);
    uint32_t of_lane = 0;
#pragma unroll
    for (int octet = 0; octet < kGroup / 8; ++octet) {
      const uint32_t two = shown >> (8 * octet + 2 * (lane_ % 4)) & 3;
      of_lane |= (two | two << 2) << 4 * octet;
    }
    return visible() & of_lane;
  }

  __device__ __forceinline__ int lane() const { return lane_; }

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
    return __shfl_sync(kAllLanes, row_, column);
  }
  const uint32_t visible_;
  uint32_t row_;
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

// B of 16 columns as the rows of a product, in registers.
template <class T, int size>
class Weighted {
 public:
  __device__ __forceinline__ Weighted(uint32_t ring, uint32_t offset) {
#pragma unroll
    for (int step = 0; step < size / 16; ++step)
      load_matrices_transposed(b_[step], ring + at_step(offset, step));
  }
  // Sums (16 rows × size) += weights (16 × 16) · B.
  __device__ __forceinline__ void add(float (&sums)[size / 8][4], const float (&left)[4],
                                      const float (&right)[4]) const {
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
    for (int step = 0; step < size / 16; ++step) {
      multiply_add<T>(sums[2 * step], a, b_[step][0], b_[step][1]);
      multiply_add<T>(sums[2 * step + 1], a, b_[step][2], b_[step][3]);
    }
  }

 private:
  uint32_t b_[size / 16][4];
};

// The fragments of a tile's rows: kept in registers, or read again from the warp's own place in
// shared memory for each group where registers are short.
template <int size, bool in_registers>
class TileFragments;

template <int size>
class TileFragments<size, true> {
 public:
  __device__ __forceinline__ void load(const char* rows, char*, int lane) {
    const uint32_t offset = shared_address(rows) + swizzled<size>(lane % 16, lane / 16);
#pragma unroll
    for (int step = 0; step < size / 16; ++step)
      load_matrices(fragments_[step], at_step(offset, step));
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
  __device__ __forceinline__ void load(const char* rows, char* own, int lane) {
    offset_ = shared_address(own) + swizzled<size>(lane % 16, lane / 16);
    // All lanes are done with the tile before, as each said when its last step was. The first slots
    // have the same turn.
#pragma unroll
    for (int byte = 0; byte < kTileRows * 2 * size; byte += 16 * 32)
      *reinterpret_cast<uint4*>(own + byte + 16 * lane) =
          *reinterpret_cast<const uint4*>(rows + byte + 16 * lane);
    __syncwarp();
  }
  __device__ __forceinline__ void get(uint32_t (&fragment)[4], int step) const {
    load_matrices(fragment, at_step(offset_, step));
  }

 private:
  uint32_t offset_;
};

// A warp's tile of each row tensor, in the chunks that bring them.
template <class Pass>
__device__ __forceinline__ void take_rows(Pass& pass, const Place& place, const Ring<Pass>& ring,
                                          typename Ring<Pass>::Turn& turn, char* memory,
                                          const TileRows& rows, int warp) {
  using S = Shape<Pass>;
  using M = Memory<Pass>;
  const int first = place.tile * kTileRows;
#pragma unroll
  for (int pair = 0; pair < S::kPairs; ++pair)
#pragma unroll 1
    for (int chunk = 0; chunk < S::kPairChunks; ++chunk, turn.advance()) {
      ring.wait_for(turn);
      if (chunk == first / S::kChunk) {
        const char* const here =
            memory + turn.stage * M::kStageBytes + first % S::kChunk * S::kRowBytes;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int tensor = 2 * pair + i;
          if (tensor < Pass::kRowTensors)
            pass.tile[tensor].load(here + i * M::kTensor, memory + M::tile(tensor, warp),
                                   place.lane);
          if constexpr (Pass::kRowSources > Pass::kRowTensors)
            if (tensor == Pass::kRowTensors) pass.take(here + i * M::kTensor, place, rows);
        }
      }
      ring.finish(turn);
    }
}

// Rows of a warp's tile.
template <class Pass>
__device__ __forceinline__ TileRows rows_of(const Tables& tables, const Place& place) {
  return {tables.rows,
          static_cast<uint32_t>((place.block * Shape<Pass>::kWarps + place.tile) * kTileRows)};
}

// What a warp does that computes: its tile of each item against all its groups.
template <class Pass>
__device__ __forceinline__ void compute(const typename Pass::Arguments& arguments,
                                        const Tables& tables, char* memory, int team, int warp) {
  using S = Shape<Pass>;
  using M = Memory<Pass>;
  const uint32_t base = shared_address(memory);
  const Ring<Pass> ring(base);
  typename Ring<Pass>::Turn turn;
  const int lane = hidden_lane();
  // A block's tiles see ever fewer columns. Whoever had much to do has little the next time.
  int tile = warp;
#pragma unroll 1
  for (Item item(arguments.problem, tables, team); item.is_there();
       item.advance(), tile = S::kWarps - 1 - tile) {
    const Place place(item, tile, lane);
    const uint32_t start = turn.stage * M::kStageBytes;
    int left = tables.block_chunks[place.block + 1] - tables.block_chunks[place.block];
    // Indices, not pointers, which would take two registers each.
    uint32_t group = tables.group_starts[place.block * S::kWarps + tile];
    uint32_t entry = tables.entries[group * kGroup + lane];
    const TileRows rows = rows_of<Pass>(tables, place);
    Pass pass(arguments, place, rows);
    take_rows(pass, place, ring, turn, memory, rows, warp);
#pragma unroll 1
    for (left -= S::kRowChunks; left > 0; --left, turn.advance()) {
      ring.wait_for(turn);
      const uint32_t end = *reinterpret_cast<const uint32_t*>(memory + M::end(turn.stage, tile));
#pragma unroll 1
      while (group < end) {
        const Group columns(entry, start, M::kTensor, lane);
        ++group;
        entry = tables.entries[group * kGroup + lane];  // the tables end with a spare group
        pass.add(columns, base, memory + M::kBeside);
      }
      ring.finish(turn);
    }
    const Place same(item.again(), tile, lane);
    pass.store(same, rows_of<Pass>(tables, same));
  }
}

template <class Pass>
__global__ void __launch_bounds__(Shape<Pass>::kThreads, Shape<Pass>::kBlocks)
    walk(const __grid_constant__ typename Pass::Arguments arguments,
         const __grid_constant__ Tables tables) {
  extern __shared__ __align__(1024) char memory[];
  using S = Shape<Pass>;
  Ring<Pass>::start(arguments.problem, shared_address(memory));
  __syncthreads();  // the barriers have started
  // As the warps of a team follow one another, those that compute first.
  // The shuffle lets the compiler know that all lanes have the same number.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (warp < S::kTeams * S::kWarps) {
    if constexpr (S::kCanTake) take_registers<S::kRegisters>();
    const int team = warp / S::kWarps;
    compute<Pass>(arguments, tables, memory + team * Memory<Pass>::kTeam, team, warp % S::kWarps);
  } else {
    if constexpr (S::kCanTake) give_registers<S::kGathererRegisters>();
    const int gatherer = warp - S::kTeams * S::kWarps, team = gatherer / S::kGatherers;
    Gatherer<Pass>(arguments, tables, memory + team * Memory<Pass>::kTeam, team,
                   gatherer % S::kGatherers)
        .gather();
  }
}

}  // namespace megatron_nuwa
