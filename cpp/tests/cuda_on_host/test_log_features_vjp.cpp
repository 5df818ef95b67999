// The reverse of the logarithms of random features on CUDA, against long double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/feature_maps.hpp"
#include "features_core.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace feature_maps;
using subquad::cuda::bfloat16;
using subquad::cuda::float16;
using subquad::cuda::on_host::each_index;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::set_order;

double worst = 0;  // error over bound

template <class S>
struct problem : feature_case<S> {
  using base = feature_case<S>;
  using sum = typename base::sum;
  using base::of;
  strided_array<sum> grad;
  strided_array<sum> grad_x;

  explicit problem(const form& f)
      : base(f),
        grad(joined(f.batch, {f.n, f.antithetic ? 2 * f.m : f.m}), f.inputs),
        grad_x(joined(f.batch, {f.n, f.d}), f.output) {
    this->fill(grad, 1);
  }

  void run() const {
    const optional_arrays given = this->optional();
    const auto bytes = static_cast<std::int64_t>(subquad::core::log_features_vjp_workspace(
        this->entries(), of.n, of.m, of.d, of.r, sizeof(S)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::log_features_vjp(grad.view(), this->x.view(), this->projection.view(), given[0],
                                    given[1], given[2], given[3], of.antithetic, grad_x.view(),
                                    memory.view());
  }

  void check() const {
    each_index(of.batch, [&](const shape& b) {
      for (std::int64_t i = 0; i < of.n; ++i) check_row(b, i);
    });
    SUBQUAD_CHECK(grad_x.gaps_untouched());
  }

  void run_and_check() const {
    run();
    check();
  }

  void check_row(const shape& b, std::int64_t i) const {
    const real u = kUnit<sum>;
    const std::vector<real> z = this->row(b, i);
    std::vector<real> h;
    real total = 0;
    real size = 0;
    for (std::int64_t j = 0; j < of.m; ++j) {
      const real first = number(grad(joined(b, {i, j})));
      const real second = of.antithetic ? number(grad(joined(b, {i, of.m + j}))) : 0;
      h.push_back(first - second);
      total += first + second;
      size += std::abs(first) + std::abs(second);
    }
    const real total_error = static_cast<real>(2 * of.m + 2) * u * size;
    std::vector<real> products;  // factor z
    for (std::int64_t k = 0; k < of.r; ++k) {
      products.push_back(this->product(z, this->factor, b, k).value);
    }
    const real unit = product_unit<sum>(of.m + (of.r > 0 ? of.d : 0));
    for (std::int64_t t = 0; t < of.d; ++t) {
      estimate found;
      for (std::int64_t j = 0; j < of.m; ++j) {
        const real term =
            h[static_cast<std::size_t>(j)] * number(this->projection(joined(b, {j, t})));
        found.value += term;
        found.error += (unit + u) * std::abs(term);
      }
      real rest = 0;
      real rest_size = 0;
      real rest_error = 0;
      const auto add = [&](real part, real error) {
        rest += part;
        rest_size += std::abs(part);
        rest_error += error * std::abs(part);
      };
      if (this->has_linear) add(number(this->linear(joined(b, {t}))), u);
      if (this->has_diagonal) {
        // z, and the difference.
        add(-number(this->diagonal(joined(b, {t}))) * z[static_cast<std::size_t>(t)], 2 * u);
      }
      for (std::int64_t k = 0; k < of.r; ++k) {
        const real each = number(this->factor(joined(b, {k, t})));
        add(-each * products[static_cast<std::size_t>(k)], 0);
        // Elements of the form, z and its product with the total, and the product of both.
        for (std::int64_t s = 0; s < of.d; ++s) {
          const real part =
              z[static_cast<std::size_t>(s)] * each * number(this->factor(joined(b, {k, s})));
          rest_size += std::abs(part);
          rest_error += (static_cast<real>(of.r + 3) * u + unit) * std::abs(part);
        }
      }
      if (this->has_linear || this->has_diagonal || of.r > 0) {
        found.value += total * rest;
        found.error += (std::abs(total) + total_error) * rest_error + total_error * rest_size;
      }
      found.error += 2 * u * std::abs(found.value);
      const real computed = number(grad_x(joined(b, {i, t})));
      if (holds(computed, found, worst)) continue;
      std::printf(
          "row %d element %d (n %d m %d d %d r %d, %d bytes): %.9Lg, expected %.9Lg within "
          "%.3Lg\n",
          int(i), int(t), int(of.n), int(of.m), int(of.d), int(of.r), int(sizeof(S)), computed,
          found.value, found.error);
      SUBQUAD_CHECK(false);
    }
  }
};

template <class S>
void random(const form& f) {
  problem<S>(f).run_and_check();
}

template <class S>
void sizes() {
  for (const std::int64_t m : {0, 1, 3, 15, 16, 17, 31, 32, 33, 64, 70}) {
    random<S>({5, m, 7, 3, true, true});
    random<S>({3, m, 4});
  }
  // Around the rows of a tile, around its columns, and the chunks of the form.
  for (const std::int64_t n : {63, 65, 127, 128, 129}) random<S>({n, 5, 3, 2});
  for (const std::int64_t d : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129}) {
    random<S>({3, 6, d, 5, true, true});
  }
  random<S>({3, 5, 6, 300});
  random<S>({0, 4, 3});
  random<S>({4, 3, 0, 0});
  random<S>({4, 5, 3, 2, true, false, {0}, {0}});
  random<S>({130, 100, 70, 20, true, true});
  // Each of what is optional alone.
  for (int which = 0; which < 4; ++which) {
    problem<S> each({5, 9, 4, which == 3 ? 3 : 0, false});
    (which == 0 ? each.has_diagonal : which == 1 ? each.has_shift : each.has_linear) = which < 3;
    each.run_and_check();
  }
}

template <class S>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = {34, 40, 67, 7, true, true};
    f.inputs = each;
    f.output = each;
    random<S>(f);
  }
  form f = {6, 20, 8, 3, true, true, {2, 3}, {2, 3}, {3}};
  random<S>(f);
  f.inputs = layout::spread;
  f.output = layout::transposed;
  random<S>(f);
  f = {6, 9, 8, 3, true, false, {3}, {3}, {3}};
  f.inputs = layout::repeated;
  random<S>(f);
  // In dimensions that do not lie regularly, of the map alone, and of all but the map.
  random<S>({4, 5, 3, 2, true, false, {2, 3, 2}, {2, 1, 2}, {3, 1}});
  random<S>({4, 5, 3, 2, true, false, {4}, {}, {4}});
  random<S>({4, 5, 3, 2, true, false, {4}, {4}, {}});
}

template <class S>
void special(std::int64_t n, std::int64_t m, std::int64_t d, std::int64_t r) {
  const auto with = [&](const std::function<void(problem<S>&)>& change) {
    for (const bool has_vectors : {true, false}) {
      problem<S> each({n, m, d, r, has_vectors, true});
      change(each);
      each.run_and_check();
    }
  };
  for (const double held : {kInfinity, -kInfinity, kNan}) {
    with([&](problem<S>& p) { set(p.grad, {n / 2, m / 2}, held); });
    with([&](problem<S>& p) { set(p.x, {n / 2, d / 2}, held); });
    with([&](problem<S>& p) { set(p.projection, {m / 2, d / 2}, held); });
    with([&](problem<S>& p) { set(p.diagonal, {d / 2}, held); });
    with([&](problem<S>& p) { set(p.linear, {d / 2}, held); });
    with([&](problem<S>& p) { set(p.shift, {d / 2}, held); });
    if (r > 0) with([&](problem<S>& p) { set(p.factor, {r / 2, d / 2}, held); });
  }
}

// A form that overflows where what it serves for does not.
template <class S>
void large() {
  const double size = sizeof(arithmetic_t<S>) == 8 ? 1e160 : 1e20;
  problem<S> each({3, 5, 4, 2, false});
  each.x.each([&](S& element, const shape&) { element = rounded<S>(number(element) / size); });
  each.factor.each([&](auto& element, const shape&) {
    element = static_cast<std::remove_reference_t<decltype(element)>>(number(element) * size);
  });
  each.run_and_check();
}

// Products of 1 + 3 * 2^-13 without that of the low parts, which plain arithmetic would keep: rows
// that need not be computed again are not.
void unsettled() {
  constexpr float kElement = 1 + 3 * 0x1p-13f;
  constexpr float kProduct = 1 + 6 * 0x1p-13f;
  problem<float> each({130, 70, 66, 2, false, true, {2}, {2}, {}});
  each.grad.each([&](float& element, const shape& at) { element = at[2] < 70 ? kElement : 0.0f; });
  each.projection.each([](float& element, const shape&) { element = kElement; });
  each.factor.each([](float& element, const shape&) { element = 0; });
  each.run();
  each.grad_x.each([](float& element, const shape&) { SUBQUAD_CHECK(element == 70 * kProduct); });
}

// More entries of the batch than forms fit into the workspace at a time.
void cut() {
  constexpr std::int64_t kEntries = 64;
  const auto bytes = subquad::core::log_features_vjp_workspace(kEntries, 2, 3, 130, 1, 8);
  SUBQUAD_CHECK(bytes < kEntries * 130 * 130 * 8);
  const problem<double> each({2, 3, 130, 1, false, false, {kEntries}, {1}, {kEntries}});
  each.run();
  for (const std::int64_t b : {0, 61, 62, 63}) {
    each.check_row({b}, 1);
  }
}

// The same bits in every order of threads and blocks.
template <class S>
void orders() {
  const form f = {130, 70, 66, 5, true, true};
  const problem<S> first(f);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<S> next(f);
    next.run();
    next.check();
    first.grad_x.each([&](auto& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.grad_x(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

void errors() {
  const problem<float> each({3, 5, 4, 2});
  const strided_array<std::uint8_t> memory({32});
  const optional_arrays given = each.optional();
  const auto call = [&](const array_view& grad) {
    subquad::core::log_features_vjp(grad, each.x.view(), each.projection.view(), given[0], given[1],
                                    given[2], given[3], false, each.grad_x.view(), memory.view());
  };
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([&] { call(each.grad.view()); }, "workspace"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call(each.x.view()); },
                                                          "grad: expected shape (..., n, m)"));
}

template <class S>
void of_storage(const char* name) {
  worst = 0;
  sizes<S>();
  layouts<S>();
  special<S>(4, 6, 3, 2);
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

// Beside the type of x, all is as in float32.
template <class S>
void of_words(const char* name) {
  worst = 0;
  random<S>({5, 33, 7, 3, true, true});
  random<S>({130, 20, 67, 2});
  if (std::is_same_v<S, float16>) {
    layouts<S>();
  } else {
    special<S>(4, 6, 3, 2);
  }
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_storage<float>("float32");
  of_storage<double>("float64");
  of_words<float16>("float16");
  of_words<bfloat16>("bfloat16");
  special<float>(3, 34, 40, 3);
  special<float>(70, 6, 3, 2);
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    unsettled();
  }
  set_order(order::each_in_turn);
  large<float>();
  large<double>();
  cut();
  orders<float>();
  orders<double>();
  errors();
  return checks::status();
}
