// Enough of a CUDA device to run the kernels of csrc/cuda on a CPU, thread by thread.
//
// Every thread of a block is a fiber. A warp's collective instructions wait for all its lanes and
// then exchange operands as the hardware does, so that fragment layouts, swizzles and masks are
// tested as they are. Asynchronous copies spoil their target at once and write it only when they
// are waited for. Every access to shared memory is held against all earlier ones (races.h): two
// that nothing orders are reported, whichever came first this time, and so are barriers that not
// all threads reach, or that threads of a warp reach in different places (block.h).
//
// This is a check of the sources on a CPU, not of what nvcc makes of them. What it cannot show: races
// in global memory, those on a path that no test takes, and anything about time.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>

// What Python calls; all else is the library's own.
#define MEGATRON_NUWA_EXPORTED __attribute__((visibility("default")))

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

// --- 16-bit numbers ---------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float widen(fp16 value) {
  // 2^112 turns the narrow exponent's bias into the wide one's, that of denormals as well.
  const uint32_t magnitude = value.bits & 0x7fff;
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00) bits |= 0x7f800000;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x8000) << 16);
}

// The nearest T, of two as near the even one.
template <class T>
T rounded(float value);

template <>
inline bf16 rounded<bf16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline fp16 rounded<fp16>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  if (std::isnan(value)) return {0x7fff};
  uint32_t half = 0x7c00;
  if (magnitude < 0x38800000)  // denormal: next to 0.5, an fp32 number has just its digits
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  else if (magnitude < 0x477ff000)
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000))};
}

template <class T>
uint32_t pack(float low, float high) {
  return rounded<T>(low).bits | static_cast<uint32_t>(rounded<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t word) {
  return {widen(T{static_cast<uint16_t>(word)}), widen(T{static_cast<uint16_t>(word >> 16)})};
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float inverse_fast(float x) { return 1 / x; }

// --- threads and their warps --------------------------------------------------------------------

constexpr int kSharedBytesLimit = 227 * 1024;
alignas(1024) extern char memory[kSharedBytesLimit];
extern Index threadIdx, blockIdx, blockDim, gridDim;

// End the simulation: whoever called failure_of() is told why.
[[noreturn]] void fail(const std::string& what);
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// Where in the kernels' source an instruction stands that threads execute together.
using Site = std::source_location;

void __syncthreads(Site at = Site::current());
void __syncwarp(Site at = Site::current());

inline int lane_id() { return threadIdx.x % 32; }

inline void hide(uint32_t&) {}
inline void hide(const char*&) {}
template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

// What lane `source` of this warp shows; all lanes ask together.
uint32_t shuffle(const char* instruction, unsigned mask, uint32_t value, int source, Site at);

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lanes, Site at = Site::current()) {
  const auto word = std::bit_cast<uint32_t>(value);
  return std::bit_cast<V>(shuffle("shuffle xor", mask, word, lane_id() ^ lanes, at));
}
template <class V>
V __shfl_sync(unsigned mask, V value, int lane, Site at = Site::current()) {
  return std::bit_cast<V>(shuffle("shuffle", mask, std::bit_cast<uint32_t>(value), lane, at));
}

uint32_t __ballot_sync(unsigned mask, bool vote, Site at = Site::current());
inline bool __any_sync(unsigned mask, bool vote, Site at = Site::current()) {
  return __ballot_sync(mask, vote, at) != 0;
}

// --- copies, barriers in shared memory, and matrices --------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - memory);
}

void copy_async_16(uint32_t target, const void* source, bool is_real);
void copy_async_4(uint32_t target, const void* source);
void copy_async_8(uint32_t target, const void* source, bool is_real);

void start_barrier(uint32_t address, int expected);
void arrive(uint32_t address);
void arrive_with_copies(uint32_t address);
void wait_for_phase(uint32_t address, int parity, Site at = Site::current());

void load_matrices(uint32_t (&matrices)[4], uint32_t row_address, Site at = Site::current());
void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row_address,
                              Site at = Site::current());

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site at = Site::current());

// --- launches ---------------------------------------------------------------------------------

// How blocks run from now on: at 0 all threads take turns; at another seed, as it falls out, some
// warps get as far ahead of others as the kernels let them.
void set_pace(uint32_t seed);

struct Blocks {
  int x, y = 1, z = 1;
};

void run_blocks(Blocks blocks, unsigned threads, void (*body)(void*), void* argument);

template <class Kernel>
void run_kernel(Blocks blocks, unsigned threads, Kernel kernel) {
  run_blocks(
      blocks, threads, [](void* argument) { (*static_cast<Kernel*>(argument))(); }, &kernel);
}

// Run what may fail(); null, or what it said, which holds until the next call.
const char* failure_of(void (*body)(const void*), const void* argument);

}  // namespace megatron_nuwa
