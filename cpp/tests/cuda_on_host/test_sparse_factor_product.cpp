// Products of sparse factors on CUDA and their reverse, against the same sums in long double.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"
#include "cuda_on_host/executor.hpp"
#include "cuda_on_host/factor_chains.hpp"
#include "cuda_on_host/indexed.hpp"
#include "subquad/errors.hpp"

namespace {

using subquad::residual_type;
using subquad::cuda::on_host::chain_problem;
using subquad::cuda::on_host::chain_shape;
using subquad::cuda::on_host::for_outputs;
using subquad::cuda::on_host::in_every_order;
using subquad::cuda::on_host::joined;
using subquad::cuda::on_host::kLayouts;
using subquad::cuda::on_host::layout;
using subquad::cuda::on_host::order;
using subquad::cuda::on_host::set_order;
using subquad::cuda::on_host::strided_array;
using shape = subquad::cuda::on_host::shape_list;

double worst = 0;  // error over bound

constexpr residual_type kResiduals[] = {residual_type::none, residual_type::step,
                                        residual_type::input};

// Few channels of more rows than this have a launch for each factor; others, one for all.
constexpr std::int64_t kFusedRows = 1024;

template <class T>
void check(chain_problem<T>& each, layout outputs = layout::contiguous) {
  each.check_product(false, true, outputs);
  each.check_product(true, false, outputs);
  each.check_vjp(true, true, false, outputs);
  worst = std::max(worst, each.worst);
}

template <class T>
void check(const chain_shape& size, residual_type residual, bool circular = true,
           layout inputs = layout::contiguous, layout outputs = layout::contiguous) {
  chain_problem<T> each(size, inputs);
  each.residual = residual;
  each.circular = circular;
  check(each, outputs);
}

template <class T>
void sizes() {
  int turn = 0;
  for (const std::int64_t n : {1, 2, 7, 31, 32, 33, 70}) {
    for (const std::int64_t k : {1, 3, 9}) {
      check<T>({{}, {}, n, 3, k, 1 + turn % 6}, kResiduals[turn % 3], turn % 2 == 0);
      ++turn;
    }
  }
  for (const residual_type residual : kResiduals) {
    for (const std::int64_t factors : {0, 1, 2, 4}) {
      check<T>({{2}, {2}, 12, factors, 2, 5}, residual, factors % 2 == 0);
      check<T>({{}, {}, kFusedRows + 7, factors, 2, 3}, residual, factors % 2 == 1);
    }
    check<T>({{}, {}, 5, 3, 0, 2}, residual);
    check<T>({{}, {}, kFusedRows + 1, 2, 0, 2}, residual);
  }
  check<T>({{}, {}, 600, 2, 17, 2}, residual_type::step);  // more rows than threads
  for (const std::int64_t d : {8, 31, 130, 257}) {
    check<T>({{}, {}, 6, 2, 4, d}, residual_type::input);
  }
  check<T>({{}, {}, 4, 35, 9, 2}, residual_type::none);  // more offsets than a launch holds
  // Nothing at all.
  check<T>({{0}, {}, 4, 2, 3, 2}, residual_type::step);
  check<T>({{}, {}, 0, 2, 3, 2}, residual_type::input);
  check<T>({{}, {}, 4, 2, 3, 0}, residual_type::input);
  // 16 bytes of a row to a block of many.
  check<T>({{}, {34}, 3, 2, 2, 13}, residual_type::step);
  check<T>({{}, {34}, 3, 2, 2, 16}, residual_type::input);
}

template <class T>
void pieces() {
  for (const bool circular : {true, false}) {
    for (const residual_type residual : kResiduals) {
      for (const std::int64_t longest : {1, 4, 200}) {
        chain_problem<T> each({{}, {2}, 90, 2, 5, 3});
        each.residual = residual;
        each.circular = circular;
        each.cut(longest, longest == 4 ? layout::reversed : layout::contiguous);
        check(each);
      }
    }
    chain_problem<T> each({{}, {}, 1300, 2, 2, 1});
    each.circular = circular;
    each.cut(500, layout::spread);
    check(each);
  }
  // One run of more rows than a warp's look takes, and two.
  for (const std::int64_t border : {2199, 1500, 0}) {
    chain_problem<T> each({{}, {}, 2200, 1, 2, 1});
    each.cut(1);
    each.segments->each([&](std::int64_t& element, const shape& at) {
      element = at[0] < border ? std::numeric_limits<std::int64_t>::max() : -1;
    });
    each.check_product(false, false);
    each.check_product(true, false);
  }
}

template <class T>
void offsets() {
  constexpr auto kLeast = std::numeric_limits<std::int64_t>::min();
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t n : {std::int64_t{11}, kFusedRows + 6}) {
    for (const bool circular : {true, false}) {
      for (const bool cut : {true, false}) {
        chain_problem<T> each({{}, {}, n, 2, 6, 1});
        each.circular = circular;
        each.offsets = {kLeast,
                        kMost,
                        -n,
                        n,
                        n - 1,
                        1 - n,
                        3,
                        3,
                        -3,
                        std::int64_t{1} << 31,
                        -(std::int64_t{1} << 31),
                        0};
        if (cut) each.cut(6);
        check(each);
      }
    }
  }
}

template <class T>
void layouts() {
  for (const layout how : kLayouts) {
    for (const std::int64_t n : {std::int64_t{9}, kFusedRows + 2}) {
      check<T>({{1}, {1}, n, 3, 2, 4}, residual_type::step, true, how);
      check<T>({{1}, {1}, n, 3, 2, 4}, residual_type::input, true, layout::contiguous,
               for_outputs(how));
    }
    check<T>({{2}, {2}, 5, 2, 3, 3}, residual_type::input, false, how, for_outputs(how));
  }
  // Batches of one array, of the other, and of both.
  check<T>({{3, 1}, {2}, 6, 2, 3, 4}, residual_type::step);
  check<T>({{2, 1, 2}, {3, 1}, 4, 2, 2, 2}, residual_type::input, false);
  check<T>({{}, {3}, kFusedRows + 1, 2, 2, 2}, residual_type::step);
  check<T>({{2, 1}, {2}, kFusedRows + 1, 2, 2, 1}, residual_type::none);
}

// Rows that are aligned, in batches that are not.
template <class T>
void alignment() {
  for (const std::int64_t n : {std::int64_t{9}, kFusedRows + 1}) {
    chain_problem<T> each({{}, {2}, n, 2, 3, 4});
    const strided_array<T> expected({2, n, 4});
    each.run(false, expected, nullptr);
    const std::int64_t apart = n * 4 + 1;
    const strided_array<T> from({2 * apart});
    const strided_array<T> to({2 * apart});
    each.x.each(
        [&](T& element, const shape& at) { from({at[0] * apart + at[1] * 4 + at[2]}) = element; });
    const std::int64_t lengths[] = {2, n, 4};
    const std::int64_t strides[] = {apart, 4, 1};
    const auto strided = [&](const strided_array<T>& memory) {
      subquad::array_view view = memory.view();
      view.shape = lengths;
      view.strides = strides;
      view.ndim = 3;
      return view;
    };
    const strided_array<std::uint8_t> memory({static_cast<std::int64_t>(
        subquad::core::sparse_factor_product_workspace(2, 2, n, 3, 4, sizeof(T)))});
    subquad::core::sparse_factor_product(each.values.view(), strided(from), nullptr,
                                         each.offsets.data(), each.residual, true, false,
                                         strided(to), nullptr, memory.view());
    expected.each([&](T& element, const shape& at) {
      SUBQUAD_CHECK(to({at[0] * apart + at[1] * 4 + at[2]}) == element);
    });
  }
}

template <class T>
void gradients() {
  for (const std::int64_t n : {std::int64_t{13}, kFusedRows + 3}) {
    for (const residual_type residual : kResiduals) {
      for (const std::int64_t factors : {1, 3}) {
        chain_problem<T> each({{}, {}, n, factors, 2, 3});
        each.residual = residual;
        each.check_vjp(true, false, false);
        each.check_vjp(false, true, false);
        each.check_vjp(true, true, true);
        each.check_vjp(true, false, true, layout::transposed);
        each.check_vjp(false, false, false);
      }
    }
  }
}

// A term that is left out does not touch its row, nor does its value; another one does.
template <class T>
void special() {
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (const std::int64_t n : {std::int64_t{8}, kFusedRows + 1}) {
    for (const bool circular : {true, false}) {
      chain_problem<T> each({{}, {}, n, 2, 2, 2});
      each.circular = circular;
      each.offsets = {0, 3, 0, -2};
      each.x({n - 1, 1}) = kNaN;
      each.x({2, 0}) = kInfinity;
      each.grad({n - 2, 0}) = -kInfinity;
      each.values({0, n - 1, 1}) = kNaN;  // its term lies beyond the end
      each.values({1, 4, 0}) = T(0);
      check(each);
    }
  }
}

template <class T>
bool equal(const strided_array<T>& a, const strided_array<T>& b) {
  bool same = true;
  a.each([&](T& element, const shape& at) {
    same = same && std::memcmp(&element, &b(at), sizeof(T)) == 0;
  });
  return same;
}

// Neither the order of threads nor the way through memory changes a bit.
template <class T>
void orders() {
  for (const residual_type residual : kResiduals) {
    const auto fill = [&](chain_problem<T>& each) {
      each.residual = residual;
      each.offsets = {0, 1, 700, -3, 5, 1, 9, -400, 2};
      each.values.each([](T& element, const shape& at) {
        element = T(0.37) * static_cast<T>((at[0] * 7 + at[1] * 3 + at[2]) % 11) - T(1.7);
      });
      each.x.each([](T& element, const shape& at) {
        const std::size_t row = at.size() - 2;
        element = T(0.21) * static_cast<T>((at[row] * 5 + at[row + 1]) % 13) - T(1.1);
      });
    };
    constexpr std::int64_t kRows = kFusedRows + 5;
    chain_problem<T> one({{}, {}, kRows, 3, 3, 2});
    // Enough batches for a launch of all factors.
    constexpr std::int64_t kBatches = 128 / sizeof(T);
    chain_problem<T> many({{}, {kBatches}, kRows, 3, 3, 2});
    fill(one);
    fill(many);
    for (const bool transpose : {false, true}) {
      std::vector<strided_array<T>> results;
      for (const order how : {order::ascending, order::descending, order::shuffled}) {
        set_order(how);
        results.emplace_back(shape{kRows, 2});
        one.run(transpose, results.back(), nullptr);
        SUBQUAD_CHECK(equal(results.back(), results.front()));
      }
      const strided_array<T> fused({kBatches, kRows, 2});
      many.run(transpose, fused, nullptr);
      bool same = true;
      results.front().each([&](T& element, const shape& at) {
        same = same && std::memcmp(&element, &fused(joined({1}, at)), sizeof(T)) == 0;
      });
      SUBQUAD_CHECK(same);
    }
  }
  set_order(order::shuffled);
}

// More values than are held in columns at a time.
void many_values() {
  chain_problem<double> each({{3, 1}, {19}, 1000, 3, 50, 1});
  each.residual = residual_type::input;
  each.check_product(true, false);
  worst = std::max(worst, each.worst);
}

void errors() {
  chain_problem<float> each({{}, {}, 40, 2, 3, 2});
  const strided_array<float> out({40, 2});
  const strided_array<float> between({1, 40, 2});
  const strided_array<float> grad_values({2, 40, 3});
  const strided_array<std::uint8_t> small({1});
  const subquad::array_view intermediates = between.view();
  const subquad::array_view of_values = grad_values.view();
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] { each.run(true, out, &between); }, "intermediates: expected none of a transpose"));
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::core::sparse_factor_product(each.values.view(), each.x.view(), nullptr,
                                             each.offsets.data(), residual_type::none, true, false,
                                             out.view(), &intermediates, small.view());
      },
      "workspace: expected at least as many bytes"));
  const strided_array<std::uint8_t> without({static_cast<std::int64_t>(
      subquad::core::sparse_factor_product_vjp_workspace(1, 2, 40, 3, 2, 4, false))});
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>(
      [&] {
        subquad::core::sparse_factor_product_vjp(
            each.grad.view(), each.values.view(), each.x.view(), nullptr, nullptr,
            each.offsets.data(), residual_type::none, true, &of_values, nullptr, without.view());
      },
      "workspace: expected at least as many bytes"));
}

template <class T>
void all() {
  sizes<T>();
  pieces<T>();
  offsets<T>();
  layouts<T>();
  alignment<T>();
  gradients<T>();
  special<T>();
}

// What shows threads in a wrong order.
template <class T>
void some() {
  check<T>({{}, {2}, 70, 3, 9, 3}, residual_type::input);
  check<T>({{}, {}, kFusedRows + 7, 3, 9, 3}, residual_type::step, false);
  chain_problem<T> each({{}, {2}, 90, 2, 5, 3});
  each.cut(40);
  check(each);
}

template <class T>
void of_type(const char* name) {
  worst = 0;
  in_every_order([] { all<T>(); }, [] { some<T>(); });
  orders<T>();
  std::printf("%s: largest error over bound %.3f\n", name, worst);
}

}  // namespace

int main() {
  of_type<float>("float32");
  of_type<double>("float64");
  many_values();
  errors();
  return checks::status();
}
