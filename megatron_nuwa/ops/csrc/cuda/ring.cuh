// The ring in shared memory through which a block's columns pass, chunk by chunk.
#pragma once

#include "tiles.cuh"

namespace megatron_nuwa {

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

}  // namespace megatron_nuwa
