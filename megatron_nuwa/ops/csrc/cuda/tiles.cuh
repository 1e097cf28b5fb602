// What the kernels' tables, shapes and places are, and how tiles of 16 rows are read and written.
#pragma once

#include "primitives.cuh"

namespace megatron_nuwa {

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kRegistersAPart = 512;  // for each of a warp's lanes

// Whether a multiprocessor has the shared memory of compute capability 9.0.
#if defined(MEGATRON_NUWA_SMALL) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
constexpr bool kIsLarge = false;
#else
constexpr bool kIsLarge = true;
#endif

// WarpTables of warp_tables.py, and the schedule of schedule.py, one item a team and round.
struct Tables {
  const int32_t* block_chunks;
  const int32_t* columns;
  const int32_t* rows;
  const int32_t* group_starts;
  const int32_t* group_ends;
  const uint32_t* entries;
  const uint32_t* schedule;
  int32_t blocks;
  int32_t teams;  // of all multiprocessors
};

// Tensors are (batch, tokens, heads, size); "rows" are what tiles are made of, "columns" what is
// gathered: queries and keys, or the other way round in the mirrored pass.
struct Problem {
  int32_t batch;
  int32_t heads;
  int32_t row_tokens;
  int32_t column_tokens;
  float scale;
  const bool* context_mask;  // (batch, context tokens), or null
};

// What a pass sums: outputs, the gradient of queries, those of keys and values.
enum class Sums { kOutputs, kQueryGradients, kContextGradients };

// How a pass is spread over a multiprocessor. Its teams of warps know nothing of one another; each
// takes items of its own.
struct Layout {
  int teams;
  int warps;      // of a team that compute
  int gatherers;  // and that do nothing but gather
  int chunk;      // columns that are gathered at once
  int stages;     // of the ring
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
  const int teams = size > 64 ? 1 : 2, chunk = size > 64 ? 32 : 64;
  // Sums of two gradients take so many registers that there is room for fewer warps.
  const bool is_wide = sums == Sums::kContextGradients && size == 64;
  if (!is_large) return {teams, is_wide ? 5 : 7, 1, chunk, 4, 16};
  if (is_wide) return {teams, 6, 2, chunk, 6, 16};
  return {teams, 8, 4 / teams, chunk, size == 64 ? 7 : 6, size > 64 ? 16 : 32};
}

// What follows from a pass's layout.
template <class Pass, bool is_large = kIsLarge>
struct Shape {
  static constexpr int kSize = Pass::kSize;
  static constexpr Layout kLayout = layout_of(Pass::kSums, kSize, is_large);
  static constexpr int kWarps = kLayout.warps;
  static constexpr int kGatherers = kLayout.gatherers;
  // Teams are parts of one block of threads, which may take registers from one another, or blocks of
  // their own, of which a small device holds fewer.
  static constexpr int kTeams = is_large ? kLayout.teams : 1;
  static constexpr int kBlocks = is_large ? 1 : kLayout.teams;
  static constexpr int kComputing = 32 * kTeams * kWarps;  // threads
  static constexpr int kThreads = kComputing + 32 * kTeams * kGatherers;
  // Where each of a multiprocessor's four parts has as many warps of either kind as the others,
  // those that compute take registers from those that gather, on devices that can. Together they
  // have no more than at the start, when all have the same number, a multiple of eight.
  static constexpr bool kCanTake =
      is_large && kTeams * kWarps % 4 == 0 && kTeams * kGatherers % 4 == 0;
  static constexpr int kGathererRegisters = 32;
  static constexpr int kAtStart = kRegistersAPart / (kThreads / 128) / 8 * 8 * (kThreads / 128);
  static constexpr int kRegisters =
      kCanTake
          ? (kAtStart - kGathererRegisters * (kTeams * kGatherers / 4)) / (kTeams * kWarps / 4) / 8 * 8
          : 0;
  static constexpr int kRowBytes = 2 * kSize;
  static constexpr int kSegments = kRowBytes / 16;
  static constexpr int kChunk = kLayout.chunk, kStages = kLayout.stages;
  // Rows come before the columns, two tensors at a time, in so many chunks.
  static constexpr int kPairs = (Pass::kRowSources + 1) / 2;
  static constexpr int kPairChunks = (kWarps * kTileRows + kChunk - 1) / kChunk;
  static constexpr int kRowChunks = kPairs * kPairChunks;
  // A tile lies in one chunk; a table's entry has 16 bits for a place.
  static_assert(kChunk % kTileRows == 0 && kStages > 2);
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

// A block of the tables for one head of one batch item, of which a team works at one a round. The
// next one's number is on its way meanwhile.
class Item {
 public:
  __device__ __forceinline__ Item(const Problem& problem, const Tables& tables, int team)
      : problem_(problem), tables_(tables), place_(team * gridDim.x + blockIdx.x),
        number_(tables.schedule[place_]) {
    look_ahead();
  }

  // What the schedule names must be one of this problem's; its -1 is the largest number of all.
  __device__ __forceinline__ bool is_there() const {
    return number_ < static_cast<uint32_t>(tables_.blocks * problem_.heads * problem_.batch);
  }
  __device__ __forceinline__ void advance() {
    number_ = next_;
    look_ahead();
  }
  // The same, of which the compiler knows nothing, so that it need not keep what it found before.
  __device__ __forceinline__ Item again() const {
    Item same = *this;
    hide(same.number_);
    return same;
  }
  __device__ __forceinline__ int head() const { return number_ % problem_.heads; }
  __device__ __forceinline__ int block() const { return number_ / problem_.heads % tables_.blocks; }
  __device__ __forceinline__ int batch() const { return number_ / problem_.heads / tables_.blocks; }

 private:
  // The schedule ends with two spare rounds.
  __device__ __forceinline__ void look_ahead() {
    place_ += tables_.teams;
    next_ = tables_.schedule[place_];
  }

  const Problem& problem_;
  const Tables& tables_;
  uint32_t place_, number_, next_;
};

// A thread's lane; the compiler would rather ask the hardware again each time, which takes long.
__device__ __forceinline__ int hidden_lane() {
  uint32_t lane = threadIdx.x % 32;
  hide(lane);
  return lane;
}

// Everything a warp that computes needs to know of its place.
struct Place {
  int lane, tile, block, head, batch;

  __device__ __forceinline__ Place(const Item& item, int tile, int lane)
      : lane(lane), tile(tile), block(item.block()), head(item.head()), batch(item.batch()) {}

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

// Lane t of four, which holds word t of four segments, gets the words of segment t.
__device__ __forceinline__ uint4 transposed(const uint32_t (&words)[4], int lane) {
  const bool is_odd = lane & 1, is_high = lane & 2;
  uint32_t pairs[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t even = words[2 * i], odd = words[2 * i + 1];
    const uint32_t other = __shfl_xor_sync(kAllLanes, is_odd ? even : odd, 1);
    pairs[i][0] = is_odd ? other : even;
    pairs[i][1] = is_odd ? odd : other;
  }
  uint32_t others[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    others[i] = __shfl_xor_sync(kAllLanes, is_high ? pairs[0][i] : pairs[1][i], 2);
  if (is_high) return {others[0], others[1], pairs[1][0], pairs[1][1]};
  return {pairs[0][0], pairs[0][1], others[0], others[1]};
}

// A tile's accumulators to global memory, 16 bytes a lane.
template <int size, class T>
__device__ __forceinline__ void store_tile(T* tensor, const float (&sums)[size / 8][4],
                                           const TileRows& rows, const Problem& problem,
                                           const Place& place) {
  const int64_t first_row =
      static_cast<int64_t>(place.batch) * problem.row_tokens * problem.heads + place.head;
  char* const target =
      reinterpret_cast<char*>(tensor) + first_row * (2 * size) + 16 * (place.lane % 4);
  const int stride = problem.heads * (2 * size);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = rows[place.lane / 4 + 8 * half];
    char* const row = target + static_cast<int64_t>(max(token, 0)) * stride;
#pragma unroll
    for (int first = 0; first < size / 8; first += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = pack<T>(sums[first + i][2 * half], sums[first + i][2 * half + 1]);
      const uint4 segment = transposed(words, place.lane);
      if (token >= 0) *reinterpret_cast<uint4*>(row + 16 * first) = segment;
    }
  }
}

}  // namespace megatron_nuwa
