// Sixteen floats at a time, written once with AVX-512 and once in plain C++ for every other machine.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define WEFT_AVX512 1
#include <immintrin.h>
#else
#define WEFT_AVX512 0
#endif

namespace weft {

constexpr int LANES = 16;

#if WEFT_AVX512

using Floats = __m512;
inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const c10::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Floats load(const c10::BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(c10::BFloat16* p, Floats x) {  // to nearest, ties to even, as torch rounds
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
// The sums of four vectors at once. Every one is added up in the same order, wherever among the four it stands.
inline void sum_four(const Floats* a, float* out) {
  const Floats ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const Floats cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const Floats abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline float largest(Floats a) { return _mm512_reduce_max_ps(a); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
// e^x: 2^n times a polynomial on [-1/2, 1/2] (relative error 2e-7); 0 below -104, infinity above 89.
inline Floats exponential(Floats x) {
  const Floats bounded = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.0f)), _mm512_set1_ps(89.0f));
  const Floats scaled = _mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f));
  const Floats whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = _mm512_sub_ps(scaled, whole);
  Floats y = _mm512_set1_ps(1.54035304e-4f);
  for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, whole);
}

inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Splits 16 numbers, at most 32258 in size, into 254 high + low after rounding each to an integer; returns the integers' sum.
inline int32_t split(Floats x, int8_t* high, int8_t* low) {
  const __m512i code = _mm512_cvtps_epi32(x);
  const __m512i h = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(1.0f / 254.0f)));
  const __m512i l = _mm512_sub_epi32(code, _mm512_mullo_epi32(h, _mm512_set1_epi32(254)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(h));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(l));
  return _mm512_reduce_add_epi32(code);
}

// Rounds 16 numbers, at most 127 in size, to integers; returns their sum.
inline int32_t narrow(Floats x, int8_t* out) {
  const __m512i code = _mm512_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(code));
  return _mm512_reduce_add_epi32(code);
}

#else

inline void fetch(const void*) {}

struct Floats {
  float lane[LANES];
};
#define WEFT_LANES(expression)                                  \
  Floats r;                                                     \
  for (int i = 0; i < LANES; ++i) r.lane[i] = (expression);     \
  return r;
inline Floats zeros() { WEFT_LANES(0.0f) }
inline Floats all(float x) { WEFT_LANES(x) }
template <typename T>
inline Floats load(const T* p) { WEFT_LANES(static_cast<float>(p[i])) }
template <typename T>
inline void store(T* p, Floats x) {
  for (int i = 0; i < LANES; ++i) p[i] = static_cast<T>(x.lane[i]);
}
inline Floats fma(Floats a, Floats b, Floats c) { WEFT_LANES(a.lane[i] * b.lane[i] + c.lane[i]) }
inline Floats mul(Floats a, Floats b) { WEFT_LANES(a.lane[i] * b.lane[i]) }
inline Floats add(Floats a, Floats b) { WEFT_LANES(a.lane[i] + b.lane[i]) }
inline Floats divide(Floats a, Floats b) { WEFT_LANES(a.lane[i] / b.lane[i]) }
inline Floats max(Floats a, Floats b) { WEFT_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]) }
inline Floats abs(Floats a) { WEFT_LANES(std::fabs(a.lane[i])) }
inline Floats exponential(Floats x) { WEFT_LANES(std::exp(x.lane[i])) }
inline int32_t narrow(Floats x, int8_t* out) {
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) total += out[i] = static_cast<int8_t>(std::nearbyintf(x.lane[i]));
  return total;
}
inline int32_t split(Floats x, int8_t* high, int8_t* low) {
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) {
    const int32_t code = static_cast<int32_t>(std::nearbyintf(x.lane[i]));
    const int32_t h = static_cast<int32_t>(std::nearbyintf(static_cast<float>(code) * (1.0f / 254.0f)));
    high[i] = static_cast<int8_t>(h);
    low[i] = static_cast<int8_t>(code - 254 * h);
    total += code;
  }
  return total;
}
inline float sum(Floats a) {
  float total = 0.0f;
  for (float x : a.lane) total += x;
  return total;
}
inline void sum_four(const Floats* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
}
inline float largest(Floats a) {
  float most = a.lane[0];
  for (float x : a.lane) most = x > most ? x : most;
  return most;
}
#undef WEFT_LANES

#endif

// Calls `body` with a null pointer of the tensor's element type: float or bfloat16.
#define WEFT_DISPATCH(tensor, T, ...)                                                               \
  if ((tensor).scalar_type() == at::kFloat) {                                                       \
    using T = float;                                                                                \
    __VA_ARGS__                                                                                     \
  } else {                                                                                          \
    TORCH_CHECK((tensor).scalar_type() == at::kBFloat16, "float32 or bfloat16, not ", (tensor).dtype()); \
    using T = c10::BFloat16;                                                                        \
    __VA_ARGS__                                                                                     \
  }

}  // namespace weft
