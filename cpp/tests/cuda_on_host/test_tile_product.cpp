// Products by tiles, states of log sum exp and broadcast batches, each against a definition in long
// double.
#include "cuda/tile_product.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/batches.cuh"
#include "cuda/launch.cuh"
#include "cuda/log_sum_exp.cuh"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/guarded.hpp"

namespace subquad::cuda {
namespace {

using on_host::device_array;
using on_host::order;

// ---- elements -----------------------------------------------------------------------------------

template <class S>
S narrowed(double x) {
  if constexpr (std::is_same_v<S, bfloat16>) {
    return {static_cast<std::uint16_t>(as_bits(static_cast<float>(x)) >> 16)};
  } else if constexpr (std::is_same_v<S, float16>) {
    // Cut to 11 bits; normal numbers alone.
    if (std::fabs(x) < 0x1p-14) return {0};
    const int exponent = std::ilogb(x);
    const auto mantissa = static_cast<int>(std::ldexp(std::fabs(x), 10 - exponent));
    return {static_cast<std::uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 15) << 10 |
                                       (mantissa & 1023))};
  } else {
    return static_cast<S>(x);
  }
}

template <class S>
const char* name_of() {
  return std::is_same_v<S, float>      ? "float32"
         : std::is_same_v<S, double>   ? "float64"
         : std::is_same_v<S, bfloat16> ? "bfloat16"
                                       : "float16";
}

// The bound on a product of `depth` terms whose absolute values add to `magnitude`; for float32
// what the worst numbers take.
template <class S>
long double bound_of(int depth, long double magnitude) {
  if (std::is_same_v<S, float>) return (depth / 4.0L + 13) * 0x1p-22L * magnitude;
  // Eight products of 16 bits, and the sum before, are cut to 25 bits and their sum to 24;
  // additions of doubles round once, and products too.
  const long double unit = std::is_same_v<S, double> ? 0x1p-52L : 0x1p-23L;
  return (depth + 1) * unit * magnitude;
}

// ---- matrices -----------------------------------------------------------------------------------

enum class lie {
  vectors,
  dense,
  apart,
  unaligned,
  transposed,
  reversed,
  mirrored,
  spread,
  same_row
};
constexpr lie kLies[] = {lie::vectors,  lie::dense,    lie::apart,  lie::unaligned, lie::transposed,
                         lie::reversed, lie::mirrored, lie::spread, lie::same_row};

// A matrix that lies in memory in one of these ways; of its memory nothing else may be read.
template <class S>
struct matrix {
  std::unique_ptr<device_array<S>> memory;
  rows_of<S> rows;

  matrix(int count, int depth, lie how, const std::function<double()>& number) {
    constexpr std::int64_t kVector = 16 / sizeof(S);
    std::int64_t row_stride = depth;
    std::int64_t column_stride = 1;
    std::int64_t before = 0;  // elements before the first one
    bool flush_high = true;
    switch (how) {
      case lie::vectors:
        row_stride = (depth + kVector - 1) / kVector * kVector;
        flush_high = false;
        break;
      case lie::dense:
        break;
      case lie::apart:
        row_stride = depth + 3;
        break;
      case lie::unaligned:
        row_stride = (depth + kVector - 1) / kVector * kVector;
        before = 1;
        flush_high = false;
        break;
      case lie::transposed:
        row_stride = 1;
        column_stride = count;
        break;
      case lie::reversed:
        row_stride = -std::int64_t{depth};
        before = std::int64_t{depth} * std::max(0, count - 1);
        break;
      case lie::mirrored:
        column_stride = -1;
        before = std::max(0, depth - 1);
        break;
      case lie::spread:
        column_stride = 2;
        row_stride = 2 * std::int64_t{depth} + 1;
        break;
      case lie::same_row:
        row_stride = 0;
        break;
    }
    // Just what the elements span.
    std::int64_t size = before;
    for (const std::int64_t i : {0, count - 1}) {
      for (const std::int64_t k : {0, depth - 1}) {
        if (i >= 0 && k >= 0) {
          size = std::max(size, before + i * row_stride + k * column_stride + 1);
        }
      }
    }
    memory = std::make_unique<device_array<S>>(std::vector<std::int64_t>{size}, dtype::uint8,
                                               flush_high);
    S* first = memory->begin() + before;
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < depth; ++k) {
        first[i * row_stride + k * column_stride] = narrowed<S>(number());
      }
    }
    rows = {{first, row_stride, column_stride}, count, depth};
  }

  long double operator()(int i, int k) const { return widen(rows.matrix(i, k)); }
};

// ---- products -----------------------------------------------------------------------------------

// Writes whole tiles, also where there are no rows or columns. In `marks`, what `prepare` has
// written for the tile's columns must be seen by the epilogue of the same tile.
template <class S, class Tile = default_tile_t<S>>
struct write_products {
  using tile = Tile;
  using sum = typename tile::sum;
  static constexpr int kThreads = tile::kThreads;
  struct shared_memory {
    typename tile::shared_memory product;
    int marks[2][tile::kColumns];
  };

  rows_of<S> x;
  rows_of<S> y;
  sum* out;        // [rows of whole tiles][columns of whole tiles]
  sum* plain;      // [x.count][y.count], by plain_product
  int columns;     // of whole tiles
  int* epilogues;  // how many a block has seen

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int first_row = static_cast<int>(blockIdx.x) * tile::kRows;
    if (threadIdx.x == 0) {
      const int end = first_row + tile::kRows;
      shared.product.x =
          rows_between(x.matrix, 0, first_row, end < x.count ? end : x.count, x.depth);
      shared.product.y = y;
    }
    __syncthreads();
    int seen = 0;
    tile::run(
        shared.product,
        [&](int first_column) {
          for (int c = static_cast<int>(threadIdx.x); c < tile::kColumns; c += kThreads) {
            shared.marks[tile::parity(first_column)][c] = first_column + c;
          }
        },
        [&](int first_column, typename tile::accumulators& products) {
          const int* marks = shared.marks[tile::parity(first_column)];
          for (int r = 0; r < tile::kThreadRows; ++r) {
            for (int c = 0; c < tile::kThreadColumns; ++c) {
              const int column = first_column + tile::column(c);
              sum value = products(r, c);
              if (marks[tile::column(c)] != column) value = -infinity<sum>();
              out[static_cast<std::int64_t>(first_row + tile::row(r)) * columns + column] = value;
              // The epilogue may change them.
              products(r, c) = 1e30f;
            }
          }
          ++seen;
        });
    if (threadIdx.x == 0) epilogues[blockIdx.x] = seen;
    for (int row = 0; row < shared.product.x.count; ++row) {
      for (int j = static_cast<int>(threadIdx.x); j < y.count; j += kThreads) {
        plain[static_cast<std::int64_t>(first_row + row) * y.count + j] =
            plain_product(shared.product.x, row, y, j);
      }
    }
  }
};

// The worst error in units of its bound; infinite where something else is wrong.
template <class S, class Tile = default_tile_t<S>>
long double worst_error(const matrix<S>& x, const matrix<S>& y) {
  using kernel = write_products<S, Tile>;
  using sum = typename kernel::sum;
  constexpr long double kWrong = std::numeric_limits<long double>::infinity();
  const int n = x.rows.count;
  const int m = y.rows.count;
  const int depth = x.rows.depth;
  const int row_tiles = (n + Tile::kRows - 1) / Tile::kRows;
  const int column_tiles = (m + Tile::kColumns - 1) / Tile::kColumns;
  const int rows = row_tiles * Tile::kRows;
  const int columns = column_tiles * Tile::kColumns;
  const device_array<sum> out({rows, columns});
  const device_array<sum> plain({n, m});
  const device_array<int> epilogues({row_tiles}, dtype::uint8);
  launch(row_tiles, kernel{x.rows, y.rows, out.begin(), plain.begin(), columns, epilogues.begin()});
  for (const int each : epilogues) {
    if (each != column_tiles) return kWrong;
  }
  long double worst = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      const sum got = out[static_cast<std::int64_t>(i) * columns + j];
      if (i >= n || j >= m) {
        if (got != 0) return kWrong;
        continue;
      }
      long double product = 0;
      long double magnitude = 0;
      for (int k = 0; k < depth; ++k) {
        const long double term = x(i, k) * y(j, k);
        product += term;
        magnitude += std::fabs(term);
      }
      const long double bound = bound_of<S>(depth, magnitude);
      const long double error = std::fabs(got - product);
      if (!(error <= bound)) return bound > 0 ? error / bound : kWrong;
      if (bound > 0) worst = std::max(worst, error / bound);
      const long double plain_error =
          std::fabs(plain[static_cast<std::int64_t>(i) * m + j] - product);
      const long double unit = sizeof(sum) == 8 ? 0x1p-53L : 0x1p-24L;
      if (!(plain_error <= (depth + 1) * unit * magnitude)) return kWrong;
    }
  }
  return worst;
}

template <class S>
void check_products(const matrix<S>& x, const matrix<S>& y, const std::string& what,
                    long double& worst) {
  const long double error = worst_error<S>(x, y);
  SUBQUAD_CHECK(error <= 1);
  if (!(error <= 1)) {
    std::printf("%s, %s: %d x %d, depth %d: %Lg of the bound\n", name_of<S>(), what.c_str(),
                x.rows.count, y.rows.count, x.rows.depth, error);
  }
  worst = std::max(worst, error);
}

template <class S>
void test_shapes() {
  using tile = default_tile_t<S>;
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const auto number = [&] { return normal(random); };
  long double worst = 0;
  const auto check = [&](int n, int m, int depth, lie of_x, lie of_y) {
    const matrix<S> x(n, depth, of_x, number);
    const matrix<S> y(m, depth, of_y, number);
    check_products(x, y,
                   "lying " + std::to_string(static_cast<int>(of_x)) + " and " +
                       std::to_string(static_cast<int>(of_y)),
                   worst);
  };
  const auto in = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  // At and beside the ends of tiles, chunks and fragments.
  for (const int depth : {0, 1, 7, 8, 9, tile::kChunk - 1, tile::kChunk, tile::kChunk + 1, 70}) {
    check(5, 9, depth, lie::vectors, lie::vectors);
    check(3, 2, depth, lie::dense, lie::transposed);
  }
  for (const int n : {1, 2, 8, 9, 127, 128, 129}) check(n, 10, 5, lie::vectors, lie::dense);
  for (const int m : {1, 7, 8, 9, tile::kColumns - 1, tile::kColumns, tile::kColumns + 1, 200}) {
    check(10, m, 5, lie::dense, lie::vectors);
    check(2, m, 2 * tile::kChunk + 3, lie::vectors, lie::vectors);
  }
  check(0, 7, 5, lie::dense, lie::dense);
  check(7, 0, 5, lie::dense, lie::dense);
  for (const lie of_x : kLies) {
    for (const lie of_y : kLies) check(in(1, 20), in(1, 30), in(0, 70), of_x, of_y);
  }
  for (int i = 0; i < 20; ++i) {
    check(in(1, 130), in(1, 200), in(0, 70), kLies[in(0, 8)], kLies[in(0, 8)]);
  }
  std::printf("%s, random numbers: %.3Lf of the bound\n", name_of<S>(), worst);
}

// Numbers that are hard on the splitting, or on the sums.
template <class S>
void test_adversaries() {
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform(1, 2);
  long double worst = 0;
  const auto check = [&](const char* what, const std::function<double()>& number) {
    for (const int depth : {3, 64, 300}) {
      const matrix<S> x(17, depth, lie::vectors, number);
      const matrix<S> y(13, depth, lie::vectors, number);
      long double of_this = 0;
      check_products(x, y, what, of_this);
      worst = std::max(worst, of_this);
      std::printf("%s, %s, depth %d: %.3Lf of the bound\n", name_of<S>(), what, depth, of_this);
    }
  };
  check("positive numbers", [&] { return uniform(random); });
  // Halfway between numbers of 11 bits: the low parts are as large as they can be, and of one sign.
  check("largest low parts",
        [&] { return 1 + std::floor(1023 * (uniform(random) - 1)) * 0x1p-10 + 0x1p-11 - 0x1p-22; });
  check("largest rests",
        [&] { return 1 + std::floor(255 * (uniform(random) - 1)) * 0x1p-10 + 0x1p-12 + 0x1p-23; });
  check("one number", [] { return 1.0009765f; });
  // Sums that cancel, and terms of very different sizes.
  int turn = 0;
  check("turns of sign", [&] { return (++turn % 2 ? 1 : -1) * uniform(random); });
  check("wide range", [&] { return normal(random) * std::exp2(12 * (uniform(random) - 1.5)); });
  if constexpr (sizeof(S) >= 4) {
    check("large numbers", [&] { return 0x1p58 * uniform(random); });
    check("small numbers", [&] { return 0x1p-48 * normal(random); });
  }
  std::printf("%s, adversaries: %.3Lf of the bound\n", name_of<S>(), worst);
}

// Infinities and NaN reach the products that have them, and no others.
template <class S>
void test_infinities() {
  int index = 0;
  const matrix<S> x(20, 40, lie::vectors, [&] { return 1 + index++ % 7; });
  const matrix<S> y(12, 40, lie::dense, [&] { return 1 + index++ % 5; });
  S* rows = const_cast<S*>(x.rows.matrix.data);
  const auto set = [&](int i, int k, std::uint16_t bits, double value) {
    if constexpr (sizeof(S) == 2) {
      rows[i * x.rows.matrix.row_stride + k].bits = bits;
    } else {
      rows[i * x.rows.matrix.row_stride + k] = static_cast<S>(value);
    }
  };
  const bool is_half = std::is_same_v<S, float16>;
  set(3, 39, is_half ? 0x7c00 : 0x7f80, INFINITY);
  set(4, 0, is_half ? 0x7e00 : 0x7fc0, NAN);
  using kernel = write_products<S>;
  using sum = typename kernel::sum;
  using tile = typename kernel::tile;
  const device_array<sum> out({tile::kRows, tile::kColumns});
  const device_array<sum> plain({20, 12});
  const device_array<int> epilogues({1}, dtype::uint8);
  launch(1, kernel{x.rows, y.rows, out.begin(), plain.begin(), tile::kColumns, epilogues.begin()});
  for (int i = 0; i < 20; ++i) {
    for (int j = 0; j < 12; ++j) {
      const sum got = out[i * tile::kColumns + j];
      const sum exact = plain[i * 12 + j];
      SUBQUAD_CHECK(i == 3 ? exact == infinity<sum>() : i == 4 ? exact != exact : exact == got);
      if (i == 3) SUBQUAD_CHECK(tile::warp::kIsSplit ? got != got : got == infinity<sum>());
      if (i == 4) SUBQUAD_CHECK(got != got);
    }
  }
}

// Other cuts than the default ones.
void test_other_tiles() {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  const auto number = [&] { return normal(random); };
  const matrix<float> x(70, 45, lie::vectors, number);
  const matrix<float> y(50, 45, lie::dense, number);
  SUBQUAD_CHECK((worst_error<float, tile_product<float, 64, 32, 4, 2>>(x, y) <= 1));
  SUBQUAD_CHECK((worst_error<float, tile_product<float, 32, 64, 1, 4>>(x, y) <= 1));
  const matrix<double> a(70, 45, lie::vectors, number);
  const matrix<double> b(50, 45, lie::dense, number);
  SUBQUAD_CHECK((worst_error<double, tile_product<double, 64, 32, 4, 2>>(a, b) <= 1));
}

template <class S>
void test_products() {
  test_shapes<S>();
  test_adversaries<S>();
  test_infinities<S>();
}

// Every element has one thread, and `holder` finds those that share a row.
template <class S>
struct map_tile {
  using tile = default_tile_t<S>;
  static constexpr int kThreads = tile::kThreads;
  struct shared_memory {};
  std::int64_t* owners;   // [kRows][kColumns], added to
  std::int64_t* holders;  // [kRows][kWarpsOfRow]

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const int self = static_cast<int>(threadIdx.x);
    for (int r = 0; r < tile::kThreadRows; ++r) {
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        atomicAdd(&owners[tile::row(r) * tile::kColumns + tile::column(c)],
                  std::int64_t{1000} * r + 1);
      }
      for (int warp = 0; warp < tile::kWarpsOfRow; ++warp) {
        int thread;
        int row;
        tile::holder(tile::row(r), warp, thread, row);
        if (thread == self) {
          atomicAdd(&holders[tile::row(r) * tile::kWarpsOfRow + warp],
                    std::int64_t{row == r ? 1 : 1000});
        }
        // The holder is the first of four neighbours of one warp.
        if (thread % 4 != 0 || row != r || thread / kWarp % tile::kWarpsOfRow != warp ||
            thread / kWarp / tile::kWarpsOfRow != tile::warp_down() ||
            thread % kWarp / 4 != tile::lane() / 4) {
          holders[tile::row(r) * tile::kWarpsOfRow + warp] = -1000;
        }
      }
    }
  }
};

template <class S>
void test_map() {
  using tile = default_tile_t<S>;
  const device_array<std::int64_t> owners({tile::kRows, tile::kColumns});
  const device_array<std::int64_t> holders({tile::kRows, tile::kWarpsOfRow});
  clear(owners.begin(), owners.size() * 8);
  clear(holders.begin(), holders.size() * 8);
  launch(1, map_tile<S>{owners.begin(), holders.begin()});
  for (const std::int64_t each : owners) SUBQUAD_CHECK(each % 1000 == 1);
  for (const std::int64_t each : holders) SUBQUAD_CHECK(each == 1);
}

// ---- log sum exp --------------------------------------------------------------------------------

template <class T>
log_sum<T> of_terms(const std::vector<T>& exponents) {
  log_sum<T> state = log_sum<T>::nothing();
  for (const T exponent : exponents) {
    state.raise(exponent);
    state.add(power_of_2(exponent - state.shift));
  }
  return state;
}

// log of the sum of 2^exponent.
template <class T>
long double log_of_sum(const std::vector<T>& exponents) {
  long double largest = -INFINITY;
  for (const T each : exponents) {
    if (each != each) return NAN;
    largest = std::max<long double>(largest, each);
  }
  if (std::isinf(largest)) return largest;
  long double sum = 0;
  for (const T each : exponents) sum += std::exp2(each - largest);
  return (largest + std::log2(sum)) * 0.693147180559945309417232121458176568L;
}

// A power of two is within 2 ulp, differences of exponents within half of one; sums and changes of
// shift add a few, on total and rest.
template <class T>
bool is_log(T got, long double expected) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  const long double unit = sizeof(T) == 8 ? 0x1p-52L : 0x1p-23L;
  const bool right = std::fabs(got - expected) <= unit * (12 + 4 * std::fabs(expected));
  if (!right) std::printf("%.20Lg, expected %.20Lg\n", static_cast<long double>(got), expected);
  return right;
}

// The state of parts that are merged in a tree whose shape is random.
template <class T>
log_sum<T> merged_in_tree(std::vector<log_sum<T>> parts, std::mt19937& random) {
  while (parts.size() > 1) {
    const auto at = std::uniform_int_distribution<std::size_t>(0, parts.size() - 2)(random);
    parts[at].merge(parts[at + 1]);
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  return parts[0];
}

template <class T>
void check_terms(const std::vector<T>& exponents, std::mt19937& random) {
  const long double expected = log_of_sum(exponents);
  SUBQUAD_CHECK(is_log(of_terms(exponents).value(), expected));
  // In parts, with empty ones between, forwards and backwards, merged one after the other or not.
  std::vector<log_sum<T>> parts = {log_sum<T>::nothing()};
  for (std::size_t i = 0; i < exponents.size();) {
    const auto size = std::min<std::size_t>(exponents.size() - i, random() % 4);
    parts.push_back(
        of_terms(std::vector<T>(exponents.begin() + static_cast<std::ptrdiff_t>(i),
                                exponents.begin() + static_cast<std::ptrdiff_t>(i + size))));
    i += size;
  }
  for (int round = 0; round < 3; ++round) {
    log_sum<T> state = log_sum<T>::nothing();
    for (const log_sum<T>& part : parts) state.merge(part);
    SUBQUAD_CHECK(is_log(state.value(), expected));
    SUBQUAD_CHECK(std::isfinite(state.shift));
    SUBQUAD_CHECK(is_log(merged_in_tree(parts, random).value(), expected));
    std::shuffle(parts.begin(), parts.end(), random);
  }
}

template <class T>
void test_log_sum() {
  std::mt19937 random(4);
  std::normal_distribution<T> normal;
  constexpr T kInf = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  constexpr T kMax = std::numeric_limits<T>::max();
  SUBQUAD_CHECK(log_sum<T>::nothing().value() == -kInf);
  for (const T scale : {T(0), T(1), T(30), T(500), T(1e6), T(1e30)}) {
    for (int round = 0; round < 50; ++round) {
      std::vector<T> exponents(1 + random() % 60);
      for (T& each : exponents) each = scale * normal(random);
      check_terms(exponents, random);
    }
  }
  const std::vector<std::vector<T>> special = {
      {},
      {-kInf},
      {-kInf, -kInf, -kInf, -kInf, -kInf},
      {-kInf, 3},
      {3, -kInf, -kInf, -kInf, 2, -kInf},
      {kInf},
      {kInf, 3, -kInf},
      {1, kInf, kInf, 2, kInf, 1000},
      {kNaN},
      {1, 2, kNaN, 3},
      {kNaN, kInf, 1},
      {kInf, 5, 6, kNaN},
      {-kInf, kNaN, -kInf},
      {kMax, 1, kInf},
      {kMax},
      {-kMax},
      {-kMax, 0},
      {kMax, -kMax, kMax / 2},
      {T(-1e30), T(-1e30), T(-1e30)},
      {0, -200, -2000, 200, 2000},
  };
  for (const std::vector<T>& each : special) {
    for (int round = 0; round < 10; ++round) {
      std::vector<T> exponents = each;
      std::shuffle(exponents.begin(), exponents.end(), random);
      // The bound knows no numbers so large that their logarithm overflows.
      check_terms(exponents, random);
    }
  }
  // What a long sum loses to rounding, the rest keeps: 2^20 terms, each below half an ulp of the
  // first.
  log_sum<T> state = log_sum<T>::nothing();
  const T small = std::numeric_limits<T>::epsilon() / 4;
  state.raise(0);
  state.add(1);
  for (int i = 0; i < 1 << 20; ++i) state.add(small);
  SUBQUAD_CHECK(std::fabs(state.total + static_cast<long double>(state.rest) -
                          (1 + std::ldexp(static_cast<long double>(small), 20))) <=
                2 * std::numeric_limits<T>::epsilon() * state.total);
  SUBQUAD_CHECK(state.total > 1);
  // The rest follows the shift, and goes with the state.
  state = {0, 1, small};
  state.raise(10);
  SUBQUAD_CHECK(state.shift == 10 && state.total == T(0x1p-10) && state.rest == small / 1024);
  log_sum<T> other = log_sum<T>::nothing();
  other.merge(state);
  SUBQUAD_CHECK(other.shift == 10 && other.total == state.total && other.rest == state.rest);
}

// States of lanes, merged over groups.
template <class T>
struct merge_over_warp {
  static constexpr int kThreads = 64;
  struct shared_memory {};
  const T* exponents;  // one for each thread
  int groups;
  T* out;
  T* totals;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    log_sum<T> state = log_sum<T>::nothing();
    state.raise(exponents[threadIdx.x]);
    state.add(power_of_2(exponents[threadIdx.x] - state.shift));
    state = merged_over_warp(state, groups);
    out[threadIdx.x] = state.value();
    totals[threadIdx.x] = state.total;
  }
};

template <class T>
void test_merging_over_warp() {
  std::mt19937 random(5);
  std::normal_distribution<T> normal;
  for (const int groups : {1, 2, 4, 8, 16, 32}) {
    const device_array<T> exponents({64});
    const device_array<T> out({64});
    const device_array<T> totals({64});
    for (T& each : exponents) each = 20 * normal(random);
    exponents[5] = -infinity<T>();
    exponents[40] = infinity<T>();
    exponents[60] = std::numeric_limits<T>::quiet_NaN();
    launch(1, merge_over_warp<T>{exponents.begin(), groups, out.begin(), totals.begin()});
    const int size = 32 / groups;
    for (int t = 0; t < 64; ++t) {
      const int first = t / size * size;
      const T* begin = exponents.begin() + first;
      SUBQUAD_CHECK(is_log(out[t], log_of_sum(std::vector<T>(begin, begin + size))));
      // All lanes of a group have the same, to the last bit.
      SUBQUAD_CHECK(out[t] == out[first] || out[t] != out[t]);
      SUBQUAD_CHECK(totals[t] == totals[first] || totals[t] != totals[t]);
    }
  }
}

// ---- batches ------------------------------------------------------------------------------------

struct strided {
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  array_view view() const {
    return {nullptr,
            shape.data(),
            strides.data(),
            static_cast<std::int32_t>(shape.size()),
            dtype::float32,
            device_type::cuda,
            0};
  }
};

// Offsets of every index of the batch against those of batch_shape, and the number of dimensions
// that are left.
void check_batches(const strided& a, const strided* b, std::int32_t core_of_b, int rank) {
  const array_view a_view = a.view();
  const array_view b_view = b ? b->view() : array_view{};
  batch_shape shape;
  shape.include(a_view, 2, "a");
  if (b) shape.include(b_view, core_of_b, "b");
  const auto found = batches_of<2>(shape, {{&a_view, 2}, {b ? &b_view : nullptr, core_of_b}});
  SUBQUAD_CHECK(found.rank == rank);
  for (std::int64_t i = 0; i < shape.count(); ++i) {
    SUBQUAD_CHECK(found.offset(0, i) == shape.offset(a_view, 2, i));
    SUBQUAD_CHECK(found.offset(1, i) == (b ? shape.offset(b_view, core_of_b, i) : 0));
  }
}

void test_batches() {
  const strided plain{{2, 3, 4, 5, 6}, {360, 120, 30, 6, 1}};
  const strided matrix{{5, 6}, {6, 1}};
  const strided vectors{{2, 3, 4, 7}, {84, 28, 7, 1}};
  const strided inner{{4, 7}, {7, 1}};
  const strided ones{{2, 1, 4, 7}, {28, 28, 7, 1}};
  const strided reversed{{2, 3, 4, 7}, {-84, -28, -7, 1}};
  const strided swapped{{2, 3, 4, 7}, {28, 56, 7, 1}};
  const strided same{{2, 3, 4, 7}, {0, 0, 0, 1}};
  check_batches(plain, nullptr, 1, 1);
  check_batches(matrix, nullptr, 1, 0);
  check_batches(matrix, &vectors, 1, 1);
  check_batches(plain, &vectors, 1, 1);
  check_batches(plain, &inner, 1, 2);
  check_batches(plain, &ones, 1, 3);
  check_batches(plain, &reversed, 1, 1);
  check_batches(plain, &swapped, 1, 3);
  check_batches(plain, &same, 1, 1);
  check_batches({{2, 1, 1, 5, 6}, {17, 18, 19, 6, 1}}, &vectors, 1, 2);

  // Dimensions of length 1 take no place, others that do not join do.
  strided many{{2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1}, {1, 2, 4, 8, 16, 32, 64, 128, 5, 1, 1}};
  check_batches(many, nullptr, 1, 8);
  many.shape.insert(many.shape.begin(), 2);
  many.strides.insert(many.strides.begin(), 1000);
  SUBQUAD_CHECK(checks::throws<invalid_argument>(
      [&] { check_batches(many, nullptr, 1, 9); },
      "expected at most 8 batch dimensions that do not lie regularly in memory"));
}

}  // namespace
}  // namespace subquad::cuda

int main() {
  using namespace subquad::cuda;
  test_products<float>();
  test_products<double>();
  test_products<float16>();
  test_products<bfloat16>();
  test_other_tiles();
  test_map<float>();
  test_map<double>();
  test_map<float16>();
  test_map<bfloat16>();
  test_log_sum<float>();
  test_log_sum<double>();
  test_merging_over_warp<float>();
  test_merging_over_warp<double>();
  test_batches();
  return checks::status();
}
