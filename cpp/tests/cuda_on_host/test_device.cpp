// The words of device.cuh as the host executor has them, against their definitions: PTX's manual,
// and IEEE 754.
#include "cuda/device.cuh"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda/launch.cuh"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/guarded.hpp"

namespace subquad::cuda {
namespace {

using on_host::device_array;
using on_host::executor_error;

constexpr float kInf = std::numeric_limits<float>::infinity();

bool same_bits(float a, float b) { return as_bits(a) == as_bits(b); }

// ---- roundings ----------------------------------------------------------------------------------

// Multiples of the unit of 11 significant bits, ties away from zero.
long double rounded_to_tf32(float x) {
  const int exponent = x == 0 ? -126 : std::max(std::ilogb(x), -126);
  const long double unit = std::ldexp(1.0L, exponent - 10);
  return std::round(static_cast<long double>(x) / unit) * unit;
}

void check_tf32(float x) {
  const std::uint32_t bits = round_to_tf32(x);
  const float got = as_float(bits);
  if (x != x) {
    SUBQUAD_CHECK(got != got);
    return;
  }
  const float expected =
      std::isinf(x) ? x : static_cast<float>(rounded_to_tf32(x));  // overflows to infinity
  const bool right = (bits & 0x1fff) == 0 && same_bits(got, expected);
  SUBQUAD_CHECK(right);
  if (!right) std::printf("x = %a: %a, expected %a\n", x, got, expected);
}

void test_tf32() {
  std::mt19937 random(1);
  for (int i = 0; i < 300000; ++i) check_tf32(as_float(static_cast<std::uint32_t>(random())));
  // Every exponent, at and beside ties, and at the ends of the mantissa.
  for (std::uint32_t exponent = 0; exponent < 256; ++exponent) {
    for (const std::uint32_t high : {0u, 1u, 2u, 511u, 512u, 1022u, 1023u}) {
      for (const std::uint32_t low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu}) {
        const std::uint32_t bits = exponent << 23 | high << 13 | low;
        check_tf32(as_float(bits));
        check_tf32(as_float(bits | 0x80000000u));
      }
    }
  }
  SUBQUAD_CHECK(as_float(round_to_tf32(std::numeric_limits<float>::max())) == kInf);
  // The parts of a split are within 2^-11 and 2^-22 of it, the first rounding with the sign of the
  // rest.
  std::normal_distribution<float> normal;
  for (int i = 0; i < 100000; ++i) {
    const float x = normal(random);
    const float high = as_float(round_to_tf32(x));
    const float low = as_float(round_to_tf32(x - high));
    SUBQUAD_CHECK(std::fabs(x - high) <= std::ldexp(std::fabs(x), -11));
    SUBQUAD_CHECK(std::fabs((x - high) - low) <= std::ldexp(std::fabs(x), -22));
  }
}

// The bits of the float that a pattern of binary16 stands for.
std::uint32_t widened_float16(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  std::uint32_t exponent = bits >> 10 & 31;
  std::uint32_t mantissa = bits & 1023;
  if (exponent == 31) return sign | 0x7f800000u | mantissa << 13;
  if (exponent == 0) {
    if (mantissa == 0) return sign;
    exponent = 1;
    for (; !(mantissa & 1024); mantissa <<= 1) --exponent;
    mantissa &= 1023;
  }
  return sign | (exponent + 112) << 23 | mantissa << 13;
}

void test_widening() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float expected = as_float(widened_float16(bits));
    const float got = widen(float16{static_cast<std::uint16_t>(bits)});
    SUBQUAD_CHECK(expected != expected ? got != got : same_bits(got, expected));

    const float wide = widen(bfloat16{static_cast<std::uint16_t>(bits)});
    SUBQUAD_CHECK(as_bits(wide) == bits << 16);
    const int exponent = static_cast<int>(bits >> 7 & 255);
    const int mantissa = static_cast<int>(bits & 127);
    if (exponent == 255) {
      SUBQUAD_CHECK(mantissa ? wide != wide : std::fabs(wide) == kInf);
    } else {
      const long double magnitude =
          std::ldexp(static_cast<long double>(exponent ? 128 + mantissa : mantissa),
                     std::max(exponent, 1) - 134);
      SUBQUAD_CHECK(wide == (bits >> 15 ? -magnitude : magnitude));
    }
  }
  // A few that need no formula.
  SUBQUAD_CHECK(widen(float16{0x3c00}) == 1 && widen(float16{0xc000}) == -2);
  SUBQUAD_CHECK(widen(float16{0x7bff}) == 65504 && widen(float16{0x0001}) == 0x1p-24f);
  SUBQUAD_CHECK(widen(float16{0x0400}) == 0x1p-14f && widen(float16{0x3555}) == 0x1.554p-2f);
  SUBQUAD_CHECK(widen(bfloat16{0x3f80}) == 1 && widen(bfloat16{0xc040}) == -3);
  SUBQUAD_CHECK(widen(0.1f) == 0.1f && widen(0.1) == 0.1);
}

template <class T>
void check_power(T x, int ulps) {
  const long double expected = std::exp2(static_cast<long double>(x));
  const T got = power_of_2(x);
  const T nearest = static_cast<T>(expected);
  const long double ulp = std::nextafter(nearest, std::numeric_limits<T>::infinity()) - nearest;
  SUBQUAD_CHECK(std::fabs(got - expected) <= ulps * ulp);
}

void test_power() {
  std::mt19937 random(2);
  std::uniform_real_distribution<float> wide(-126, 128);
  std::uniform_real_distribution<float> narrow(-2, 2);
  for (int i = 0; i < 100000; ++i) {
    check_power(wide(random), 2);
    check_power(narrow(random), 2);
    check_power<double>(8 * wide(random), 2);
  }
  SUBQUAD_CHECK(power_of_2(0.0f) == 1 && power_of_2(-0.0f) == 1 && power_of_2(10.0f) == 1024);
  SUBQUAD_CHECK(power_of_2(1e-40f) == 1 && power_of_2(-1e-40f) == 1);
  SUBQUAD_CHECK(power_of_2(-126.0f) == 0x1p-126f && power_of_2(127.0f) == 0x1p127f);
  // Below the smallest normal number there is nothing.
  SUBQUAD_CHECK(power_of_2(-126.01f) == 0 && power_of_2(-140.0f) == 0);
  SUBQUAD_CHECK(power_of_2(-kInf) == 0 && power_of_2(-3e38f) == 0);
  SUBQUAD_CHECK(power_of_2(128.0f) == kInf && power_of_2(kInf) == kInf);
  SUBQUAD_CHECK(std::isnan(power_of_2(std::numeric_limits<float>::quiet_NaN())));
  SUBQUAD_CHECK(power_of_2(-1074.0) == 0x1p-1074 && power_of_2(1024.0) == infinity<double>());
  SUBQUAD_CHECK(power_of_2(-infinity<double>()) == 0);
  SUBQUAD_CHECK(std::isnan(power_of_2(std::numeric_limits<double>::quiet_NaN())));
}

// ---- products on tensor cores -------------------------------------------------------------------

// Where the manual's fragments lie: element i of a lane's fragment is (row, column) of its matrix.
struct position {
  int row;
  int column;
};
struct layout {
  int rows;
  int depth;
  int columns;
  int of_a;  // elements that a lane holds
  int of_b;
  int of_d;
  position (*a)(int lane, int i);
  position (*b)(int lane, int i);
  position (*d)(int lane, int i);
};

// "Matrix fragments for mma.m16n8k8" with .tf32.
constexpr layout kTf32 = {
    16,
    8,
    8,
    4,
    2,
    4,
    [](int lane, int i) -> position {
      return {i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8,
              i == 0 || i == 1 ? lane % 4 : lane % 4 + 4};
    },
    [](int lane, int i) -> position { return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2}; },
    [](int lane, int i) -> position {
      return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
    }};
// "Matrix fragments for mma.m16n8k16 with floating point type", .f16 and .bf16.
constexpr layout k16Bits = {16,
                            16,
                            8,
                            8,
                            4,
                            4,
                            [](int lane, int i) -> position {
                              const bool is_upper = (i >= 0 && i < 2) || (i >= 4 && i < 6);
                              return {is_upper ? lane >> 2 : (lane >> 2) + 8,
                                      i < 4 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8};
                            },
                            [](int lane, int i) -> position {
                              return {i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8,
                                      lane >> 2};
                            },
                            kTf32.d};
// "Matrix fragments for mma.m8n8k4 with .f64".
constexpr layout kFloat64 = {
    8,
    4,
    8,
    1,
    1,
    2,
    [](int lane, int) -> position { return {lane >> 2, lane % 4}; },
    [](int lane, int) -> position { return {lane % 4, lane >> 2}; },
    [](int lane, int i) -> position { return {lane >> 2, lane % 4 * 2 + (i & 1)}; }};

struct tf32_words {
  static constexpr layout kLayout = kTf32;
  using number = float;
  using element = std::uint32_t;
  static element from(int x) { return as_bits(static_cast<float>(x)); }
  static void multiply(float (&d)[4], const element* a, const element* b) {
    mma_tf32(d, *reinterpret_cast<const std::uint32_t (*)[4]>(a),
             *reinterpret_cast<const std::uint32_t (*)[2]>(b));
  }
};
// Two to a register, the lower one first.
template <std::uint16_t (*bits_of)(int x),
          void (*mma)(float (&)[4], const std::uint32_t (&)[4], const std::uint32_t (&)[2])>
struct words_16 {
  static constexpr layout kLayout = k16Bits;
  using number = float;
  using element = std::uint16_t;
  static element from(int x) { return bits_of(x); }
  static void multiply(float (&d)[4], const element* a, const element* b) {
    const auto pair = [](const element* at) {
      return static_cast<std::uint32_t>(at[0]) | static_cast<std::uint32_t>(at[1]) << 16;
    };
    mma(d, {pair(a), pair(a + 2), pair(a + 4), pair(a + 6)}, {pair(b), pair(b + 2)});
  }
};
// Of integers below 2048.
std::uint16_t float16_of(int x) {
  if (x == 0) return 0;
  const int exponent = std::ilogb(x);
  const int mantissa = std::abs(x) << (10 - exponent) & 1023;
  return static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 15) << 10 | mantissa);
}
std::uint16_t bfloat16_of(int x) {
  return static_cast<std::uint16_t>(as_bits(static_cast<float>(x)) >> 16);
}
using float16_words = words_16<float16_of, mma_float16>;
using bfloat16_words = words_16<bfloat16_of, mma_bfloat16>;
struct float64_words {
  static constexpr layout kLayout = kFloat64;
  using number = double;
  using element = double;
  static element from(int x) { return x; }
  static void multiply(double (&d)[2], const element* a, const element* b) {
    mma_float64(d, *a, *b);
  }
};

template <class Words>
struct one_product {
  static constexpr int kThreads = 64;  // two warps, which do not meet
  struct shared_memory {};
  using element = typename Words::element;
  using number = typename Words::number;

  const element* a;
  const element* b;
  number* d;  // of each warp, added to

  void operator()(shared_memory&) const {
    constexpr layout kLayout = Words::kLayout;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    number* out = d + static_cast<int>(threadIdx.x) / 32 * kLayout.rows * kLayout.columns;
    element own_a[kLayout.of_a];
    element own_b[kLayout.of_b];
    number own_d[kLayout.of_d];
    for (int i = 0; i < kLayout.of_a; ++i) {
      const position at = kLayout.a(lane, i);
      own_a[i] = a[at.row * kLayout.depth + at.column];
    }
    for (int i = 0; i < kLayout.of_b; ++i) {
      const position at = kLayout.b(lane, i);
      own_b[i] = b[at.row * kLayout.columns + at.column];
    }
    for (int i = 0; i < kLayout.of_d; ++i) {
      const position at = kLayout.d(lane, i);
      own_d[i] = out[at.row * kLayout.columns + at.column];
    }
    Words::multiply(own_d, own_a, own_b);
    for (int i = 0; i < kLayout.of_d; ++i) {
      const position at = kLayout.d(lane, i);
      out[at.row * kLayout.columns + at.column] = own_d[i];
    }
  }
};

// Integers whose products and sums are exact.
template <class Words>
void test_product() {
  using element = typename Words::element;
  using number = typename Words::number;
  constexpr layout kLayout = Words::kLayout;
  std::mt19937 random(3);
  std::uniform_int_distribution<int> integers(-15, 15);
  for (int round = 0; round < 20; ++round) {
    std::vector<int> a(static_cast<std::size_t>(kLayout.rows * kLayout.depth));
    std::vector<int> b(static_cast<std::size_t>(kLayout.depth * kLayout.columns));
    const device_array<element> a_words({kLayout.rows, kLayout.depth}, dtype::uint8);
    const device_array<element> b_words({kLayout.depth, kLayout.columns}, dtype::uint8);
    const device_array<number> d({2, kLayout.rows, kLayout.columns});
    for (std::size_t i = 0; i < a.size(); ++i) {
      a_words[static_cast<std::int64_t>(i)] = Words::from(a[i] = integers(random));
    }
    for (std::size_t i = 0; i < b.size(); ++i) {
      b_words[static_cast<std::int64_t>(i)] = Words::from(b[i] = integers(random));
    }
    for (number& each : d) each = static_cast<number>(100 * integers(random));
    const std::vector<number> before(d.begin(), d.end());
    launch(1, one_product<Words>{a_words.begin(), b_words.begin(), d.begin()});
    for (int i = 0; i < 2 * kLayout.rows * kLayout.columns; ++i) {
      const int row = i / kLayout.columns % kLayout.rows;
      const int column = i % kLayout.columns;
      int sum = static_cast<int>(before[static_cast<std::size_t>(i)]);
      for (int k = 0; k < kLayout.depth; ++k) {
        sum += a[static_cast<std::size_t>(row * kLayout.depth + k)] *
               b[static_cast<std::size_t>(k * kLayout.columns + column)];
      }
      SUBQUAD_CHECK(d[i] == static_cast<number>(sum));
    }
  }
}

// One number of the matrices set, the rest zeros.
struct tf32_special {
  static constexpr int kThreads = 32;
  struct shared_memory {};
  std::uint32_t a;
  std::uint32_t b;
  float d;
  float* out;

  void operator()(shared_memory&) const {
    const bool is_first = threadIdx.x == 0;
    float sum[4] = {d, d, d, d};
    mma_tf32(sum, {is_first ? a : 0u, 0, 0, 0}, {is_first ? b : 0u, 0});
    if (is_first) out[0] = sum[0];
  }
};

float special_product(std::uint32_t a, std::uint32_t b, float d) {
  const device_array<float> out({1});
  launch(1, tf32_special{a, b, d, out.begin()});
  return out[0];
}

void test_special_products() {
  const std::uint32_t one = as_bits(1.0f);
  const std::uint32_t inf = as_bits(kInf);
  // The low 13 bits of an operand do not count.
  SUBQUAD_CHECK(special_product(as_bits(3.0f) | 0x1fffu, one | 0x1fffu, 0.5f) == 3.5f);
  SUBQUAD_CHECK(special_product(inf, one, -7) == kInf);
  SUBQUAD_CHECK(special_product(inf, as_bits(-2.0f), 0) == -kInf);
  SUBQUAD_CHECK(std::isnan(special_product(inf, 0, 1)));
  SUBQUAD_CHECK(std::isnan(special_product(inf, one, -kInf)));
  SUBQUAD_CHECK(std::isnan(special_product(round_to_tf32(NAN), one, 0)));
  SUBQUAD_CHECK(std::isnan(special_product(one, one, NAN)));
  SUBQUAD_CHECK(special_product(one, one, kInf) == kInf);
  SUBQUAD_CHECK(special_product(as_bits(0x1p100f), as_bits(0x1p100f), 0) == kInf);
  SUBQUAD_CHECK(special_product(as_bits(0x1p-60f), as_bits(-0x1p-60f), 0) == -0x1p-120f);
  SUBQUAD_CHECK(special_product(0, one, 0x1.234568p-100f) == 0x1.234568p-100f);
}

// ---- copies -------------------------------------------------------------------------------------

template <int kBytes>
struct one_copy {
  static constexpr int kThreads = 32;
  struct shared_memory {
    alignas(16) unsigned char bytes[32 * kBytes];
  };
  const unsigned char* from;
  int valid;
  unsigned char* before;  // what lies there until the wait
  unsigned char* after;

  void operator()(shared_memory& shared) const {
    const int own = static_cast<int>(threadIdx.x) * kBytes;
    std::memset(shared.bytes + own, 7, kBytes);
    copy_async<kBytes>(shared.bytes + own, from, valid);
    commit_copies();
    std::memcpy(before + own, shared.bytes + own, kBytes);
    wait_copies<0>();
    std::memcpy(after + own, shared.bytes + own, kBytes);
  }
};

template <int kBytes>
void test_copy() {
  for (int valid = 0; valid <= kBytes; ++valid) {
    // Of the source there are just the valid bytes.
    const device_array<unsigned char> page({4096 - kBytes + valid}, dtype::uint8, false);
    const std::vector<unsigned char> numbers = {1, 2,  3,  4,  5,  6,  7,  8,
                                                9, 10, 11, 12, 13, 14, 15, 16};
    unsigned char* from = page.end() - valid;
    std::memcpy(from, numbers.data(), static_cast<std::size_t>(valid));
    const device_array<unsigned char> before({32 * kBytes});
    const device_array<unsigned char> after({32 * kBytes});
    launch(1, one_copy<kBytes>{valid ? from : nullptr, valid, before.begin(), after.begin()});
    for (int i = 0; i < 32 * kBytes; ++i) {
      SUBQUAD_CHECK(before[i] == 0xff);
      const int byte = i % kBytes;
      SUBQUAD_CHECK(after[i] == (byte < valid ? numbers[static_cast<std::size_t>(byte)] : 0));
    }
  }
  const device_array<unsigned char> source({64});
  const device_array<unsigned char> out({32 * kBytes});
  const auto refused = [&](const unsigned char* from, int valid, const char* part) {
    return checks::throws<executor_error>(
        [&] { launch(1, one_copy<kBytes>{from, valid, out.begin(), out.begin()}); }, part);
  };
  SUBQUAD_CHECK(refused(source.begin(), kBytes + 1, "valid bytes of "));
  SUBQUAD_CHECK(refused(source.begin(), -1, "copies -1 valid bytes of "));
  SUBQUAD_CHECK(refused(source.begin() + kBytes / 2, kBytes, "not aligned"));
  SUBQUAD_CHECK(refused(source.begin() + 1, 0, "not aligned"));
}

// Groups of copies are there one after the other, those that are not closed last.
struct groups {
  static constexpr int kThreads = 32;
  struct shared_memory {
    float values[5][32];
  };
  const float* from;  // [5][32]
  std::int32_t* out;  // which are there, after each step

  void operator()(shared_memory& shared) const {
    const int t = static_cast<int>(threadIdx.x);
    int step = 0;
    const auto look = [&] {
      std::int32_t there = 0;
      for (int i = 0; i < 5; ++i) there |= (shared.values[i][t] == from[32 * i + t]) << i;
      out[32 * step++ + t] = there;
    };
    const auto copy = [&](int i) { copy_async<4>(&shared.values[i][t], from + 32 * i + t, 4); };
    copy(0);
    copy(1);
    commit_copies();
    copy(2);
    commit_copies();
    commit_copies();
    copy(3);
    commit_copies();
    copy(4);
    look();
    wait_copies<4>();
    look();
    wait_copies<3>();
    look();
    wait_copies<1>();
    look();
    wait_copies<0>();
    look();
    commit_copies();
    wait_copies<1>();
    look();
    wait_copies<0>();
    look();
  }
};

void test_groups() {
  const device_array<float> from({5, 32});
  for (std::size_t i = 0; i < from.size(); ++i) {
    from[static_cast<std::int64_t>(i)] = static_cast<float>(i);
  }
  const device_array<std::int32_t> out({7, 32}, dtype::uint8);
  launch(1, groups{from.begin(), out.begin()});
  const std::int32_t expected[] = {0, 0, 0b11, 0b111, 0b1111, 0b1111, 0b11111};
  for (int i = 0; i < 7 * 32; ++i) SUBQUAD_CHECK(out[i] == expected[i / 32]);
}

}  // namespace
}  // namespace subquad::cuda

int main() {
  using namespace subquad::cuda;
  test_tf32();
  test_widening();
  test_power();
  test_product<tf32_words>();
  test_product<float16_words>();
  test_product<bfloat16_words>();
  test_product<float64_words>();
  test_special_products();
  test_copy<4>();
  test_copy<8>();
  test_copy<16>();
  test_groups();
  return checks::status();
}
