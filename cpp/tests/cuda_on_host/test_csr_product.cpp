// Products of sparse matrices on CUDA and their reverse, against the same sums in long double.
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
#include "cuda_on_host/indexed.hpp"
#include "factors_core.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::array_view;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::for_outputs;
using subquad::cuda::on_host::in_every_order;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::kLayouts;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::product;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;
using real = long double;

double worst = 0;  // error over bound

template <class T, class Index>
struct problem {
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t d;
  shape batch;
  double scale = 1;
  std::mt19937_64 engine;
  std::vector<std::int64_t> starts;  // rows + 1
  strided_array<T> data;
  strided_array<Index> indices;
  strided_array<Index> indptr;
  strided_array<T> x;
  strided_array<T> addend;
  strided_array<T> grad;

  problem(const shape& b, const std::vector<std::int64_t>& lengths, std::int64_t n_columns,
          std::int64_t n_channels, layout inputs = layout::contiguous)
      : rows(static_cast<std::int64_t>(lengths.size())),
        columns(n_columns),
        d(n_channels),
        batch(b),
        engine(static_cast<std::uint64_t>(n_columns * 100 + n_channels)),
        starts(sums(lengths)),
        data({starts.back()}, inputs),
        indices({starts.back()}, inputs),
        indptr({rows + 1}, inputs == layout::repeated ? layout::contiguous : inputs),
        x(joined(b, {columns, d}), inputs),
        addend({rows, d}, inputs),
        grad(joined(b, {rows, d}), inputs) {
    std::normal_distribution<double> normal;
    const auto fill = [&](T& element, const shape&) { element = static_cast<T>(normal(engine)); };
    data.each(fill);
    x.each(fill);
    addend.each(fill);
    grad.each(fill);
    std::uniform_int_distribution<std::int64_t> any(0, std::max<std::int64_t>(columns - 1, 0));
    indices.each([&](Index& index, const shape&) { index = static_cast<Index>(any(engine)); });
    indptr.each([&](Index& start, const shape& at) {
      start = static_cast<Index>(starts[static_cast<std::size_t>(at[0])]);
    });
  }

  static std::vector<std::int64_t> sums(const std::vector<std::int64_t>& lengths) {
    std::vector<std::int64_t> all{0};
    for (const std::int64_t length : lengths) all.push_back(all.back() + length);
    return all;
  }

  bool is_right(real found, real expected, real magnitude, real roundings) const {
    if (std::isnan(expected)) return std::isnan(found);
    if (std::isinf(expected)) return found == expected;
    const real u = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;
    const real bound = 1.001L * roundings * u * magnitude;
    const real error = std::abs(found - expected);
    if (error <= bound && bound > 0) worst = std::max(worst, static_cast<double>(error / bound));
    if (error <= bound) return true;
    std::printf("%d x %d, d %d, %d bytes: %.9Lg, expected %.9Lg within %.3Lg\n", int(rows),
                int(columns), int(d), int(sizeof(T)), found, expected, bound);
    return false;
  }

  void run(const strided_array<T>& out, bool adds) const {
    const strided_array<std::uint8_t> memory(
        {static_cast<std::int64_t>(subquad::core::csr_product_workspace(
            product(batch), rows, columns, starts.back(), d, sizeof(T)))});
    const array_view added = addend.view();
    subquad::core::csr_product(data.view(), indices.view(), indptr.view(), x.view(),
                               adds ? &added : nullptr, scale, out.view(), memory.view());
  }

  // p elements of a row are rounded p times at most, the scale and its product once each, the sum
  // with the addend once.
  void check_product(bool adds, layout outputs = layout::contiguous) const {
    const strided_array<T> out(joined(batch, {rows, d}), outputs);
    run(out, adds);
    bool right = true;
    each_index(joined(batch, {rows, d}), [&](const shape& at) {
      if (!right) return;
      const shape b(at.begin(), at.end() - 2);
      const std::int64_t row = at[at.size() - 2];
      real sum = 0;
      real magnitude = 0;
      const std::int64_t end = starts[static_cast<std::size_t>(row) + 1];
      const std::int64_t start = starts[static_cast<std::size_t>(row)];
      for (std::int64_t e = start; e < end; ++e) {
        const std::int64_t column = indices({e});
        if (column < 0 || column >= columns) continue;
        const real term =
            static_cast<real>(data({e})) * x(joined(b, {column, at[at.size() - 1]})) * scale;
        sum += term;
        magnitude += std::abs(term);
      }
      if (adds) {
        sum += addend({row, at[at.size() - 1]});
        magnitude += std::abs(static_cast<real>(addend({row, at[at.size() - 1]})));
      }
      right = is_right(out(at), sum, magnitude, static_cast<real>(end - start + 3));
    });
    SUBQUAD_CHECK(right);
    SUBQUAD_CHECK(out.gaps_untouched());
  }

  void run_vjp(const strided_array<T>& grad_data) const {
    const strided_array<std::uint8_t> memory(
        {static_cast<std::int64_t>(subquad::core::csr_product_vjp_workspace(
            product(batch), rows, columns, starts.back(), d, sizeof(T)))});
    subquad::core::csr_product_vjp(grad.view(), indices.view(), indptr.view(), x.view(),
                                   grad_data.view(), memory.view());
  }

  // B d products and their sums.
  void check_vjp(layout outputs = layout::contiguous) const {
    const strided_array<T> grad_data({starts.back()}, outputs);
    run_vjp(grad_data);
    bool right = true;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t end = starts[static_cast<std::size_t>(row) + 1];
      for (std::int64_t e = starts[static_cast<std::size_t>(row)]; e < end && right; ++e) {
        const std::int64_t column = indices({e});
        real sum = 0;
        real magnitude = 0;
        if (column >= 0 && column < columns) {
          each_index(joined(batch, {d}), [&](const shape& at) {
            const shape b(at.begin(), at.end() - 1);
            const real term = static_cast<real>(grad(joined(b, {row, at.back()}))) *
                              x(joined(b, {column, at.back()}));
            sum += term;
            magnitude += std::abs(term);
          });
        }
        right = is_right(grad_data({e}), sum, magnitude, static_cast<real>(d * product(batch)));
      }
    }
    SUBQUAD_CHECK(right);
    SUBQUAD_CHECK(grad_data.gaps_untouched());
  }

  void check(bool adds, layout outputs = layout::contiguous) const {
    check_product(adds, outputs);
    check_vjp(outputs);
  }
};

// Rows of up to `most` elements, some of none.
std::vector<std::int64_t> some_rows(std::int64_t rows, std::int64_t most) {
  std::mt19937_64 engine(static_cast<std::uint64_t>(rows * 31 + most));
  std::uniform_int_distribution<std::int64_t> length(0, most);
  std::vector<std::int64_t> lengths;
  for (std::int64_t i = 0; i < rows; ++i) lengths.push_back(i % 5 == 3 ? 0 : length(engine));
  return lengths;
}

template <class T, class Index>
void sizes() {
  for (const std::int64_t d : {1, 2, 4, 5, 31, 64, 130, 300}) {
    for (const std::int64_t most : {1, 7, 70}) {
      problem<T, Index> each({}, some_rows(21, most), 17, d);
      each.scale = d % 2 == 0 ? 1 : -0.3;
      each.check(d % 3 == 0);
    }
  }
  for (const std::int64_t rows : {1, 255, 257, 600}) {
    problem<T, Index>({}, some_rows(rows, 1), 3, 1).check(true);
  }
  problem<T, Index>({}, {1}, 1, 1).check(false);
  // Around the length from which a row is a block's, with others beside it.
  for (const std::int64_t d : {1, 9, 130}) {
    problem<T, Index>({}, {3, 512, 0, 513, 900, 2}, 40, d).check(true);
  }
  problem<T, Index>({2}, {3000, 1}, 50, 3).check(false);
  // Nothing at all.
  problem<T, Index>({}, {}, 4, 3).check(true);
  problem<T, Index>({}, {0, 0, 0}, 4, 3).check(true);
  problem<T, Index>({}, {0, 0}, 0, 3).check(false);
  problem<T, Index>({}, {2, 1}, 4, 0).check(true);
  problem<T, Index>({0}, {2, 1}, 4, 3).check(false);
}

template <class T, class Index>
void layouts() {
  for (const layout how : kLayouts) {
    problem<T, Index>({3}, some_rows(9, 6), 8, 12, how).check(true);
    problem<T, Index>({3}, some_rows(9, 6), 8, 12).check(true, for_outputs(how));
    problem<T, Index>({2, 3}, some_rows(9, 6), 8, 7, how).check(false, for_outputs(how));
  }
}

// What an index out of range would lead to is left out; an infinity reaches its rows alone.
template <class T, class Index>
void special() {
  problem<T, Index> each({2}, {3, 2, 0, 4, 600}, 7, 5);
  each.indices({1}) = static_cast<Index>(-1);
  each.indices({3}) = static_cast<Index>(7);
  each.indices({20}) = std::numeric_limits<Index>::max();
  each.indices({5}) = static_cast<Index>(2);
  each.x({0, 2, 3}) = std::numeric_limits<T>::infinity();
  each.x({1, 6, 0}) = std::numeric_limits<T>::quiet_NaN();
  each.addend({2, 4}) = -std::numeric_limits<T>::infinity();
  each.check(true);
  // Rows that start beyond the elements have none.
  problem<T, Index> wrong({}, {2, 2, 2}, 3, 4);
  wrong.indptr({3}) = std::numeric_limits<Index>::max();
  wrong.check(true);
  wrong.indptr({0}) = std::numeric_limits<Index>::min();
  wrong.check(true);
  // Elements of no row have gradient 0.
  wrong.indptr({0}) = 1;
  wrong.indptr({3}) = 5;
  const strided_array<T> grad_data({6});
  wrong.run_vjp(grad_data);
  SUBQUAD_CHECK(grad_data({0}) == 0 && grad_data({1}) != 0);
  SUBQUAD_CHECK(grad_data({5}) == 0 && grad_data({4}) != 0);
}

template <class T, class Index>
void some() {
  problem<T, Index>({2}, {3, 700, 0, 5, 1}, 40, 9).check(true);
  problem<T, Index>({}, some_rows(40, 7), 17, 64).check(false);
  problem<T, Index>({}, some_rows(40, 7), 17, 1).check(false);
}

// The order of threads does not change a bit.
template <class T>
void orders() {
  const problem<T, std::int32_t> each({2}, {3, 700, 0, 5, 1}, 40, 9);
  const strided_array<T> first({2, 5, 9});
  const strided_array<T> first_grad({709});
  set_order(order::shuffled);
  each.run(first, true);
  each.run_vjp(first_grad);
  for (const order how : {order::ascending, order::descending}) {
    set_order(how);
    const strided_array<T> next({2, 5, 9});
    const strided_array<T> next_grad({709});
    each.run(next, true);
    each.run_vjp(next_grad);
    first.each([&](T& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next(at), sizeof(T)) == 0);
    });
    first_grad.each([&](T& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next_grad(at), sizeof(T)) == 0);
    });
  }
}

void errors() {
  const problem<float, std::int32_t> each({}, {2, 1}, 4, 3);
  const problem<float, std::int64_t> other({}, {2, 1}, 4, 3);
  const strided_array<float> out({2, 3});
  const strided_array<std::uint8_t> memory({64});
  SUBQUAD_CHECK(checks::throws<subquad::type_error>(
      [&] {
        subquad::core::csr_product(each.data.view(), each.indices.view(), other.indptr.view(),
                                   each.x.view(), nullptr, 1, out.view(), memory.view());
      },
      "indptr: expected int32, got int64"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::core::csr_product(each.data.view(), each.indices.view(), each.indptr.view(),
                                   each.x.view(), nullptr, 1, each.x.view(), memory.view());
      },
      "out: expected shape (..., rows, d)"));
}

template <class T, class Index>
void of_type(const char* name) {
  worst = 0;
  in_every_order(
      [] {
        sizes<T, Index>();
        layouts<T, Index>();
        special<T, Index>();
      },
      [] { some<T, Index>(); });
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_type<float, std::int32_t>("float32, int32");
  of_type<double, std::int64_t>("float64, int64");
  in_every_order([] { some<float, std::int64_t>(); }, [] { some<double, std::int32_t>(); });
  orders<float>();
  orders<double>();
  errors();
  return checks::status();
}
