// Blocks of channels in vector registers, and the arithmetic on them. Nothing here knows torch.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MDPLUG_BYTES 64
#elif defined(__AVX__)
#define MDPLUG_BYTES 32
#else
#define MDPLUG_BYTES 16
#endif
#define MDPLUG_INLINE inline __attribute__((always_inline))

namespace MDPLUG_ISA {

template <class T>
struct Native {
  static constexpr int width = MDPLUG_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(MDPLUG_BYTES)));
  typedef T unaligned __attribute__((vector_size(MDPLUG_BYTES), aligned(sizeof(T)), may_alias));
};

// C channels of type T.
template <class T, int C>
struct Block {
  using V = typename Native<T>::type;
  using U = typename Native<T>::unaligned;
  static constexpr int W = Native<T>::width, NV = C / W;
  static_assert(NV >= 1 && NV * W == C, "a block is a whole number of registers");
  V v[NV];

  static MDPLUG_INLINE Block zero() {
    Block b;
    for (int i = 0; i < NV; ++i) b.v[i] = V{};
    return b;
  }
  static MDPLUG_INLINE Block load(const T* p) {
    Block b;
    for (int i = 0; i < NV; ++i) b.v[i] = *reinterpret_cast<const U*>(p + i * W);
    return b;
  }
  MDPLUG_INLINE void store(T* p) const {
    for (int i = 0; i < NV; ++i) *reinterpret_cast<U*>(p + i * W) = v[i];
  }
  // The first `count` channels, the rest zero.
  static MDPLUG_INLINE Block load(const T* p, int count) {
    if (count >= C) return load(p);
    T buffer[C] = {};
    std::memcpy(buffer, p, sizeof(T) * count);
    return load(buffer);
  }
  MDPLUG_INLINE void store(T* p, int count) const {
    if (count >= C) return store(p);
    T buffer[C];
    store(buffer);
    std::memcpy(p, buffer, sizeof(T) * count);
  }
  MDPLUG_INLINE void add(const Block& a) {
    for (int i = 0; i < NV; ++i) v[i] += a.v[i];
  }
  MDPLUG_INLINE void fma(T s, const Block& a) {
    for (int i = 0; i < NV; ++i) v[i] += s * a.v[i];
  }
  MDPLUG_INLINE void fma(const Block& a, const Block& b) {
    for (int i = 0; i < NV; ++i) v[i] += a.v[i] * b.v[i];
  }
  MDPLUG_INLINE Block operator*(const Block& a) const {
    Block b;
    for (int i = 0; i < NV; ++i) b.v[i] = v[i] * a.v[i];
    return b;
  }
  // Lane by lane; apart from what it is added to, or that sum would wait for each register in turn.
  MDPLUG_INLINE V dot(const Block& a) const {
    V sum = v[0] * a.v[0];
    for (int i = 1; i < NV; ++i) sum += v[i] * a.v[i];
    return sum;
  }
  MDPLUG_INLINE Block operator*(T s) const {
    Block b;
    for (int i = 0; i < NV; ++i) b.v[i] = v[i] * s;
    return b;
  }
};

// Sum over the lanes of a register, always in the same order.
template <class T>
MDPLUG_INLINE T lanes(typename Native<T>::type a) {
  constexpr int W = Native<T>::width;
  T x[W];
  std::memcpy(x, &a, sizeof a);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}

// Lane sums of four registers.
template <class T>
MDPLUG_INLINE void four_lane_sums(const typename Native<T>::type* a, T* out) {
  for (int i = 0; i < 4; ++i) out[i] = lanes<T>(a[i]);
}
#if defined(__AVX__)
#if defined(__AVX512F__)
MDPLUG_INLINE __m256 halved(Native<float>::type a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
MDPLUG_INLINE __m256d halved(Native<double>::type a) {
  return _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
}
#else
MDPLUG_INLINE __m256 halved(Native<float>::type a) { return a; }
MDPLUG_INLINE __m256d halved(Native<double>::type a) { return a; }
#endif
template <>
MDPLUG_INLINE void four_lane_sums<float>(const Native<float>::type* a, float* out) {
  const __m256 x = _mm256_hadd_ps(halved(a[0]), halved(a[1])), y = _mm256_hadd_ps(halved(a[2]), halved(a[3]));
  const __m256 z = _mm256_hadd_ps(x, y);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
}
template <>
MDPLUG_INLINE void four_lane_sums<double>(const Native<double>::type* a, double* out) {
  const __m256d x = _mm256_hadd_pd(halved(a[0]), halved(a[1])), y = _mm256_hadd_pd(halved(a[2]), halved(a[3]));
  _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(x, y, 0x20), _mm256_permute2f128_pd(x, y, 0x31)));
}
#endif

// Lane sums of `count` registers, `count` a multiple of four.
template <class T>
MDPLUG_INLINE void lane_sums(const typename Native<T>::type* a, int count, T* out) {
  for (int i = 0; i < count; i += 4) four_lane_sums<T>(a + i, out + i);
}

// Memory in whole lines of cache, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : p_(static_cast<T*>(std::aligned_alloc(64, (sizeof(T) * n + 127) / 64 * 64))) {
    if (!p_) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(p_); }
  T* data() { return p_; }

 private:
  T* p_;
};

}  // namespace MDPLUG_ISA
