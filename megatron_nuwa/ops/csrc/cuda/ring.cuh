// The ring in shared memory through which a block's rows and columns pass, chunk by chunk, without
// a pause between one item and the next.
#pragma once

#include "tiles.cuh"

namespace megatron_nuwa {

// What lies where in shared memory.
template <class Pass, bool is_large = kIsLarge>
struct Memory {
  using S = Shape<Pass, is_large>;
  static constexpr int kStages = S::kStages;
  static constexpr int kStageBytes = S::kChunk * S::kRowBytes;
  static constexpr int kTensor = kStages * kStageBytes;
  static constexpr int kBeside = 2 * kTensor;  // what goes with each column
  static constexpr int kColumnBytes = Pass::kMirrored ? sizeof(float2) : 1;
  static constexpr int kEnds = kBeside + kStages * S::kChunk * kColumnBytes;  // of each warp's groups
  static constexpr int kBarriers = (kEnds + kStages * S::kWarps * 4 + 255) / 256 * 256;
  // Tiles that are read again and again, which a warp keeps for itself.
  static constexpr int kTiles = kBarriers + 256;
  static constexpr int kTileBytes = kTileRows * S::kRowBytes;
  static constexpr int kTeam =  // a team's share
      kTiles + (Pass::kInRegisters ? 0 : Pass::kRowTensors * S::kWarps * kTileBytes);
  static constexpr int kBytes = S::kTeams * kTeam;

  // A warp's tile of row tensor `i`.
  __device__ static __forceinline__ int tile(int i, int warp) {
    return kTiles + (i * S::kWarps + warp) * kTileBytes;
  }
  // One past the last group of a tile that is ready when a stage's chunk has come.
  __device__ static __forceinline__ int end(int stage, int tile) {
    return kEnds + 4 * (stage * S::kWarps + tile);
  }
  // The barriers of a stage: its chunk has come; all warps are done with the step that bears the
  // stage's number, and so with the chunk before.
  __device__ static __forceinline__ int full(int stage) { return kBarriers + 8 * stage; }
  __device__ static __forceinline__ int done(int stage) {
    return kBarriers + 8 * (kStages + stage);
  }
  static_assert(16 * kStages <= kTiles - kBarriers);
};

// The stage of a step, and whether the ring has been round an odd number of times before it.
template <int stages>
struct Turn {
  int stage = 0, phase = 0;

  __device__ __forceinline__ void advance(int steps = 1) {
    const bool is_round = stage >= stages - steps;
    stage += steps - (is_round ? stages : 0);
    phase ^= is_round;
  }
  __device__ __forceinline__ Turn before(int steps) const {
    const bool is_round = stage < steps;
    return {stage - steps + (is_round ? stages : 0), phase ^ is_round};
  }
};

// How many of its lanes say for a warp that all are done: one, and all of them in a build for
// racecheck, which does not know that __syncwarp orders what the others did before what that one does.
#ifdef MEGATRON_NUWA_TRACED
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif

__device__ __forceinline__ void arrive_for_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < kArrivals) arrive(barrier);
}

// The side of the warps that compute. They do not march in step: one may be a few steps ahead of
// another, as far as the ring reaches.
template <class Pass>
class Ring {
  using S = Shape<Pass>;
  using M = Memory<Pass>;

 public:
  using Turn = megatron_nuwa::Turn<S::kStages>;

  __device__ static __forceinline__ bool is_masked(const Problem& problem) {
    return !Pass::kMirrored && problem.context_mask != nullptr;
  }

  __device__ static __forceinline__ void start(const Problem& problem, uint32_t memory) {
    const int team = threadIdx.x / M::kStages, stage = threadIdx.x % M::kStages;
    if (team >= S::kTeams) return;
    // A chunk is one warp's, which says besides, where there is a mask, that it has written it.
    start_barrier(memory + team * M::kTeam + M::full(stage),
                  32 + (is_masked(problem) ? kArrivals : 0));
    start_barrier(memory + team * M::kTeam + M::done(stage), S::kWarps * kArrivals);
  }

  __device__ __forceinline__ explicit Ring(uint32_t memory) : memory_(memory) {}

  __device__ __forceinline__ void wait_for(const Turn& turn) const {
    wait_for_phase(memory_ + M::full(turn.stage), turn.phase);
  }

  // This warp will not read the chunk before this one any more.
  __device__ __forceinline__ void finish(const Turn& turn) const {
    arrive_for_warp(memory_ + M::done(turn.stage));
  }

 private:
  const uint32_t memory_;
};

// A place in the sequence of all chunks that a team gathers: an item's rows, then its columns, then
// the next item.
template <class Pass>
class Cursor {
  using S = Shape<Pass>;

 public:
  __device__ __forceinline__ Cursor(const Problem& problem, const Tables& tables, int team,
                                    int chunk)
      : problem_(problem), tables_(tables), item_(problem, tables, team) {
    begin();
    advance(chunk);
  }

  __device__ __forceinline__ bool is_there() const { return item_.is_there(); }
  __device__ __forceinline__ void advance(int chunks) {
    place += chunks;
    while (is_there() && first_ + place >= end_) {
      const int beyond = first_ + place - end_;
      item_.advance();
      begin();
      place = beyond;
    }
  }
  // Among the chunks of the tables.
  __device__ __forceinline__ int chunk() const { return first_ + place; }
  __device__ __forceinline__ bool is_of_rows() const { return place < S::kRowChunks; }

  int place;  // among the chunks of the item
  // Where the item's rows and columns begin, in rows of one head.
  int64_t first_row, first_column;
  // Where what belongs to its columns begins, one a column; and where that does not depend on heads.
  int64_t first_statistic, first_masked;

 private:
  __device__ __forceinline__ void begin() {
    place = 0;
    if (!is_there()) return;
    const int block = item_.block(), head = item_.head(), batch = item_.batch();
    first_ = tables_.block_chunks[block], end_ = tables_.block_chunks[block + 1];
    first_row = static_cast<int64_t>(batch) * problem_.row_tokens * problem_.heads + head;
    first_masked = static_cast<int64_t>(batch) * problem_.column_tokens;
    first_column = first_masked * problem_.heads + head;
    first_statistic = (static_cast<int64_t>(batch) * problem_.heads + head) * problem_.column_tokens;
  }

  const Problem& problem_;
  const Tables& tables_;
  Item item_;
  int first_, end_;
};

// The side of the warps that gather, which take turns: two tensors' rows, and what goes with each
// column.
template <class Pass>
class Gatherer {
  using T = typename Pass::Element;
  using S = Shape<Pass>;
  using M = Memory<Pass>;
  using Turn = typename Ring<Pass>::Turn;

 public:
  __device__ __forceinline__ Gatherer(const typename Pass::Arguments& arguments,
                                      const Tables& tables, char* memory, int team, int warp)
      : arguments_(arguments), tables_(tables), memory_(shared_address(memory)),
        beside_(memory + M::kBeside), lane_(hidden_lane()),
        cursor_(arguments.problem, tables, team, warp) {
    turn_.advance(warp);
  }

  // All chunks of all items that are this warp's, each as soon as there is room.
  __device__ __forceinline__ void gather() {
    fetch();
    while (cursor_.is_there()) {
      copy();
      turn_.advance(S::kGatherers);
    }
  }

 private:
  static constexpr int kWords = (S::kChunk + 31) / 32;
  static constexpr int kSegments = S::kSegments, kAtOnce = 32 / kSegments;
  static_assert(S::kGatherers <= S::kStages && S::kWarps <= 32 && S::kChunk % kAtOnce == 0);

  // Of the columns that are copied at once the one of this lane, and which 16 bytes of it.
  __device__ __forceinline__ int column() const { return lane_ / kSegments; }
  __device__ __forceinline__ int segment() const { return lane_ % kSegments; }
  // Whether a chunk has so many columns.
  __device__ __forceinline__ bool has(int column) const {
    return S::kChunk % 32 == 0 || column < S::kChunk;
  }

  // The numbers of the columns under the cursor, one or a few a lane.
  __device__ __forceinline__ void fetch() {
    if (!cursor_.is_there()) return;
    const int32_t* const first = tables_.columns + cursor_.chunk() * S::kChunk;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const int column = 32 * word + lane_;
      numbers_[word] = has(column) ? first[column] : -1;
    }
  }

  // Where this lane's 16 bytes of a head's first row, or column, lie.
  __device__ __forceinline__ const char* start_of(const T* tensor, int64_t first) const {
    const char* start = reinterpret_cast<const char*>(tensor) + first * S::kRowBytes + 16 * segment();
    hide(start);  // lest each column's address be put together from parts
    return start;
  }

  __device__ __forceinline__ void copy() {
    const Problem& problem = arguments_.problem;
    const bool are_rows = cursor_.is_of_rows(), is_masked = Ring<Pass>::is_masked(problem);
    const T *tensor = arguments_.columns[0], *next_tensor = arguments_.columns[1];
#pragma unroll
    for (int pair = 0; pair < S::kPairs; ++pair)
      if (cursor_.place / S::kPairChunks == pair) {
        tensor = arguments_.rows[2 * pair];
        next_tensor = 2 * pair + 1 < Pass::kRowSources ? arguments_.rows[2 * pair + 1] : nullptr;
      }
    const bool has_next = next_tensor != nullptr;
    const int64_t first = are_rows ? cursor_.first_row : cursor_.first_column;
    const char* const start = start_of(tensor, first);
    const char* const next_start = start_of(next_tensor, first);
    const int32_t* const ends = tables_.group_ends + cursor_.chunk() * S::kWarps;
    const bool* const mask = problem.context_mask + cursor_.first_masked;
    const float2* statistics = nullptr;
    if constexpr (Pass::kMirrored) statistics = arguments_.statistics + cursor_.first_statistic;

    // Of each column, in 16 bytes, how far from the first one it lies in its tensor, and is it there?
    // Masked columns are zeros, lest 0 · inf of a padding token spoil a sum; so are slots of nothing,
    // which no group names.
    uint32_t far[kWords], is_real[kWords];
    int numbers[kWords];
    bool is_seen[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      numbers[word] = max(numbers_[word], 0);
      is_seen[word] = numbers_[word] >= 0;
      if (is_masked && !are_rows) is_seen[word] &= mask[numbers[word]];
      is_real[word] = __ballot_sync(kAllLanes, is_seen[word]) >> column();
      far[word] = numbers[word] * (problem.heads * kSegments);
    }
    // The next ones are on their way while these are copied.
    cursor_.advance(S::kGatherers);
    fetch();

    // No warp reads what lies there: the last step that may is the one after that chunk's own. Of a
    // barrier that has just started, the phase before counts as ended.
    const Turn last = turn_.before(S::kStages - 1);
    wait_for_phase(memory_ + M::done(last.stage), last.phase);
    const int stage = turn_.stage, slot = stage * S::kChunk;
    if (!are_rows) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const int own = 32 * word + lane_;
        if (!has(own)) continue;
        if constexpr (Pass::kMirrored)
          copy_async_8(memory_ + M::kBeside + (slot + own) * sizeof(float2),
                       statistics + numbers[word], is_seen[word]);
        else if (is_masked) beside_[slot + own] = is_seen[word];
      }
      if (lane_ < S::kWarps) copy_async_4(memory_ + M::end(stage, lane_), ends + lane_);
    }
    const uint32_t target = memory_ + swizzled<Pass::kSize>(slot + column(), segment());
#pragma unroll
    for (int i = 0; i < S::kChunk; i += kAtOnce) {
      const uint64_t bytes =
          static_cast<uint64_t>(__shfl_sync(kAllLanes, far[i / 32], i % 32 + column())) * 16;
      const bool is_there = is_real[i / 32] >> i % 32 & 1;
      const uint32_t to = (target ^ turn_of<Pass::kSize>(i)) + i * S::kRowBytes;
      copy_async_16(to, start + bytes, is_there);
      if (has_next) copy_async_16(to + M::kTensor, next_start + bytes, is_there);
    }
    arrive_with_copies(memory_ + M::full(stage));
    if (is_masked) arrive_for_warp(memory_ + M::full(stage));
  }

  const typename Pass::Arguments& arguments_;
  const Tables& tables_;
  const uint32_t memory_;
  char* const beside_;
  const int lane_;
  Cursor<Pass> cursor_;
  Turn turn_;
  int numbers_[kWords];
};

}  // namespace megatron_nuwa
