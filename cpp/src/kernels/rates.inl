// Contracts stand in rates_kernels.hpp.
#include "rates_kernels.hpp"

#include "log_sum_exp.inl"
#include "tile_product.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

template <class T>
double total(const tile<T>& acc) {
  double sum = 0;
  for (int r = 0; r < kTileRows; ++r) {
    for (int c = 0; c < kTileColumns<T>; ++c) sum += acc[r][c / lanes<T>][c % lanes<T>];
  }
  return sum;
}

template <class T>
double multiply_adds(double* sink) {
  constexpr std::int64_t kRounds = 20000;
  tile<T> acc;
  SUBQUAD_UNROLL_ROWS
  for (int r = 0; r < kTileRows; ++r) {
    acc[r][0] = broadcast(static_cast<T>(*sink) + T(r));
    acc[r][1] = broadcast(static_cast<T>(*sink) - T(r));
  }
  const vec<T> factor = broadcast(T(0.5));
  const vec<T> term = broadcast(T(0.25));
  for (std::int64_t i = 0; i < kRounds; ++i) {
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      acc[r][0] = acc[r][0] * factor + term;
      acc[r][1] = acc[r][1] * factor + term;
    }
  }
  *sink += total<T>(acc);
  return 2.0 * kRounds * kTileRows * kTileColumns<T>;
}

// Panels of rows that fill 128 KiB, and one panel of columns.
template <class T>
std::int64_t n_panels(std::int64_t depth) {
  const std::int64_t bytes = kTileRows * (depth + 1) * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t panels = (128 << 10) / bytes;
  return panels < 1 ? 1 : panels;
}

template <class T>
std::size_t tile_products_scratch(std::int64_t depth) {
  return sizeof(T) *
         static_cast<std::size_t>(depth * (n_panels<T>(depth) * kTileRows + kTileColumns<T>));
}

template <class T>
void prepare_tile_products(std::int64_t depth, void* scratch) {
  T* values = static_cast<T*>(scratch);
  const std::int64_t count = depth * (n_panels<T>(depth) * kTileRows + kTileColumns<T>);
  for (std::int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<T>(0.001) * static_cast<T>(i % 31);
  }
}

template <class T>
double tile_products(std::int64_t depth, void* scratch, double* sink) {
  const std::int64_t panels = n_panels<T>(depth);
  const T* left = static_cast<const T*>(scratch);
  T* right = static_cast<T*>(scratch) + panels * kTileRows * depth;
  const double once = 2.0 * static_cast<double>(panels * depth) * kTileRows * kTileColumns<T>;
  const auto rounds = static_cast<std::int64_t>(1e7 / once) + 1;
  vec<T> largest = broadcast(kLowest<T>);
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (std::int64_t p = 0; p < panels; ++p) {
      tile<T> acc;
      tile_zero<T>(acc);
      tile_product<T>(depth, left + p * kTileRows * depth, right, acc);
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        largest = max<T>(max<T>(acc[r][0], acc[r][1]), largest);
      }
    }
    right[round % depth] += static_cast<T>(1e-6);
  }
  *sink += static_cast<double>(largest[0]);
  return once * static_cast<double>(rounds);
}

template <class T>
double exponentials(double* sink) {
  constexpr int kCount = 2048;
  constexpr int kRounds = 2000;
  T values[kCount];
  for (int i = 0; i < kCount; ++i) values[i] = static_cast<T>(i % 83) * static_cast<T>(-0.1);
  vec<T> sum[kTileVectors] = {};
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kCount; i += kTileColumns<T>) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        sum[v] += exp2_bounded<T>(load(values + i + v * lanes<T>) * kLog2E<T>);
      }
    }
    values[round] += static_cast<T>(1e-6);
  }
  *sink += static_cast<double>(sum[0][0] + sum[1][0]);
  return 1.0 * kCount * kRounds;
}

template <class T>
constexpr rates_functions functions = {multiply_adds<T>, tile_products_scratch<T>,
                                       prepare_tile_products<T>, tile_products<T>, exponentials<T>};

}  // namespace

extern const rates_kernels kernels_rates;
const rates_kernels kernels_rates = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
