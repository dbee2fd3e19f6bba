// Vectors of floats as wide as the CPU has them, and what kernels compute of them: exp, log, tanh, Mish, SimNorm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "core.h"

namespace cpu {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

typedef uint16_t bf16;

inline vf all(float x) { return x - vf{}; }  // less 0 and not plus: the compiler knows that for x itself
inline vf pick(vi which, vf a, vf b) { return which ? a : b; }
// A NaN in `x` stays, as in `torch.clamp`: the instructions return their second operand then.
#if defined(__AVX512F__)
inline vf least(vf x, vf most) { return (vf)_mm512_min_ps((__m512)most, (__m512)x); }
inline vf most(vf x, vf least) { return (vf)_mm512_max_ps((__m512)least, (__m512)x); }
#elif defined(__AVX__)
inline vf least(vf x, vf most) { return (vf)_mm256_min_ps((__m256)most, (__m256)x); }
inline vf most(vf x, vf least) { return (vf)_mm256_max_ps((__m256)least, (__m256)x); }
#else
inline vf least(vf x, vf most) { return pick(x > most, most, x); }
inline vf most(vf x, vf least) { return pick(x < least, least, x); }
#endif
inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(float x) { return x; }

inline vf widened(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

// To nearest, ties to even; a NaN stays one.
#if defined(__AVX512BF16__)
// A number too small to be a normal one becomes 0, which products take it for anyway.
inline vh narrowed(vf x) { return (vh)_mm512_cvtneps_pbh((__m512)x); }
#else
inline vh narrowed(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((vu)pick(x == x, (vf)rounded, (vf)quiet), vh);
}
#endif
inline vf rounded_to_bf16(vf x) { return widened(narrowed(x)); }

inline vf load(const float* p) { return *(const vf_any*)p; }
inline vf load(const bf16* p) { return widened(*(const vh_any*)p); }
inline void store(float* p, vf x) { *(vf_any*)p = x; }
inline void store(bf16* p, vf x) { *(vh_any*)p = narrowed(x); }

// The first `count` entries, zeros after them.
template <class T> inline vf load(const T* p, long count) {
  if (count >= W) return load(p);
  T x[W] = {};
  std::memcpy(x, p, count * sizeof(T));
  return load(x);
}
template <class T> inline void store(T* p, vf x, long count) {
  if (count >= W) return store(p, x);
  T y[W];
  store(y, x);
  std::memcpy(p, y, count * sizeof(T));
}
inline vf load(Tensor t, long i, long count) {
  return t.type == BF16 ? load(t.as<bf16>() + i, count) : load(t.as<float>() + i, count);
}
inline void store(Tensor t, long i, vf x, long count) {
  if (t.type == BF16) return store(t.as<bf16>() + i, x, count);
  store(t.as<float>() + i, x, count);
}
template <long N> using constant = std::integral_constant<long, N>;

// Calls f(i, count) for each vector of entries `first` to `last`; that all but the last are whole is known to the compiler.
template <class F> [[gnu::always_inline]] inline void each(long first, long last, F&& f) {
  for (; first + W <= last; first += W) f(first, constant<W>());
  if (first < last) f(first, last - first);
}
template <class F> [[gnu::always_inline]] inline void each(long count, F&& f) { each(0, count, f); }

inline float scalar(Tensor t, long i = 0) { return t.type == BF16 ? to_float(t.as<bf16>()[i]) : t.as<float>()[i]; }
inline void set(Tensor t, long i, float x) { store(t, i, all(x), 1); }

template <int... I> inline vf shuffled(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi{I...});
#endif
}
template <int S, int... I> inline vf flipped(vf x, std::integer_sequence<int, I...>) {
  return shuffled(x, x, std::integer_sequence<int, (I ^ S)...>());
}
// Lanes i and i ^ S change places.
template <int S> inline vf flip(vf x) { return flipped<(S < W ? S : 0)>(x, std::make_integer_sequence<int, W>()); }

template <int S, int... I> inline void exchange(vf& a, vf& b, std::integer_sequence<int, I...>) {
  vf first = shuffled(a, b, std::integer_sequence<int, (I & S ? W + (I ^ S) : I)...>());
  b = shuffled(a, b, std::integer_sequence<int, (I & S ? W + I : I ^ S)...>());
  a = first;
}
template <int S> inline void exchange(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & S)) exchange<S>(x[i], x[i + S], std::make_integer_sequence<int, W>());
}
// Transposes W vectors: bit by bit, the indices of vector and lane change places.
inline void transpose(vf* x) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W > 4) exchange<(W > 4 ? 4 : 1)>(x);
  if constexpr (W > 8) exchange<(W > 8 ? 8 : 1)>(x);
}

// In each group of `V` neighbouring lanes (a power of two, up to W), all lanes get the op over the group.
template <class Op> inline vf over_groups(vf x, long V, Op op) {
  if (V > 1) x = op(x, flip<1>(x));
  if (V > 2) x = op(x, flip<2>(x));
  if (V > 4) x = op(x, flip<4>(x));
  if (V > 8) x = op(x, flip<8>(x));
  return x;
}
inline vf larger(vf a, vf b) { return most(b, a); }
inline float sum(vf x) { return over_groups(x, W, [](vf a, vf b) { return a + b; })[0]; }
inline float largest(vf x) { return over_groups(x, W, larger)[0]; }

constexpr float TO_INTEGER = 12582912.0f;  // added to a number below 2^22, leaves no bits behind the point
inline vf rounded(vf x) { return (x + TO_INTEGER) - TO_INTEGER; }

// exp(x) = p 2^n. The last bits of `shifted` are those of n.
struct Power {
  vf p, n, shifted;
};
inline Power power(vf x) {  // |x| < 2^21
  vf shifted = x * 1.44269504088896341f + TO_INTEGER, n = shifted - TO_INTEGER;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r + 1.0f, n, shifted};
}

// Error below 1.1 ulp of the result; 0 below -104, inf above 88.73, NaN for NaN.
inline vf exp(vf x) {
  auto [p, n, shifted] = power(most(least(x, all(89.0f)), all(-104.0f)));
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi whole = (vi)((vu)shifted - 0x4b400000), half = whole >> 1;
  // In two steps: a result may be below the least normal number, and 2^128 is none.
  return p * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);
#endif
}

// For x up to 88, with less work; it may be 0 below -87.4, where results are no normal numbers.
inline vf exp_of_small(vf x) {
#if defined(__AVX512F__)
  auto [p, n, shifted] = power(most(x, all(-104.0f)));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  auto [p, n, shifted] = power(most(x, all(-88.0f)));
  return p * (vf)(((vu)shifted << 23) + (127u << 23));
#endif
}

// Error below 1.5 ulp; -inf for 0, NaN below 0.
inline vf log(vf x) {
  vi tiny = x < 1.17549435e-38f;
  vf scaled = pick(tiny, x * 8388608.0f, x);
  vi bits = (vi)scaled;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  vf e = __builtin_convertvector(((bits >> 23) & 0xff) - 126, vf) - pick(tiny, all(23.0f), vf{});
  vi low = m < 0.707106781186547524f;
  e = e - pick(low, all(1.0f), vf{});
  m = m + pick(low, m, vf{}) - 1.0f;
  vf z = m * m;
  vf p = all(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf y = p * m * z;
  y = y + e * -2.12194440e-4f - 0.5f * z;
  vf result = m + y + e * 0.693359375f;
  result = pick(x == all(INFINITY), x, result);
  result = pick(x == 0.0f, all(-INFINITY), result);
  return pick(x >= 0.0f, result, all(NAN));
}

// As device/arithmetic.py: by one exponential, near 0 by a polynomial.
inline vf tanh(vf x) {
  vf away = 1.0f - 2.0f / (exp(2.0f * magnitude(x)) + 1.0f);
  vf s = x * x;
  vf p = 2.06390887954e-2f - 5.70498872745e-3f * s;
  p = 1.33314422036e-1f + (p * s - 5.37397155531e-2f) * s;
  vf near = x + x * s * (p * s - 3.33332819422e-1f);
  vf signed_away = pick(x < 0.0f, -away, away);
  return pick(s < 0.390625f, near, signed_away);
}

[[gnu::always_inline]] inline vf mish(vf x) {
  vf e = exp_of_small(least(x, all(20.0f)));
  vf m = e * (e + 2.0f);
  return x * (m / (m + 2.0f));
}

// With w = m/(m+2), m = e(e+2), e = exp(x), it is w + x 4e(e+1)/(m+2)^2.
[[gnu::always_inline]] inline vf mish_gradient(vf x) {
  vf e = exp_of_small(least(x, all(20.0f)));
  vf m = e * (e + 2.0f);
  vf w = 1.0f / (m + 2.0f);
  return m * w + x * (4.0f * e * (e + 1.0f) * w) * w;
}

constexpr int MOST_GROUP = 64;  // columns of a SimNorm group

// The softmax of groups of V columns: V / W vectors where a group is wider than one, else one.
constexpr long vectors_of(long V) { return V > W ? V / W : 1; }

// Calls f(V, room): the official V is known to the compiler, so that room for its vectors need not be memory.
template <class F> inline void with_group(long V, F&& f) {
  if (V == 8) f(constant<8>(), constant<vectors_of(8)>());
  else f(V, constant<vectors_of(MOST_GROUP)>());
}

// As `each`, in steps of so many vectors, all whole where these are several.
template <class F> [[gnu::always_inline]] inline void each(long first, long last, long together, F&& f) {
  if (together == 1) return each(first, last, f);
  for (; first < last; first += W * together) f(first, constant<W>());
}

[[gnu::always_inline]] inline void simnorm(vf* x, long V) {
  long n = vectors_of(V);
  long lanes = V > W ? W : V;
  vf top = x[0];
  for (int i = 1; i < n; i++) top = larger(top, x[i]);
  top = over_groups(top, lanes, larger);
  vf total = {};
  for (int i = 0; i < n; i++) total = total + (x[i] = exp_of_small(x[i] - top));
  total = over_groups(total, lanes, [](vf a, vf b) { return a + b; });
  for (int i = 0; i < n; i++) x[i] = x[i] / total;
}

// Takes gradient d through the softmax whose result is p: p (d - sum p d).
[[gnu::always_inline]] inline void simnorm_gradient(vf* d, const vf* p, long V) {
  long n = vectors_of(V);
  vf total = {};
  for (int i = 0; i < n; i++) total = total + p[i] * d[i];
  total = over_groups(total, V > W ? W : V, [](vf a, vf b) { return a + b; });
  for (int i = 0; i < n; i++) d[i] = p[i] * (d[i] - total);
}

}  // namespace cpu
