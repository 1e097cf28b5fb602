// Vectors of LANES floats for the instruction set that this translation unit is compiled for.
// Arithmetic is GCC's and Clang's own on vector types; what they have no operator for is below.
// Everything has internal linkage: an inline function shared between translation units of
// different flags would end up as one copy, with instructions that some machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float Quad __attribute__((vector_size(16)));

struct bfloat16 {
  uint16_t bits;
};

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Ints load(const int32_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline Floats load(const bfloat16* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Round to nearest, ties to even; a NaN stays one.
inline void store(bfloat16* p, Floats x) {
  const Words bits = (Words)x;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (x == x) ? rounded : (Words{} + 0x7fc0u);
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

inline float sum(Floats x) {
  float lanes[LANES], total = 0;
  store(lanes, x);
  for (int i = 0; i < LANES; ++i) total += lanes[i];
  return total;
}

inline float maximum(Floats x) {
  float lanes[LANES];
  store(lanes, x);
  float best = lanes[0];
  for (int i = 1; i < LANES; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// The sums of four vectors, as the four lanes of one.
#if defined(__AVX512F__)
inline Quad sums(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const Floats cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const Floats abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
#elif defined(__AVX2__)
inline Quad sums(Floats a, Floats b, Floats c, Floats d) {
  const Floats ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const Floats cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const Floats abcd = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
  return _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1);
}
#else
inline Quad sums(Floats a, Floats b, Floats c, Floats d) {
  return Quad{sum(a), sum(b), sum(c), sum(d)};
}
#endif

// e^x to about 1 ulp by x = n ln 2 + r; 0 below the least normal float, NaN for NaN.
inline Floats exponential(Floats x) {
  constexpr float kLowest = -87.33654f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats clamped = (x < kLowest) ? broadcast(kLowest) : x;
  const Floats shifted = clamped * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Words power = ((Words)shifted << 23) + (127u << 23);
  const Floats result = p * (Floats)power;
  return (x < kLowest) ? Floats{} : result;
}

}  // namespace
