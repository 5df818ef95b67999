// The reverse of the networks of sparse factors on CUDA, against long double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/factor_networks.hpp"
#include "factors_core.hpp"
#include "subquad/errors.hpp"

namespace {

using namespace factor_networks;

double worst = 0;  // error over bound

constexpr int kResults = 5;
constexpr const char* kNames[kResults] = {"grad_x", "grad_weight_in", "grad_bias_in",
                                          "grad_weight_out", "grad_bias_out"};

// Sums over the entries of a batch that share an array: what the array's own elements get.
struct shared_table {
  shape own;
  table sums;

  shared_table(const shape& batch, const shape& core) : own(batch), sums(joined(batch, core)) {}

  estimate& at(const shape& entry, const shape& index) {
    shape found;
    for (std::size_t axis = 0; axis < own.size(); ++axis) {
      found.push_back(own[axis] == 1 ? 0 : entry[entry.size() - own.size() + axis]);
    }
    return sums.values[sums.at(joined(found, index))];
  }
};

template <class T>
struct problem : network_case<T> {
  using network_case<T>::of;
  strided_array<T> grad;
  strided_array<T> results[kResults];

  explicit problem(const form& f)
      : network_case<T>(f),
        grad(joined(f.batch, {f.n_factors, f.n, f.k}), f.inputs),
        results{strided_array<T>(joined(f.batch, {f.n, f.d}), f.outputs),
                strided_array<T>(joined(f.weight_in_batch, {f.n_factors, f.h, f.d}), f.outputs),
                strided_array<T>(joined(f.bias_in_batch, {f.n_factors, f.h}), f.outputs),
                strided_array<T>(joined(f.weight_out_batch, {f.n_factors, f.k, f.h}), f.outputs),
                strided_array<T>(joined(f.bias_out_batch, {f.n_factors, f.k}), f.outputs)} {
    this->fill(grad, 1);
  }

  // Asks for those results whose bits are set.
  void run(unsigned wanted = 31) const {
    const auto bytes = static_cast<std::int64_t>(subquad::core::factor_values_vjp_workspace(
        this->entries(), of.n_factors, of.n, of.d, of.h, of.k, sizeof(T)));
    const strided_array<std::uint8_t> memory({bytes}, layout::unaligned);
    array_view views[kResults];
    const array_view* given[kResults];
    for (unsigned which = 0; which < kResults; ++which) {
      views[which] = results[which].view();
      given[which] = (wanted >> which & 1) != 0 ? &views[which] : nullptr;
    }
    subquad::core::factor_values_vjp(grad.view(), this->x.view(), this->weight_in.view(),
                                     this->bias_in.view(), this->weight_out.view(), given[0],
                                     given[1], given[2], given[3], given[4], memory.view());
  }

  void check(unsigned wanted = 31) const {
    const real u = kUnit<T>;
    const std::int64_t m_end = of.n_factors;
    shared_table expected[kResults] = {{of.batch, {of.n, of.d}},
                                       {of.weight_in_batch, {m_end, of.h, of.d}},
                                       {of.bias_in_batch, {m_end, of.h}},
                                       {of.weight_out_batch, {m_end, of.k, of.h}},
                                       {of.bias_out_batch, {m_end, of.k}}};
    // Tiles of 64, and no more parts than tiles, whose sums are added one by one.
    const real row_tiles = static_cast<real>(this->entries() * ((of.n + 63) / 64));
    const real unit_tiles = static_cast<real>(m_end * ((of.h + 63) / 64));
    const real over_units = product_unit<T>(64) + 2 * (unit_tiles + 2) * u;
    const real over_rows = product_unit<T>(64) + 2 * (row_tiles + 2) * u;
    each_index(of.batch, [&](const shape& entry) {
      table sums = this->sums(entry);
      table rows = part_of(this->x, entry, {of.n, of.d});
      table first_layer = part_of(this->weight_in, entry, {m_end, of.h, of.d});
      table second_layer = part_of(this->weight_out, entry, {m_end, of.k, of.h});
      table g = part_of(grad, entry, {m_end, of.n, of.k});
      for (std::int64_t m = 0; m < m_end; ++m) {
        for (std::int64_t i = 0; i < of.n; ++i) {
          for (std::int64_t k = 0; k < of.k; ++k) {
            estimate& sum = expected[4].at(entry, {m, k});
            sum.value += g(m, i, k).value;
            sum.error += 3 * u * std::abs(g(m, i, k).value);
          }
          for (std::int64_t j = 0; j < of.h; ++j) {
            const estimate& z = sums(m, i, j);
            const estimate hidden = gelu<T>(z, false);
            estimate product;
            for (std::int64_t k = 0; k < of.k; ++k) {
              add_product(product, g(m, i, k), second_layer(m, k, j), product_unit<T>(of.k));
              add_product(expected[3].at(entry, {m, k, j}), g(m, i, k), hidden, over_rows);
            }
            estimate p;
            add_product(p, product, gelu<T>(z, true), u);
            estimate& of_bias = expected[2].at(entry, {m, j});
            of_bias.value += p.value;
            of_bias.error += p.error + (32 + 2 * (row_tiles + 2)) * u * std::abs(p.value);
            for (std::int64_t t = 0; t < of.d; ++t) {
              add_product(expected[0].at(entry, {i, t}), p, first_layer(m, j, t), over_units);
              add_product(expected[1].at(entry, {m, j, t}), p, rows(i, t), over_rows);
            }
          }
        }
      }
    });
    for (unsigned which = 0; which < kResults; ++which) {
      SUBQUAD_CHECK(results[which].gaps_untouched());
      if ((wanted >> which & 1) == 0) {
        results[which].each([](T& element, const shape&) {
          unsigned char bytes[sizeof(T)];
          std::memcpy(bytes, &element, sizeof(T));
          SUBQUAD_CHECK(std::count(bytes, bytes + sizeof(T), 0xff) == sizeof(T));
        });
        continue;
      }
      results[which].each([&](T& element, const shape& index) {
        check_element(number(element), expected[which].sums.values[expected[which].sums.at(index)],
                      kNames[which], index, of, worst);
      });
    }
  }

  void run_and_check(unsigned wanted = 31) const {
    run(wanted);
    check(wanted);
  }
};

template <class T>
void sizes() {
  for (const form& f : edge_forms()) problem<T>(f).run_and_check();
  for (const std::int64_t n : {1, 33, 63, 64, 65}) problem<T>({1, n, 3, 5, 9}).run_and_check();
  problem<T>({3, 130, 65, 65, 17}).run_and_check();
  // Rows in several parts, of which the last is not whole.
  problem<T>({1, 600, 2, 3, 4}).run_and_check();
  for (unsigned wanted = 0; wanted < 31; ++wanted) {
    if (wanted < 8 || (wanted & (wanted - 1)) == 0) {
      problem<T>({2, 5, 4, 6, 3}).run_and_check(wanted);
    }
  }
}

template <class T>
void layouts() {
  for (const layout each :
       {layout::transposed, layout::spread, layout::reversed, layout::unaligned}) {
    form f = {2, 34, 37, 20, 5};
    f.inputs = each;
    f.outputs = each;
    problem<T>(f).run_and_check();
  }
  for (form f : batched_forms()) {
    f.inputs = f.batch.size() > 1 ? layout::spread : layout::contiguous;
    f.outputs = f.batch.size() > 1 ? layout::transposed : layout::contiguous;
    problem<T>(f).run_and_check();
  }
  form f = {3, 5, 4, 6, 2};
  f.inputs = layout::repeated;
  problem<T>(f).run_and_check();
  // Entries of the batch in several parts: all share the weights, or nine of each of two.
  problem<T>({1, 3, 2, 3, 2, {20}, {20}, {}, {}, {}, {}}).run_and_check();
  problem<T>({1, 2, 2, 3, 2, {2, 9}, {9}, {2, 1}, {2, 1}, {2, 1}, {2, 1}}).run_and_check();
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
    with([&](problem<T>& p) { set(p.grad, {m, f.n / 2, f.k / 2}, held); });
    with([&](problem<T>& p) { set(p.weight_in, {m, f.h / 2, f.d / 2}, held); });
    with([&](problem<T>& p) { set(p.bias_in, {m, f.h / 2}, held); });
    with([&](problem<T>& p) { set(p.weight_out, {m, f.k / 2, f.h / 2}, held); });
  }
}

// The same bits in every order of threads and blocks.
template <class T>
void orders() {
  const form f = {2, 66, 34, 66, 9};
  const problem<T> first(f);
  first.run();
  for (const order each : {order::ascending, order::descending, order::shuffled}) {
    set_order(each);
    const problem<T> next(f);
    next.run();
    next.check();
    for (int which = 0; which < kResults; ++which) {
      first.results[which].each([&](T& element, const shape& at) {
        SUBQUAD_CHECK(std::memcmp(&element, &next.results[which](at), sizeof(element)) == 0);
      });
    }
  }
  set_order(order::each_in_turn);
}

// However large the call, parts take bounded memory.
void workspaces() {
  const auto size = [](std::int64_t batch, std::int64_t n, std::int64_t itemsize) {
    return subquad::core::factor_values_vjp_workspace(batch, 14, n, 128, 128, 15, itemsize);
  };
  for (const std::int64_t batch : {1, 4, 1000}) {
    for (const std::int64_t n : {1, 100, 16384, 1 << 24}) {
      SUBQUAD_CHECK(size(batch, n, 4) <= std::size_t{9} << 20);
      SUBQUAD_CHECK(size(batch, n, 8) <= std::size_t{17} << 20);
    }
  }
}

void errors() {
  const problem<float> each({2, 3, 4, 5, 6});
  const strided_array<std::uint8_t> memory({32});
  const array_view result = each.results[0].view();
  const auto call = [&](const array_view& grad) {
    subquad::core::factor_values_vjp(grad, each.x.view(), each.weight_in.view(),
                                     each.bias_in.view(), each.weight_out.view(), &result, nullptr,
                                     nullptr, nullptr, nullptr, memory.view());
  };
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([&] { call(each.grad.view()); }, "workspace"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([&] { call(each.weight_in.view()); },
                                                          "grad: expected shape (..., M, n, K)"));
}

template <class T>
void of_type(const char* name) {
  worst = 0;
  sizes<T>();
  layouts<T>();
  special<T>({2, 3, 4, 6, 2});
  orders<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  special<float>({1, 66, 34, 10, 9});
  workspaces();
  errors();
  return checks::status();
}
