// Vector types of one instruction-set level, from the compiler's own vector extension; intrinsics
// only where the compiler would not find the instruction. Included by kernel files only, after
// SUBQUAD_ISA and SUBQUAD_VECTOR_BYTES are defined.
#ifndef SUBQUAD_KERNELS_VECTOR_INL
#define SUBQUAD_KERNELS_VECTOR_INL

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SUBQUAD_INLINE static inline __attribute__((always_inline))

namespace subquad {
namespace SUBQUAD_ISA {

template <class T>
struct vector_of;

template <>
struct vector_of<float> {
  using scalar_int = std::int32_t;
  typedef float type __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
  typedef float unaligned_type
      __attribute__((vector_size(SUBQUAD_VECTOR_BYTES), aligned(4), may_alias));
  typedef std::int32_t int_type __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
};

template <>
struct vector_of<double> {
  using scalar_int = std::int64_t;
  typedef double type __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
  typedef double unaligned_type
      __attribute__((vector_size(SUBQUAD_VECTOR_BYTES), aligned(8), may_alias));
  typedef std::int64_t int_type __attribute__((vector_size(SUBQUAD_VECTOR_BYTES)));
};

template <class T>
using vec = typename vector_of<T>::type;
template <class T>
using ivec = typename vector_of<T>::int_type;

// Number of T in a vector.
template <class T>
constexpr int lanes = SUBQUAD_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
SUBQUAD_INLINE vec<T> load(const T* p) {
  return *reinterpret_cast<const typename vector_of<T>::unaligned_type*>(p);
}

template <class T>
SUBQUAD_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename vector_of<T>::unaligned_type*>(p) = v;
}

template <class T>
SUBQUAD_INLINE vec<T> broadcast(T value) {
  return value - vec<T>{};  // value - 0 keeps every bit of value, a signed zero included
}

// Lane-wise maximum; where either operand is NaN the result is b. Compilers do not turn the
// comparison into the one instruction that means the same, so x86 names it: with a full mask,
// because GCC warns about an uninitialised value inside the plain form.
template <class T>
SUBQUAD_INLINE vec<T> max(vec<T> a, vec<T> b) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);
  } else {
    return (vec<T>)_mm512_maskz_max_pd((__mmask8)-1, (__m512d)a, (__m512d)b);
  }
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  } else {
    return (vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm_max_ps((__m128)a, (__m128)b);
  } else {
    return (vec<T>)_mm_max_pd((__m128d)a, (__m128d)b);
  }
#else
  return a > b ? a : b;
#endif
}

// Lane-wise minimum; where either operand is NaN the result is b.
template <class T>
SUBQUAD_INLINE vec<T> min(vec<T> a, vec<T> b) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm512_maskz_min_ps((__mmask16)-1, (__m512)a, (__m512)b);
  } else {
    return (vec<T>)_mm512_maskz_min_pd((__mmask8)-1, (__m512d)a, (__m512d)b);
  }
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  } else {
    return (vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
  }
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    return (vec<T>)_mm_min_ps((__m128)a, (__m128)b);
  } else {
    return (vec<T>)_mm_min_pd((__m128d)a, (__m128d)b);
  }
#else
  return a < b ? a : b;
#endif
}

}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_VECTOR_INL
