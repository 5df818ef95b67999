// What device code is written in: nvcc's own words, or those of the host executor that stands in
// for them where a plain C++ compiler reads the same files.
#ifndef SUBQUAD_CUDA_DEVICE_CUH
#define SUBQUAD_CUDA_DEVICE_CUH

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define SUBQUAD_DEVICE __device__ __forceinline__
#define SUBQUAD_HOST_DEVICE __host__ __device__ __forceinline__
#define SUBQUAD_UNROLL _Pragma("unroll")
#define SUBQUAD_NO_UNROLL _Pragma("unroll 1")
// By the value of a constant of that name.
#define SUBQUAD_UNROLL_BY(constant) SUBQUAD_PRAGMA(unroll constant)
#define SUBQUAD_PRAGMA(text) _Pragma(#text)
#else
#include "cuda_on_host/executor.hpp"
#define SUBQUAD_DEVICE inline
#define SUBQUAD_HOST_DEVICE inline
#define SUBQUAD_UNROLL
#define SUBQUAD_NO_UNROLL
#define SUBQUAD_UNROLL_BY(constant)
#endif

namespace subquad::cuda {

inline constexpr int kWarp = 32;

// Storage of 16 bits; arithmetic is in float.
struct float16 {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

// The type that elements of type S are added and exponentiated in.
template <class S>
struct arithmetic {
  using type = float;
};
template <>
struct arithmetic<double> {
  using type = double;
};
template <class S>
using arithmetic_t = typename arithmetic<S>::type;

SUBQUAD_DEVICE float as_float(std::uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  return on_host::bits_as<float>(bits);
#endif
}
SUBQUAD_DEVICE std::uint32_t as_bits(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  return on_host::bits_as<std::uint32_t>(value);
#endif
}

SUBQUAD_DEVICE float widen(float value) { return value; }
SUBQUAD_DEVICE double widen(double value) { return value; }
SUBQUAD_DEVICE float widen(bfloat16 value) {
  return as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
SUBQUAD_DEVICE float widen(float16 value) {
#if defined(__CUDACC__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return on_host::from_float16(value.bits);
#endif
}

// The tf32 value nearest to x (11 significant bits, ties away from zero), as the bits of a float.
SUBQUAD_DEVICE std::uint32_t round_to_tf32(float x) {
#if defined(__CUDACC__)
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return on_host::round_to_tf32(x);
#endif
}

// 2^x: in float within 2 ulp of the result, 0 below 2^-126.
SUBQUAD_DEVICE float power_of_2(float x) {
#if defined(__CUDACC__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return on_host::power_of_2(x);
#endif
}
SUBQUAD_DEVICE double power_of_2(double x) { return exp2(x); }

template <class T>
SUBQUAD_HOST_DEVICE constexpr T infinity() {
  return std::numeric_limits<T>::infinity();
}
template <class T>
inline constexpr T kLog2E = T(1.44269504088896340736);
template <class T>
inline constexpr T kLn2 = T(0.69314718055994530942);

// Copies of 4, 8 or 16 bytes from global to shared memory that run behind the arithmetic, both
// addresses aligned to that size. Bytes from `valid` on are written as zeros, and their source is
// not read. A thread's copies are there for it after wait_copies, for others after a barrier too.
template <int kBytes>
SUBQUAD_DEVICE void copy_async(void* shared, const void* global, int valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDACC__)
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  on_host::copy_async(shared, global, kBytes, valid);
#endif
}

// Closes the group of the copies since the last one.
SUBQUAD_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  on_host::commit_copies();
#endif
}

// Waits for all groups but the last `kPending`.
template <int kPending>
SUBQUAD_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  on_host::wait_copies(kPending);
#endif
}

// One warp's d += a b on tensor cores. With g = lane / 4 and t = lane % 4, a lane holds
//   m16n8k8  (tf32): a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g)
//   m16n8k16 (16 bits): pairs of neighbours in k, a (g, 2t), (g + 8, 2t), (g, 2t + 8),
//                       (g + 8, 2t + 8); b (2t, g), (2t + 8, g)
//   d of both: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//   m8n8k4   (float64): a (g, t); b (t, g); d (g, 2t), (g, 2t + 1)
SUBQUAD_DEVICE void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  on_host::mma_tf32(d, a, b);
#endif
}
SUBQUAD_DEVICE void mma_float16(float (&d)[4], const std::uint32_t (&a)[4],
                                const std::uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  on_host::mma_float16(d, a, b);
#endif
}
SUBQUAD_DEVICE void mma_bfloat16(float (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  on_host::mma_bfloat16(d, a, b);
#endif
}
SUBQUAD_DEVICE void mma_float64(double (&d)[2], double a, double b) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
#else
  on_host::mma_float64(d, a, b);
#endif
}

// Publishes what the calling thread has written before, by a flag that another block waits for.
SUBQUAD_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
#if defined(__CUDACC__)
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#else
  *flag = value;
#endif
}

// Waits until a flag is not 0; what was written before it was set can be read then.
SUBQUAD_DEVICE void wait_until_set(const std::uint32_t* flag) {
#if defined(__CUDACC__)
  std::uint32_t value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  } while (value == 0);
#else
  on_host::require_set(*flag != 0);
#endif
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_DEVICE_CUH
