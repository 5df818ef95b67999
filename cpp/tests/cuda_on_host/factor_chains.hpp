// Chains of sparse factors of any layout, and what they give in long double.
#ifndef SUBQUAD_CUDA_ON_HOST_FACTOR_CHAINS_HPP
#define SUBQUAD_CUDA_ON_HOST_FACTOR_CHAINS_HPP

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"
#include "factors_core.hpp"
#include "strided.hpp"

namespace subquad::cuda::on_host {

using real = long double;

// Numbers, and the sums of the sizes of what they are sums of.
struct sized_numbers {
  std::vector<real> values;
  std::vector<real> sizes;

  explicit sized_numbers(std::int64_t count)
      : values(static_cast<std::size_t>(count)), sizes(values) {}
  void add(std::int64_t at, real value, real size) {
    values[static_cast<std::size_t>(at)] += value;
    sizes[static_cast<std::size_t>(at)] += size;
  }
  void add(const sized_numbers& other) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] += other.values[i];
      sizes[i] += other.sizes[i];
    }
  }
  real value(std::int64_t at) const { return values[static_cast<std::size_t>(at)]; }
  real size(std::int64_t at) const { return sizes[static_cast<std::size_t>(at)]; }
};

struct chain_shape {
  shape_list values_batch;
  shape_list x_batch;
  std::int64_t n;
  std::int64_t n_factors;
  std::int64_t k;
  std::int64_t d;
};

template <class T>
struct chain_problem {
  chain_shape size;
  shape_list batch;  // broadcast
  residual_type residual = residual_type::none;
  bool circular = true;
  std::vector<std::int64_t> offsets;
  std::unique_ptr<strided_array<std::int64_t>> segments;
  strided_array<T> values;
  strided_array<T> x;
  strided_array<T> grad;
  std::mt19937_64 engine;
  double worst = 0;  // error over bound

  explicit chain_problem(const chain_shape& lengths, layout inputs = layout::contiguous)
      : size(lengths),
        batch(broadcast(lengths.values_batch, lengths.x_batch)),
        values(joined(lengths.values_batch, {lengths.n_factors, lengths.n, lengths.k}), inputs),
        x(joined(lengths.x_batch, {lengths.n, lengths.d}), inputs),
        grad(joined(batch, {lengths.n, lengths.d}), inputs),
        engine(static_cast<std::uint64_t>(lengths.n * 100 + lengths.d)) {
    std::normal_distribution<double> normal;
    const auto fill = [&](T& element, const shape_list&) {
      element = static_cast<T>(normal(engine));
    };
    values.each(fill);
    x.each(fill);
    grad.each(fill);
    // Within the sequence, beyond it, and on both sides.
    const std::int64_t reach = 3 * std::max<std::int64_t>(1, lengths.n);
    std::uniform_int_distribution<std::int64_t> any(-reach, reach);
    for (std::int64_t i = 0; i < lengths.n_factors * lengths.k; ++i) {
      offsets.push_back(i % 3 == 0 ? i / 3 % 4 : any(engine));
    }
  }

  // Runs of at most `longest` rows, the same numbers again and again.
  void cut(std::int64_t longest, layout how = layout::contiguous) {
    segments = std::make_unique<strided_array<std::int64_t>>(shape_list{size.n}, how);
    std::uniform_int_distribution<std::int64_t> length(1, longest);
    std::int64_t left = length(engine);
    std::int64_t number = 5;
    segments->each([&](std::int64_t& element, const shape_list&) {
      if (left-- == 0) {
        left = length(engine) - 1;
        number = number == 5 ? -7 : 5;
      }
      element = number;
    });
  }

  std::int64_t batches() const { return product(batch); }

  // ---- truth, for one index of the batch

  // The rows of all terms; -1: left out.
  std::vector<std::int64_t> rows() const {
    std::vector<std::int64_t> all;
    for (std::int64_t m = 0; m < size.n_factors; ++m) {
      std::int64_t start = 0;
      std::int64_t end = 0;
      for (std::int64_t i = 0; i < size.n; ++i) {
        if (i == end) {
          start = i;
          while (end < size.n && (!segments || (*segments)({end}) == (*segments)({start}))) ++end;
        }
        for (std::int64_t k = 0; k < size.k; ++k) {
          const std::int64_t offset = offsets[static_cast<std::size_t>(m * size.k + k)];
          const std::int64_t length = end - start;
          if (circular) {
            all.push_back(start + ((i - start + offset % length) % length + length) % length);
          } else {
            const bool is_far = offset <= -size.n || offset >= size.n;
            const std::int64_t other = is_far ? -1 : i + offset;
            all.push_back(other >= start && other < end ? other : -1);
          }
        }
      }
    }
    return all;
  }

  sized_numbers load(const strided_array<T>& from, const shape_list& b) const {
    sized_numbers all(size.n * size.d);
    for (std::int64_t i = 0; i < size.n; ++i) {
      for (std::int64_t c = 0; c < size.d; ++c) {
        const real value = from(joined(b, {i, c}));
        all.add(i * size.d + c, value, std::abs(value));
      }
    }
    return all;
  }

  sized_numbers multiply(const shape_list& b, std::int64_t m, bool transpose,
                         const sized_numbers& from,
                         const std::vector<std::int64_t>& term_rows) const {
    sized_numbers to(size.n * size.d);
    for (std::int64_t i = 0; i < size.n; ++i) {
      for (std::int64_t k = 0; k < size.k; ++k) {
        const std::int64_t j = term_rows[static_cast<std::size_t>((m * size.n + i) * size.k + k)];
        if (j < 0) continue;
        const real w = values(joined(b, {m, i, k}));
        for (std::int64_t c = 0; c < size.d; ++c) {
          const std::int64_t at = (transpose ? i : j) * size.d + c;
          to.add((transpose ? j : i) * size.d + c, w * from.value(at), std::abs(w) * from.size(at));
        }
      }
    }
    return to;
  }

  // v_0, ..., v_M.
  std::vector<sized_numbers> forward(const shape_list& b,
                                     const std::vector<std::int64_t>& term_rows) const {
    std::vector<sized_numbers> states{load(x, b)};
    for (std::int64_t m = 0; m < size.n_factors; ++m) {
      sized_numbers next = multiply(b, m, false, states.back(), term_rows);
      if (residual == residual_type::step) next.add(states.back());
      if (residual == residual_type::input) next.add(states.front());
      states.push_back(std::move(next));
    }
    return states;
  }

  // The gradients of v_0 (what comes out), v_1, ..., v_M (`from` itself).
  std::vector<sized_numbers> backward(const shape_list& b, const strided_array<T>& from,
                                      const std::vector<std::int64_t>& term_rows) const {
    std::vector<sized_numbers> states{load(from, b)};
    sized_numbers sum(size.n * size.d);
    for (std::int64_t m = size.n_factors; m-- > 0;) {
      sum.add(states.front());
      sized_numbers next = multiply(b, m, true, states.front(), term_rows);
      if (residual == residual_type::step) next.add(states.front());
      states.insert(states.begin(), std::move(next));
    }
    if (residual == residual_type::input && size.n_factors > 0) states.front().add(sum);
    return states;
  }

  // ---- comparison

  // A number of which every product went through at most `roundings` of them.
  bool is_right(real found, real expected, real magnitude, std::int64_t roundings) {
    if (std::isnan(expected)) return std::isnan(found);
    if (std::isinf(expected)) return found == expected;
    const real u = sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L;
    const real bound = 1.001L * static_cast<real>(roundings) * u * magnitude;
    const real error = std::abs(found - expected);
    if (error <= bound && bound > 0) worst = std::max(worst, static_cast<double>(error / bound));
    if (error <= bound) return true;
    std::printf("n %d, M %d, K %d, d %d, %d bytes: %.9Lg, expected %.9Lg within %.3Lg\n",
                int(size.n), int(size.n_factors), int(size.k), int(size.d), int(sizeof(T)), found,
                expected, bound);
    return false;
  }

  // A product's sum and the residual at every factor, and the sum of the inputs of all.
  std::int64_t roundings() const { return (size.k + 2) * size.n_factors + 1; }

  bool rows_are_right(const strided_array<T>& found, const shape_list& at,
                      const sized_numbers& expected) {
    for (std::int64_t i = 0; i < size.n; ++i) {
      for (std::int64_t c = 0; c < size.d; ++c) {
        const std::int64_t element = i * size.d + c;
        if (!is_right(found(joined(at, {i, c})), expected.value(element), expected.size(element),
                      roundings())) {
          return false;
        }
      }
    }
    return true;
  }

  void check_product(bool transpose, bool with_intermediates, layout outputs = layout::contiguous) {
    const std::int64_t between = std::max<std::int64_t>(0, size.n_factors - 1);
    const strided_array<T> out(joined(batch, {size.n, size.d}), outputs);
    const strided_array<T> intermediates(joined(batch, {between, size.n, size.d}), outputs);
    run(transpose, out, with_intermediates ? &intermediates : nullptr);
    const std::vector<std::int64_t> term_rows = rows();
    bool right = true;
    each_index(batch, [&](const shape_list& b) {
      if (!right) return;
      if (transpose) {
        right = rows_are_right(out, b, backward(b, x, term_rows).front());
        return;
      }
      const std::vector<sized_numbers> states = forward(b, term_rows);
      right = rows_are_right(out, b, states.back());
      for (std::int64_t m = 0; with_intermediates && m < between; ++m) {
        right = right && rows_are_right(intermediates, joined(b, {m}),
                                        states[static_cast<std::size_t>(m) + 1]);
      }
    });
    SUBQUAD_CHECK(right);
    SUBQUAD_CHECK(out.gaps_untouched() && intermediates.gaps_untouched());
  }

  void run(bool transpose, const strided_array<T>& out, const strided_array<T>* intermediates) {
    const strided_array<std::uint8_t> memory(
        {static_cast<std::int64_t>(core::sparse_factor_product_workspace(
            batches(), size.n_factors, size.n, size.k, size.d, sizeof(T)))});
    const array_view parts[] = {segments ? segments->view() : array_view{},
                                intermediates ? intermediates->view() : array_view{}};
    core::sparse_factor_product(values.view(), x.view(), segments ? &parts[0] : nullptr,
                                offsets.data(), residual, circular, transpose, out.view(),
                                intermediates ? &parts[1] : nullptr, memory.view());
  }

  void check_vjp(bool wants_values, bool wants_x, bool given, layout outputs = layout::contiguous) {
    const std::int64_t between = std::max<std::int64_t>(0, size.n_factors - 1);
    const strided_array<T> intermediates(joined(batch, {between, size.n, size.d}), outputs);
    if (given) {
      const strided_array<T> out(joined(batch, {size.n, size.d}));
      run(false, out, &intermediates);
    }
    const strided_array<T> grad_values(joined(batch, {size.n_factors, size.n, size.k}), outputs);
    const strided_array<T> grad_x(joined(batch, {size.n, size.d}), outputs);
    run_vjp(given ? &intermediates : nullptr, wants_values ? &grad_values : nullptr,
            wants_x ? &grad_x : nullptr);
    const std::vector<std::int64_t> term_rows = rows();
    bool right = true;
    each_index(batch, [&](const shape_list& b) {
      if (!right) return;
      const std::vector<sized_numbers> gradients = backward(b, grad, term_rows);
      if (wants_x) right = rows_are_right(grad_x, b, gradients.front());
      if (!wants_values) return;
      const std::vector<sized_numbers> states = forward(b, term_rows);
      std::size_t term = 0;
      for (std::int64_t m = 0; m < size.n_factors; ++m) {
        const sized_numbers& left = gradients[static_cast<std::size_t>(m) + 1];
        const sized_numbers& of_factor = states[static_cast<std::size_t>(m)];
        for (std::int64_t i = 0; i < size.n; ++i) {
          for (std::int64_t k = 0; k < size.k; ++k, ++term) {
            real dot = 0;
            real magnitude = 0;
            for (std::int64_t c = 0; c < size.d && term_rows[term] >= 0; ++c) {
              const std::int64_t a = i * size.d + c;
              const std::int64_t other = term_rows[term] * size.d + c;
              dot += left.value(a) * of_factor.value(other);
              magnitude += left.size(a) * of_factor.size(other);
            }
            right = right && is_right(grad_values(joined(b, {m, i, k})), dot, magnitude,
                                      roundings() + size.d);
          }
        }
      }
    });
    SUBQUAD_CHECK(right);
    SUBQUAD_CHECK(grad_values.gaps_untouched() && grad_x.gaps_untouched());
  }

  void run_vjp(const strided_array<T>* intermediates, const strided_array<T>* grad_values,
               const strided_array<T>* grad_x) {
    const strided_array<std::uint8_t> memory({static_cast<std::int64_t>(
        core::sparse_factor_product_vjp_workspace(batches(), size.n_factors, size.n, size.k, size.d,
                                                  sizeof(T), intermediates == nullptr))});
    const array_view parts[] = {segments ? segments->view() : array_view{},
                                intermediates ? intermediates->view() : array_view{},
                                grad_values ? grad_values->view() : array_view{},
                                grad_x ? grad_x->view() : array_view{}};
    core::sparse_factor_product_vjp(
        grad.view(), values.view(), x.view(), segments ? &parts[0] : nullptr,
        intermediates ? &parts[1] : nullptr, offsets.data(), residual, circular,
        grad_values ? &parts[2] : nullptr, grad_x ? &parts[3] : nullptr, memory.view());
  }

 private:
  static shape_list broadcast(const shape_list& a, const shape_list& b) {
    const std::size_t rank = std::max(a.size(), b.size());
    shape_list both(rank, 1);
    for (std::size_t i = 0; i < rank; ++i) {
      const std::int64_t of_a = i < a.size() ? a[a.size() - 1 - i] : 1;
      const std::int64_t of_b = i < b.size() ? b[b.size() - 1 - i] : 1;
      both[rank - 1 - i] = of_a == 1 ? of_b : of_a;
    }
    return both;
  }
};

}  // namespace subquad::cuda::on_host

#endif  // SUBQUAD_CUDA_ON_HOST_FACTOR_CHAINS_HPP
