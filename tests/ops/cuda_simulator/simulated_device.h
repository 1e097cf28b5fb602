// Enough of a CUDA device to run the kernels of csrc/cuda on a CPU, thread by thread.
//
// Every thread of a block is a fiber. A warp's collective instructions wait for all its lanes and
// then exchange operands as the hardware does, so that fragment layouts, swizzles and masks are
// tested as they are. Asynchronous copies spoil their target at once and write it only when they
// are waited for: a missing wait or a slot that is still being read gives NaN. What it cannot
// show: races within a warp, and anything about time.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include <ucontext.h>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace megatron_nuwa {

using std::max;
using std::min;

struct bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline Index threadIdx, blockIdx, blockDim;
constexpr int kSharedBytesLimit = 163 * 1024;  // of sm_80, the smaller
alignas(1024) inline char memory[kSharedBytesLimit];

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "simulated device: %s (block %u, thread %u)\n", what, blockIdx.x,
               threadIdx.x);
  std::abort();
}

// --- fibers ---------------------------------------------------------------------------------

struct Copy {
  uint32_t target;
  const char* source;
  int bytes;
  bool is_real;
};

struct Operands {
  const char* instruction;
  uint32_t words[6];
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  bool is_done;
  int warp_turns, block_turns;  // barriers passed
  std::vector<Copy> copies;  // that no barrier awaits yet
  Operands exchanged[2];
};

struct Device {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  unsigned current = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Device device;

inline void switch_to_scheduler() {
  Fiber& fiber = device.fibers[device.current];
  swapcontext(&fiber.context, &device.scheduler);
}

// Wait until every unfinished thread among [first, last) has passed as many barriers.
inline void meet(unsigned first, unsigned last, int Fiber::*turns) {
  const int turn = ++(device.fibers[device.current].*turns);
  for (;;) {
    bool all_here = true;
    for (unsigned i = first; i < last; ++i)
      all_here = all_here && (device.fibers[i].is_done || device.fibers[i].*turns >= turn);
    if (all_here) return;
    switch_to_scheduler();
  }
}

inline void __syncthreads() { meet(0, device.fibers.size(), &Fiber::block_turns); }

// Show this lane's operands to its warp; returns the operands of all its lanes.
struct Warp {
  unsigned first;
  int parity;
  const Operands& operator[](int lane) const {
    return device.fibers[first + lane].exchanged[parity];
  }
};

inline Warp exchange(const Operands& operands) {
  const unsigned first = device.current / 32 * 32;
  Fiber& fiber = device.fibers[device.current];
  const int turn = fiber.warp_turns + 1, parity = turn % 2;
  fiber.exchanged[parity] = operands;
  meet(first, first + 32, &Fiber::warp_turns);
  const Warp warp{first, parity};
  for (int lane = 0; lane < 32; ++lane)
    require(device.fibers[first + lane].warp_turns >= turn &&
                warp[lane].instruction == operands.instruction,
            "lanes of a warp meet at different instructions");
  return warp;
}

inline void __syncwarp() { exchange({"syncwarp", {}}); }

inline int lane_id() { return threadIdx.x % 32; }

template <class V>
V shuffle(const char* instruction, V value, int source) {
  static_assert(sizeof(V) == 4);
  Operands own{instruction, {}};
  std::memcpy(own.words, &value, 4);
  std::memcpy(&value, exchange(own)[source].words, 4);
  return value;
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return shuffle("shuffle xor", value, lane_id() ^ mask);
}
template <class V>
V __shfl_sync(unsigned, V value, int lane) {
  return shuffle("shuffle", value, lane);
}

inline uint32_t __ballot_sync(unsigned, bool vote) {
  const Warp warp = exchange({"ballot", {vote}});
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= warp[lane].words[0] << lane;
  return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

// --- copies and matrices ----------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - memory);
}

inline void copy_async(uint32_t target, const void* source, int bytes, bool is_real) {
  require(target % bytes == 0 && target + bytes <= kSharedBytesLimit, "copy misses shared memory");
  require(!is_real || reinterpret_cast<uintptr_t>(source) % bytes == 0, "copy is misaligned");
  std::memset(memory + target, 0xff, bytes);
  device.fibers[device.current].copies.push_back(
      {target, static_cast<const char*>(source), bytes, is_real});
}
inline void copy_async_16(uint32_t target, const void* source, bool is_real) {
  copy_async(target, source, 16, is_real);
}
inline void copy_async_8(uint32_t target, const void* source, bool is_real) {
  copy_async(target, source, 8, is_real);
}
inline void finish(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.is_real) std::memcpy(memory + copy.target, copy.source, copy.bytes);
    else std::memset(memory + copy.target, 0, copy.bytes);
  }
}

// --- barriers in shared memory ------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0, phase = 0;
  std::vector<std::vector<Copy>> awaited;  // copies whose threads arrive when they have come
};

inline std::map<uint32_t, Barrier> barriers;

inline Barrier& barrier_at(uint32_t address) {
  require(barriers.count(address), "a barrier is used before it has started");
  return barriers[address];
}
inline void start_barrier(uint32_t address, int expected) {
  require(address % 8 == 0 && address + 8 <= kSharedBytesLimit, "barrier misses shared memory");
  barriers[address] = {expected};
}
inline void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.phase;
}
inline void arrive(uint32_t address) { arrive(barrier_at(address)); }
inline void arrive_with_copies(uint32_t address) {
  Fiber& fiber = device.fibers[device.current];
  barrier_at(address).awaited.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
inline void wait_for_phase(uint32_t address, int parity) {
  for (;;) {
    Barrier& barrier = barrier_at(address);
    for (const std::vector<Copy>& copies : barrier.awaited) {
      finish(copies);
      arrive(barrier);
    }
    barrier.awaited.clear();
    if (barrier.phase % 2 != parity) return;
    switch_to_scheduler();
  }
}

inline uint16_t matrix_element(const Warp& warp, int matrix, int row, int column) {
  uint16_t value;
  std::memcpy(&value, memory + warp[8 * matrix + row].words[0] + 2 * column, 2);
  return value;
}

inline void load(uint32_t (&matrices)[4], uint32_t row_address, bool is_transposed) {
  require(row_address % 16 == 0 && row_address + 16 <= kSharedBytesLimit,
          "matrix row misses shared memory");
  const Warp warp = exchange({is_transposed ? "ldmatrix.trans" : "ldmatrix", {row_address}});
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int m = 0; m < 4; ++m) {
    const uint32_t low = is_transposed ? matrix_element(warp, m, 2 * t, g)
                                       : matrix_element(warp, m, g, 2 * t);
    const uint32_t high = is_transposed ? matrix_element(warp, m, 2 * t + 1, g)
                                        : matrix_element(warp, m, g, 2 * t + 1);
    matrices[m] = low | high << 16;
  }
}
inline void load_matrices(uint32_t (&matrices)[4], uint32_t row_address) {
  load(matrices, row_address, false);
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row_address) {
  load(matrices, row_address, true);
}

// Element k of a row of A, or of a column of B, from the registers `low` (k < 8) and `high`.
inline float element(const Warp& warp, int index, int k, int low, int high) {
  const uint32_t word = warp[4 * index + k % 8 / 2].words[k < 8 ? low : high];
  return widen(bf16{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
}

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Warp warp = exchange({"mma", {a[0], a[1], a[2], a[3], b0, b1}});
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 4; ++i)
      sum[i] += element(warp, g, k, i / 2, i / 2 + 2) * element(warp, 2 * t + i % 2, k, 4, 5);
}

template <class T>
uint32_t pack(float low, float high) {
  return rounded(low).bits | static_cast<uint32_t>(rounded(high).bits) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float inverse_fast(float x) { return 1 / x; }

template <class T>
float2 unpack(uint32_t word) {
  return {widen(bf16{static_cast<uint16_t>(word)}), widen(bf16{static_cast<uint16_t>(word >> 16)})};
}

// --- launches ---------------------------------------------------------------------------------

inline void fiber_body() {
  device.body(device.argument);
  device.fibers[device.current].is_done = true;
  switch_to_scheduler();
}

struct Blocks {
  int x, y = 1, z = 1;
};

template <class Kernel>
void run_kernel(Blocks blocks, unsigned threads, Kernel kernel) {
  device.fibers.resize(threads);
  device.body = [](void* argument) { (*static_cast<Kernel*>(argument))(); };
  device.argument = &kernel;
  blockDim.x = threads;
  const int64_t all = static_cast<int64_t>(blocks.x) * blocks.y * blocks.z;
  for (int64_t block = 0; block < all; ++block) {
    std::memset(memory, 0xff, sizeof(memory));
    barriers.clear();
    for (Fiber& fiber : device.fibers) {
      fiber.is_done = false;
      fiber.warp_turns = fiber.block_turns = 0;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_body, 0);
    }
    blockIdx.x = block % blocks.x;
    blockIdx.y = block / blocks.x % blocks.y;
    blockIdx.z = block / blocks.x / blocks.y;
    for (bool is_running = true; is_running;) {
      is_running = false;
      for (unsigned i = 0; i < threads; ++i) {
        if (device.fibers[i].is_done) continue;
        is_running = true;
        device.current = threadIdx.x = i;
        swapcontext(&device.scheduler, &device.fibers[i].context);
      }
    }
  }
}

}  // namespace megatron_nuwa
