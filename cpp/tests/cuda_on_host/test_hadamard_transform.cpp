// The Walsh-Hadamard transform on CUDA, against the same sums in long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/strided.hpp"
#include "features_core.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;
using real = long double;

double worst = 0;  // error over bound

void transform(std::vector<real>& row) {
  for (std::size_t step = 1; step < row.size(); step *= 2) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      if (i & step) continue;
      const real a = row[i];
      const real b = row[i + step];
      row[i] = a + b;
      row[i + step] = a - b;
    }
  }
}

template <class T>
struct problem {
  shape batch;
  std::int64_t d;
  strided_array<T> x;
  strided_array<T> out;

  problem(const shape& b, std::int64_t length, layout inputs = layout::contiguous,
          layout output = layout::contiguous)
      : batch(b), d(length), x(joined(b, {length}), inputs), out(joined(b, {length}), output) {
    std::mt19937_64 generator(static_cast<std::uint64_t>(length));
    std::normal_distribution<double> normal;
    x.each([&](T& element, const shape&) { element = static_cast<T>(normal(generator)); });
  }

  void run() const {
    std::int64_t rows = 1;
    for (const std::int64_t length : batch) rows *= length;
    const auto bytes =
        static_cast<std::int64_t>(subquad::core::hadamard_transform_workspace(rows, d, sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes});
    subquad::core::hadamard_transform(x.view(), out.view(), memory.view());
  }

  // log2(d) sums to an element, each rounded.
  void check() const {
    const real u = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;
    each_index(batch, [&](const shape& b) {
      std::vector<real> row;
      real size = 0;
      for (std::int64_t i = 0; i < d; ++i) {
        row.push_back(x(joined(b, {i})));
        size += std::abs(row.back());
      }
      transform(row);
      const real bound = std::log2(static_cast<real>(d)) * u * size * 1.001L;
      for (std::int64_t i = 0; i < d; ++i) {
        const real expected = row[static_cast<std::size_t>(i)];
        const real found = out(joined(b, {i}));
        if (std::isnan(expected) && std::isnan(found)) continue;
        const real error =
            std::isinf(expected) && found == expected ? 0 : std::abs(found - expected);
        if (bound > 0 && error <= bound)
          worst = std::max(worst, static_cast<double>(error / bound));
        if (error <= bound || found == expected) continue;
        std::printf("element %d of %d, %d bytes: %.9Lg, expected %.9Lg within %.3Lg\n", int(i),
                    int(d), int(sizeof(T)), found, expected, bound);
        SUBQUAD_CHECK(false);
        return;
      }
    });
    SUBQUAD_CHECK(out.gaps_untouched());
  }

  void run_and_check() const {
    run();
    check();
  }
};

template <class T>
void sizes() {
  for (std::int64_t d = 1; d <= 8192; d *= 2) {
    problem<T>({3}, d).run_and_check();
  }
  // Around the rows of a block.
  for (const std::int64_t rows : {255, 256, 257, 600}) problem<T>({rows}, 2).run_and_check();
  for (const std::int64_t rows : {63, 64, 65}) problem<T>({rows}, 64).run_and_check();
  problem<T>({3}, 2048).run_and_check();
  problem<T>({}, 16).run_and_check();
  problem<T>({0}, 16).run_and_check();
  problem<T>({2, 0, 3}, 8192).run_and_check();
  // Of two passes.
  problem<T>({2}, 1 << 15).run_and_check();
  problem<T>({}, 1 << 19).run_and_check();
}

template <class T>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    for (const std::int64_t d : {32, 16384}) {
      problem<T>({5}, d, each).run_and_check();
      problem<T>({5}, d, layout::contiguous, each).run_and_check();
    }
    problem<T>({2, 3, 2}, 8, each, each).run_and_check();
  }
  problem<T>({7}, 64, layout::repeated).run_and_check();
}

// Each unit vector gives a row of the matrix, of ones with their signs.
void units() {
  for (const std::int64_t d : {64, 8192}) {
    for (const std::int64_t j : {std::int64_t{0}, std::int64_t{5}, d - 1}) {
      problem<float> each({}, d);
      for (std::int64_t i = 0; i < d; ++i) each.x({i}) = i == j ? 1.0f : 0.0f;
      each.run();
      for (std::int64_t i = 0; i < d; ++i) {
        const float expected = __builtin_parityll(static_cast<unsigned long long>(i & j)) ? -1 : 1;
        SUBQUAD_CHECK(each.out({i}) == expected);
      }
    }
  }
}

// Sums meet infinities as those of pairs do, and reach no other row.
void special() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float held : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()}) {
    problem<float> each({4}, 32);
    each.x({1, 7}) = held;
    each.run_and_check();
    for (std::int64_t i = 0; i < 32; ++i) {
      SUBQUAD_CHECK(!std::isfinite(each.out({1, i})));
      SUBQUAD_CHECK(std::isfinite(each.out({0, i})) && std::isfinite(each.out({2, i})));
    }
  }
}

template <class T>
void orders() {
  const problem<T> first({3}, 8192);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<T> next({3}, 8192);
    next.run();
    next.check();
    first.out.each([&](auto& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.out(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

void errors() {
  const problem<float> each({3}, 16);
  const strided_array<float> odd({3, 12});
  const strided_array<double> other({3, 16});
  const strided_array<std::uint8_t> memory({64});
  const auto call = [&](const subquad::array_view& x, const subquad::array_view& out) {
    subquad::core::hadamard_transform(x, out, memory.view());
  };
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { call(odd.view(), odd.view()); }, "x: expected a power of two on its last axis"));
  SUBQUAD_CHECK(checks::throws<subquad::type_error>([&] { call(each.x.view(), other.view()); },
                                                    "out: expected float32, got float64"));
}

template <class T>
void of_type(const char* name) {
  worst = 0;
  sizes<T>();
  layouts<T>();
  orders<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  problem<float>({}, 1 << 20).run_and_check();  // three passes
  units();
  special();
  errors();
  return checks::status();
}
