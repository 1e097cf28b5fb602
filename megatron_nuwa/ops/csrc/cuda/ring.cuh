// The ring in shared memory through which a block's columns pass, chunk by chunk.
#pragma once

#include "tiles.cuh"

namespace megatron_nuwa {

// What lies where in shared memory.
//
// Tiles wait in the ring's last stages, which fill up only after the tiles have gone to registers,
// or behind the ring where they are read again and again.
template <class Pass, bool is_large = kIsLarge>
struct Memory {
  using S = Shape<Pass, is_large>;
  static constexpr int kStages = S::kStages;
  static constexpr int kTensor = kStages * S::kChunk * S::kRowBytes;
  static constexpr int kBeside = 2 * kTensor;  // what goes with each column
  static constexpr int kColumnBytes = Pass::kMirrored ? sizeof(float2) : 1;
  static constexpr int kBarriers = (kBeside + kStages * S::kChunk * kColumnBytes + 255) / 256 * 256;
  static constexpr int kTiles = kBarriers + 256;
  static constexpr int kTileRowCount = Pass::kRowTensors * S::kWarps * kTileRows;
  // Stages in which tiles wait, and how many rows of one tensor those have.
  static constexpr int kTileStages =
      Pass::kInRegisters ? (kTileRowCount + 2 * S::kChunk - 1) / (2 * S::kChunk) : 0;
  static constexpr int kFree = kTileStages * S::kChunk;
  static constexpr int kBytes = kTiles + (Pass::kInRegisters ? 0 : kTileRowCount * S::kRowBytes);
  static_assert(S::kAhead <= kStages - (kTileStages > 2 ? kTileStages : 2));

  // A warp's tile of row tensor `i`.
  __device__ static __forceinline__ int tile(int i, int warp) {
    const int row = (i * S::kWarps + warp) * kTileRows;
    if constexpr (Pass::kInRegisters)
      return row / kFree * kTensor +
             ((kStages - kTileStages) * S::kChunk + row % kFree) * S::kRowBytes;
    return kTiles + row * S::kRowBytes;
  }
  // The barriers of a stage: its columns have come; all warps are done with the step that bears
  // the stage's number, and so with the chunk before.
  __device__ static __forceinline__ int full(int stage) { return kBarriers + 8 * stage; }
  __device__ static __forceinline__ int done(int stage) {
    return kBarriers + 8 * (kStages + stage);
  }
  // The barrier of all tiles: they have come.
  static constexpr int kTilesCame = kBarriers + 16 * kStages;
  static_assert(kTilesCame + 8 <= kTiles);
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

// The gathering side: two tensors' rows, and what goes with each column. It belongs to the threads
// that gather: all of them, or those of warps that do nothing else.
//
// Warps do not march in step: one may be a few steps ahead of another, as far as the ring reaches.
template <class Pass>
class Ring {
  using T = typename Pass::Element;
  using S = Shape<Pass>;
  using M = Memory<Pass>;
  using Turn = megatron_nuwa::Turn<S::kStages>;

 public:
  __device__ Ring(const typename Pass::Arguments& arguments, const Tables& tables,
                  const Place& place, char* memory)
      : problem_(arguments.problem), columns_(tables.columns), place_(place),
        first_{rows_of(arguments, place, 0)}, second_{rows_of(arguments, place, 1)},
        memory_(shared_address(memory)), is_seen_(memory + M::kBeside + first_slot()),
        target_(memory_ + swizzled<Pass::kSize>(first_slot(), segment())) {
    if constexpr (Pass::kMirrored)
      statistics_ = place.statistics(arguments.statistics, problem_, problem_.column_tokens);
    const int first = tables.block_chunks[place.block];
    chunks = tables.block_chunks[place.block + 1] - first;
    next_column_ = first * S::kChunk + first_slot();
    if (threadIdx.x < M::kStages) {
      // Where there is a mask, each warp says besides that it has written its part.
      start_barrier(memory_ + M::full(threadIdx.x),
                    S::kGatherers * (is_masked() ? 33 : 32));
      start_barrier(memory_ + M::done(threadIdx.x), S::kWarps);
    }
    if (threadIdx.x == M::kStages) start_barrier(memory_ + M::kTilesCame, 32 * S::kWarps);
  }

  // Ask for the numbers of the first chunks' columns.
  __device__ __forceinline__ void fetch_first() {
#pragma unroll
    for (int chunk = 0; chunk < kTogether; ++chunk)
      if (chunk < chunks) fetch(first_columns_[chunk]);
  }

  // Start copying the first chunks; all threads' barriers must have started.
  __device__ __forceinline__ void gather_first() {
#pragma unroll
    for (int chunk = 0; chunk < kTogether; ++chunk)
      if (chunk < chunks) copy(first_columns_[chunk], chunk);
#pragma unroll 1
    for (int chunk = kTogether; chunk < min(S::kAhead, chunks); ++chunk) {
      fetch(first_columns_[0]);
      copy(first_columns_[0], chunk);
    }
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

  // Copy all chunks after the first ones, each as soon as there is room.
  __device__ __forceinline__ void gather_rest() {
    Turn turn;
    for (int left = chunks - S::kAhead; left > 0; --left, turn.advance()) gather(turn);
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

  __device__ __forceinline__ bool is_masked() const {
    return !Pass::kMirrored && problem_.context_mask != nullptr;
  }

  __device__ __forceinline__ void arrive_for_warp(int barrier) const {
    __syncwarp();
    if (place_.lane == 0) arrive(memory_ + barrier);
  }

  // The numbers of the columns that this thread copies of the next chunk.
  __device__ __forceinline__ void fetch(int (&columns)[S::kPasses]) {
    const int32_t* const first = columns_ + next_column_;
#pragma unroll
    for (int pass = 0; pass < S::kPasses; pass += kAtOnce) {
      if constexpr (kAtOnce == 4) {
        const int4 four = *reinterpret_cast<const int4*>(first + pass);
        columns[pass] = four.x, columns[pass + 1] = four.y;
        columns[pass + 2] = four.z, columns[pass + 3] = four.w;
      } else {
        columns[pass] = first[pass * S::kStep];
      }
    }
    next_column_ += S::kChunk;
  }

  __device__ __forceinline__ void copy(const int (&columns)[S::kPasses], int stage) {
    if (is_masked()) copy<true>(columns, stage * S::kChunk);
    else copy<false>(columns, stage * S::kChunk);
    arrive_with_copies(memory_ + M::full(stage));
    if (is_masked()) arrive_for_warp(M::full(stage));
  }

  template <bool is_masked>
  __device__ __forceinline__ void copy(const int (&columns)[S::kPasses], int chunk) {
    // Masked rows are zeros, lest 0 · inf of a padding token spoil a sum; so are slots of no
    // column, which no group names.
    bool is_seen[S::kPasses];
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass)
      is_seen[pass] = columns[pass] >= 0 && (!is_masked || shows(columns[pass]));
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int column = max(columns[pass], 0), slot = chunk + pass * S::kStep;
      if constexpr (Pass::kMirrored) {
        if (segment() == 0)
          copy_async_8(memory_ + M::kBeside + (slot + first_slot()) * sizeof(float2),
                       statistics_ + column, is_seen[pass]);
      } else if constexpr (is_masked) {
        if (segment() == 0) is_seen_[slot] = is_seen[pass];
      }
      const uint32_t target =
          (target_ ^ turn_of<Pass::kSize>(pass * S::kStep)) + slot * S::kRowBytes;
      copy_async_16(target, first_[column], is_seen[pass]);
      copy_async_16(target + M::kTensor, second_[column], is_seen[pass]);
    }
  }

  __device__ __forceinline__ bool shows(int column) const {
    return problem_.context_mask[static_cast<int64_t>(place_.batch) * problem_.column_tokens +
                                 column];
  }

  __device__ static __forceinline__ int thread() {
    return static_cast<int>(threadIdx.x) - (S::kIsApart ? 32 * S::kWarps : 0);
  }
  // Of a chunk's columns the first that this thread copies, and which 16 bytes of them.
  __device__ static __forceinline__ int first_slot() {
    return thread() / S::kSegments * S::kFirst;
  }
  __device__ static __forceinline__ int segment() { return thread() % S::kSegments; }

  // First chunks whose numbers are on their way at once, as many as there are registers for.
  static constexpr int kTogether = S::kIsApart ? 1 : S::kAhead;
  // Columns' numbers that are read at once, where those of a thread lie side by side.
  static constexpr int kAtOnce = S::kStep == 1 ? 4 : 1;

  const Problem& problem_;
  const int32_t* const& columns_;
  const Place& place_;
  const Rows first_, second_;
  const uint32_t memory_;
  char* const is_seen_;
  const uint32_t target_;
  const float2* statistics_;
  uint32_t next_column_;
  int next_[S::kPasses], first_columns_[kTogether][S::kPasses];
};

}  // namespace megatron_nuwa
