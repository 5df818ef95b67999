// The Walsh-Hadamard transform, at every instruction set, against the definition and against its
// values on rows of one element that is not 0.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "strided_array.hpp"
#include "subquad/features.hpp"
#include "subquad/threads.hpp"

namespace {

using checks::layout;
using checks::strided_array;

template <class T>
strided_array<T> transform(const strided_array<T>& x, std::int64_t batch, std::int64_t d,
                           layout how = layout::contiguous, int n_threads = 0) {
  subquad::context context{};
  context.n_threads = n_threads;
  strided_array<T> out({batch, d}, how);
  const std::size_t bytes = subquad::hadamard_transform_workspace(batch, d, sizeof(T));
  std::vector<std::uint8_t> memory(bytes + 2, std::uint8_t{0xA5});
  const auto length = static_cast<std::int64_t>(bytes);
  subquad::hadamard_transform(x.view(), out.view(),
                              subquad::contiguous_view(memory.data() + 1, &length, 1), context);
  SUBQUAD_CHECK(memory.front() == 0xA5 && memory.back() == 0xA5);
  SUBQUAD_CHECK(out.touched_gaps() == 0);
  return out;
}

int sign(std::int64_t i, std::int64_t j) {
  return __builtin_parityll(static_cast<unsigned long long>(i & j)) != 0 ? -1 : 1;
}

// By halves: the sums of the first and the second, then their differences.
void transform_exactly(std::vector<long double>& values) {
  for (std::size_t half = 1; half < values.size(); half *= 2) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if ((i & half) != 0) continue;
      const long double a = values[i];
      const long double b = values[i + half];
      values[i] = a + b;
      values[i + half] = a - b;
    }
  }
}

template <class T>
void against_truth(std::int64_t batch, std::int64_t d, layout how) {
  std::mt19937_64 generator(static_cast<std::uint64_t>(batch * 1009 + d));
  std::normal_distribution<double> normal;
  strided_array<T> x({batch, d}, how);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i < d; ++i) x.at(b, i) = static_cast<T>(normal(generator));
  }
  const strided_array<T> out = transform(x, batch, d, how);
  // Half a unit for each of log2(d) sums on the way of every element.
  const long double unit = std::numeric_limits<T>::epsilon() / 2;
  const long double levels = std::log2(static_cast<long double>(d));
  bool close = true;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<long double> expected;
    long double size = 0;
    for (std::int64_t i = 0; i < d; ++i) {
      expected.push_back(x.at(b, i));
      size += std::abs(expected.back());
    }
    transform_exactly(expected);
    for (std::int64_t i = 0; i < d; ++i) {
      close = close && std::abs(out.at(b, i) - expected[static_cast<std::size_t>(i)]) <=
                           unit * levels * size;
    }
  }
  SUBQUAD_CHECK(close);
  if (!close) {
    std::printf("batch %d d %d layout %d\n", static_cast<int>(batch), static_cast<int>(d),
                static_cast<int>(how));
  }
}

// Small integers are transformed without rounding: exactly as by the definition.
template <class T>
void against_definition(std::int64_t d) {
  strided_array<T> x({1, d});
  for (std::int64_t i = 0; i < d; ++i) x.at(0, i) = static_cast<T>((i * 7 + 3) % 11 - 5);
  const strided_array<T> out = transform(x, 1, d);
  bool same = true;
  for (std::int64_t i = 0; i < d; ++i) {
    T sum = 0;
    for (std::int64_t j = 0; j < d; ++j) sum += static_cast<T>(sign(i, j)) * x.at(0, j);
    same = same && out.at(0, i) == sum;
  }
  SUBQUAD_CHECK(same);
  const strided_array<T> twice = transform(out, 1, d);
  for (std::int64_t i = 0; i < d; ++i) {
    same = same && twice.at(0, i) == static_cast<T>(d) * x.at(0, i);
  }
  SUBQUAD_CHECK(same);
}

template <class T>
void long_rows() {
  for (const std::int64_t d :
       {std::int64_t{1} << 14, std::int64_t{1} << 17, std::int64_t{1} << 20}) {
    strided_array<T> x({1, d});
    for (std::int64_t i = 0; i < d; ++i) x.at(0, i) = T(0);
    const std::int64_t at[] = {1, d / 3, d - 2};
    for (const std::int64_t j : at) x.at(0, j) = T(1);
    const strided_array<T> out = transform(x, 1, d);
    bool same = true;
    for (std::int64_t i = 0; i < d; ++i) {
      same =
          same && out.at(0, i) == static_cast<T>(sign(i, at[0]) + sign(i, at[1]) + sign(i, at[2]));
    }
    SUBQUAD_CHECK(same);
  }
}

// Rows of a batch of more dimensions than one, each as alone.
template <class T>
void batches() {
  for (const layout how :
       {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
    for (const std::int64_t d : {1, 4, 64}) {
      strided_array<T> x({3, 5, d}, how);
      strided_array<T> out({3, 5, d}, how);
      for (std::int64_t a = 0; a < 3; ++a) {
        for (std::int64_t b = 0; b < 5; ++b) {
          for (std::int64_t i = 0; i < d; ++i) x.at(a, b, i) = static_cast<T>(a * 7 + b * i % 5);
        }
      }
      const std::size_t bytes = subquad::hadamard_transform_workspace(15, d, sizeof(T));
      std::vector<std::uint8_t> memory(bytes);
      const auto length = static_cast<std::int64_t>(bytes);
      subquad::hadamard_transform(x.view(), out.view(),
                                  subquad::contiguous_view(memory.data(), &length, 1));
      SUBQUAD_CHECK(out.touched_gaps() == 0);
      bool same = true;
      for (std::int64_t a = 0; a < 3; ++a) {
        for (std::int64_t b = 0; b < 5; ++b) {
          strided_array<T> row({1, d});
          for (std::int64_t i = 0; i < d; ++i) row.at(0, i) = x.at(a, b, i);
          const strided_array<T> alone = transform(row, 1, d);
          for (std::int64_t i = 0; i < d; ++i) same = same && out.at(a, b, i) == alone.at(0, i);
        }
      }
      SUBQUAD_CHECK(same);
    }
  }
}

template <class T>
void not_finite() {
  const std::int64_t d = 64;
  strided_array<T> x({5, d});
  for (std::int64_t b = 0; b < 5; ++b) {
    for (std::int64_t i = 0; i < d; ++i) x.at(b, i) = static_cast<T>(b + i);
  }
  const strided_array<T> clean = transform(x, 5, d);
  x.at(1, 9) = std::numeric_limits<T>::quiet_NaN();
  x.at(3, 0) = std::numeric_limits<T>::infinity();
  const strided_array<T> out = transform(x, 5, d);
  for (std::int64_t i = 0; i < d; ++i) {
    SUBQUAD_CHECK(std::isnan(out.at(1, i)));
    SUBQUAD_CHECK(!std::isfinite(out.at(3, i)));
    for (const std::int64_t b : {0, 2, 4}) SUBQUAD_CHECK(out.at(b, i) == clean.at(b, i));
  }
}

template <class T>
void threads_do_not_show() {
  for (const auto& [batch, d] :
       {std::pair<std::int64_t, std::int64_t>{1, 1 << 17}, {9, 1 << 15}, {3000, 64}}) {
    strided_array<T> x({batch, d});
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t i = 0; i < d; ++i) {
        x.at(b, i) = static_cast<T>(0.1) * static_cast<T>((b * 31 + i * 17) % 101);
      }
    }
    const strided_array<T> one = transform(x, batch, d, layout::contiguous, 1);
    for (const int threads : {2, 3}) {
      SUBQUAD_CHECK(transform(x, batch, d, layout::contiguous, threads).data() == one.data());
    }
  }
}

template <class T>
void everything() {
  for (std::int64_t d = 1; d <= 4096; d *= 2) {
    for (const std::int64_t batch : {1, 3, 37}) {
      for (const layout how :
           {layout::contiguous, layout::transposed, layout::flipped, layout::spaced}) {
        if (d > 256 && batch > 3) continue;
        against_truth<T>(batch, d, how);
      }
    }
    if (d <= 512) against_definition<T>(d);
  }
  against_truth<T>(1, 1 << 15, layout::flipped);
  against_truth<T>(8, 1 << 15, layout::contiguous);
  SUBQUAD_CHECK(transform(strided_array<T>({0, 8}), 0, 8).data().size() > 0);
  long_rows<T>();
  batches<T>();
  not_finite<T>();
  threads_do_not_show<T>();
}

void refusals() {
  const strided_array<float> x({2, 6});
  const strided_array<float> y({2, 8});
  const strided_array<float> out({1, 8});
  const strided_array<double> other({2, 8});
  const strided_array<std::uint8_t> none({0});
  const strided_array<std::uint8_t> enough({1 << 20});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { subquad::hadamard_transform(x.view(), x.view(), enough.view()); }, "power of two"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { subquad::hadamard_transform(y.view(), out.view(), enough.view()); }, "out"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] { subquad::hadamard_transform(y.view(), other.view(), enough.view()); }, "out"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { subquad::hadamard_transform(y.view(), y.view(), none.view()); }, "workspace"));
}

}  // namespace

int main() {
  refusals();
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float>();
    everything<double>();
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}
