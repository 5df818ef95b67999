// The values of sparse factors on CUDA, against long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>

#include "check.hpp"
#include "cuda/factor_values.cuh"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/factor_networks.hpp"
#include "factors_core.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace factor_networks;

double worst = 0;  // error over bound

template <class T>
struct problem : network_case<T> {
  using network_case<T>::of;
  strided_array<T> out;

  explicit problem(const form& f)
      : network_case<T>(f), out(joined(f.batch, {f.n_factors, f.n, f.k}), f.outputs) {}

  void run() const {
    const auto bytes = static_cast<std::int64_t>(subquad::core::factor_values_workspace(
        this->entries(), of.n_factors, of.n, of.d, of.h, of.k, sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    subquad::core::factor_values(this->x.view(), this->weight_in.view(), this->bias_in.view(),
                                 this->weight_out.view(), this->bias_out.view(), out.view(),
                                 memory.view());
  }

  void check() const {
    each_index(of.batch, [&](const shape& entry) { check_entry(entry); });
    SUBQUAD_CHECK(out.gaps_untouched());
  }

  void check_entry(const shape& entry) const {
    table z = this->sums(entry);
    table weights = part_of(this->weight_out, entry, {of.n_factors, of.k, of.h});
    table biases = part_of(this->bias_out, entry, {of.n_factors, of.k});
    // The units of a row go to two warps.
    const real unit = product_unit<T>(of.h) + kUnit<T>;
    for (std::int64_t m = 0; m < of.n_factors; ++m) {
      for (std::int64_t i = 0; i < of.n; ++i) {
        for (std::int64_t j = 0; j < of.h; ++j) z(m, i, j) = gelu<T>(z(m, i, j), false);
        for (std::int64_t k = 0; k < of.k; ++k) {
          estimate sum;
          for (std::int64_t j = 0; j < of.h; ++j) {
            add_product(sum, z(m, i, j), weights(m, k, j), unit);
          }
          sum.value += biases(m, k).value;
          sum.error += kUnit<T> * std::abs(sum.value);
          const shape index = joined(entry, {m, i, k});
          check_element(number(out(index)), sum, "out", index, of, worst);
        }
      }
    }
  }

  void run_and_check() const {
    run();
    check();
  }
};

template <class T>
void sizes() {
  for (const form& f : edge_forms()) problem<T>(f).run_and_check();
  for (const std::int64_t n : {1, 33, 63, 64, 65, 127, 128, 129}) {
    problem<T>({1, n, 3, 5, 9}).run_and_check();
  }
  // Around the units of a tile, and the elements of a row that a block computes.
  for (const std::int64_t h : {63, 64, 129}) problem<T>({1, 5, 4, h, 7}).run_and_check();
  for (const std::int64_t k : {8, 31, 32, 33}) problem<T>({1, 5, 4, 7, k}).run_and_check();
  problem<T>({3, 130, 65, 65, 17}).run_and_check();
}

template <class T>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = {2, 34, 37, 67, 5};
    f.inputs = each;
    f.outputs = each;
    problem<T>(f).run_and_check();
  }
  for (form f : batched_forms()) {
    problem<T>(f).run_and_check();
    f.inputs = layout::spread;
    f.outputs = layout::transposed;
    problem<T>(f).run_and_check();
  }
  form f = {3, 5, 4, 6, 2};
  f.inputs = layout::repeated;
  problem<T>(f).run_and_check();
}

template <class T>
void special(const form& f) {
  const auto with = [&](const std::function<void(problem<T>&)>& change) {
    problem<T> each(f);
    change(each);
    each.run_and_check();
  };
  const std::int64_t m = f.n_factors - 1;
  for (const double held : {kInfinity, -kInfinity, kNan}) {
    with([&](problem<T>& p) { set(p.x, {f.n / 2, f.d / 2}, held); });
    with([&](problem<T>& p) { set(p.weight_in, {m, f.h / 2, f.d / 2}, held); });
    with([&](problem<T>& p) { set(p.bias_in, {m, f.h / 2}, held); });
    with([&](problem<T>& p) { set(p.weight_out, {m, f.k / 2, f.h / 2}, held); });
    with([&](problem<T>& p) { set(p.bias_out, {m, f.k / 2}, held); });
    // Every unit of a row positive, or every one negative.
    with([&](problem<T>& p) {
      set(p.x, {f.n / 2, f.d / 2}, held);
      for (std::int64_t j = 0; j < f.h; ++j) set(p.weight_in, {m, j, f.d / 2}, 1);
    });
  }
}

// Products of 1 + 3 * 2^-13 without that of the low parts, which plain arithmetic would keep: rows
// that need not be computed again are not. Units are 16 times as large, where gelu is the identity.
void unsettled() {
  constexpr float kElement = 1 + 3 * 0x1p-13f;
  constexpr float kProduct = 16 * (1 + 6 * 0x1p-13f);
  problem<float> each({2, 130, 1, 1, 3});
  each.x.each([](float& element, const shape&) { element = kElement; });
  each.weight_in.each([](float& element, const shape&) { element = 16 * kElement; });
  each.bias_in.each([](float& element, const shape&) { element = 0; });
  each.weight_out.each([](float& element, const shape&) { element = 1; });
  each.bias_out.each([](float& element, const shape&) { element = 0; });
  each.run();
  each.out.each([](float& element, const shape&) { SUBQUAD_CHECK(element == kProduct); });
}

// The same bits in every order of threads and blocks.
template <class T>
void orders() {
  const form f = {2, 130, 35, 66, 9};
  const problem<T> first(f);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<T> next(f);
    next.run();
    next.check();
    first.out.each([&](T& element, const shape& at) {
      SUBQUAD_CHECK(std::memcmp(&element, &next.out(at), sizeof(element)) == 0);
    });
  }
  set_order(order::each_in_turn);
}

// The distribution function and the density themselves, within what they say.
template <class T>
void normal_numbers() {
  real of_tail = 0;
  real of_density = 0;
  const real u = kUnit<T>;
  const real least = sizeof(T) == 8 ? 0x1p-1020L : 0x1p-126L;
  for (int i = -40000; i <= 40000; ++i) {
    const T z = static_cast<T>(i * 0x1.5p-11);
    T probability;
    T density;
    subquad::cuda::normal_parts(z, probability, density);
    const real square = static_cast<real>(z) * z;
    const real tail = std::erfc(std::abs(static_cast<real>(z)) / std::sqrt(2.0L)) / 2;
    const real bell = std::exp(-square / 2) / std::sqrt(2 * std::acos(-1.0L));
    const real bound = (2 * square + (sizeof(T) == 8 ? 12 : 6)) * u * tail + least;
    const real expected = z < 0 ? tail : 1 - tail;
    of_tail = std::max(of_tail, std::abs(probability - expected) / (z < 0 ? bound : bound + u));
    of_density = std::max(of_density, std::abs(density - bell) / ((square + 6) * u * bell + least));
  }
  std::printf("probability %.3f, density %.3f of their bounds\n", double(of_tail),
              double(of_density));
  SUBQUAD_CHECK(of_tail <= 1 && of_density <= 1);
  const T infinite = static_cast<T>(kInfinity);
  SUBQUAD_CHECK(subquad::cuda::gelu(infinite) == infinite);
  SUBQUAD_CHECK(subquad::cuda::gelu(-infinite) == 0);
  SUBQUAD_CHECK(std::isnan(subquad::cuda::gelu(static_cast<T>(kNan))));
  SUBQUAD_CHECK(subquad::cuda::gelu(T(0)) == 0);
  SUBQUAD_CHECK(subquad::cuda::gelu_derivative(infinite) == 1);
  SUBQUAD_CHECK(subquad::cuda::gelu_derivative(-infinite) == 0);
  SUBQUAD_CHECK(std::isnan(subquad::cuda::gelu_derivative(static_cast<T>(kNan))));
}

void errors() {
  const problem<float> each({2, 3, 4, 5, 6});
  const strided_array<std::uint8_t> memory({64});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::core::factor_values(each.x.view(), each.weight_in.view(), each.bias_in.view(),
                                     each.weight_in.view(), each.bias_out.view(), each.out.view(),
                                     memory.view());
      },
      "weight_out: expected shape (..., M, K, h)"));
}

template <class T>
void of_type(const char* name) {
  worst = 0;
  sizes<T>();
  layouts<T>();
  special<T>({2, 3, 4, 6, 2});
  orders<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst);
  normal_numbers<T>();
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  special<float>({1, 66, 34, 70, 34});
  unsettled();
  errors();
  return checks::status();
}
