// Contracts stand in log_attention_kernels.hpp, formulas in log_attention_pass.inl.
#include "log_attention_pass.inl"
#include "log_attention_reverse.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

template <class T>
SUBQUAD_INLINE vec<T> absolute(vec<T> x) {
  return from_bits<T>(bits_of<T>(x) & ~bits_of<T>(broadcast(-T{0})));
}

template <class T>
SUBQUAD_INLINE T sign_of(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x == 0 ? T(0) : x;
}

template <class T>
void write_rows(const attention_pass<T>& pass, const log_attention_task<T>& task,
                std::int64_t begin, std::int64_t count) {
  const std::int64_t d_v = task.inputs.sizes.d_v;
  const extended_matrix<T>& sums = pass.sums_t;
  T logs[kChunk];
  exponent<T> powers[kChunk];
  const exponent<T>* mass = sums.k + d_v * kChunk;
  for (std::int64_t v = 0; (task.log_y || task.sign_y) && v < d_v; ++v) {
    for (std::int64_t t = 0; t < kChunk; t += lanes<T>) {
      const extended<T> num = load_extended<T>(sums, v, t);
      const extended<T> den = load_extended<T>(sums, d_v, t);
      store<T>(logs + t, log<T>(absolute<T>(num.s) / den.s));
      store_exponents<T>(powers + t, num.k - den.k);
    }
    add_powers(powers, logs, kChunk, pass.results + v * kChunk);
  }
  for (std::int64_t t = 0; t < count; ++t) {
    const bool empty = mass[t] == extended_format<T>::kZero;
    for (std::int64_t v = 0; task.log_y && v < d_v; ++v) {
      task.log_y(begin + t, v) = empty ? -kInfinity<T> : pass.results[v * kChunk + t];
    }
    for (std::int64_t v = 0; task.sign_y && v < d_v; ++v) {
      const T log_y = pass.results[v * kChunk + t];
      const T sign = sign_of<T>(sums.s[v * kChunk + t]);
      task.sign_y(begin + t, v) = empty || log_y == -kInfinity<T> ? T(0)
                                  : log_y == log_y                ? sign
                                                                  : log_y;
    }
  }
  if (!task.log_z) return;
  for (std::int64_t t = 0; t < kChunk; t += lanes<T>) {
    store<T>(logs + t, log<T>(load_extended<T>(sums, d_v, t).s));
  }
  add_powers(mass, logs, kChunk, pass.results);
  for (std::int64_t t = 0; t < count; ++t) task.log_z[begin + t] = pass.results[t];
}

template <class T>
void write_state(const attention_pass<T>& pass, const log_attention_task<T>& task) {
  const log_attention_sizes& sizes = task.inputs.sizes;
  const attention_state<T>& state = pass.state;
  for (std::int64_t v = 0; v <= sizes.d_v; ++v) {
    const T* high = state.sum.high + v * pass.keys_width;
    const T* low = state.sum.low + v * pass.keys_width;
    T* logs = pass.results;
    for (std::int64_t d = 0; d < pass.keys_width; d += lanes<T>) {
      const vec<T> value = load(high + d);
      const vec<T> rest = load(low + d);
      const vec<T> correction = rest == T{0} ? vec<T>{} : rest / value;
      store<T>(logs + d, log<T>(absolute<T>(value)) + correction);
    }
    add_powers<T>(state.sum.k + v * pass.keys_width, logs, state.decay.high, state.decay.low,
                  sizes.d_k, logs);
    if (v == sizes.d_v) {
      for (std::int64_t d = 0; task.final_log_denominator && d < sizes.d_k; ++d) {
        task.final_log_denominator[d] = logs[d];
      }
      continue;
    }
    for (std::int64_t d = 0; d < sizes.d_k; ++d) {
      if (task.final_log_numerator) task.final_log_numerator(d, v) = logs[d];
      if (task.final_sign_numerator) task.final_sign_numerator(d, v) = sign_of<T>(high[d]);
    }
  }
}

template <class T>
void log_attention(const log_attention_task<T>& task) {
  const log_attention_inputs<T>& in = task.inputs;
  const log_attention_sizes& sizes = in.sizes;
  scratch_pieces pieces{static_cast<char*>(task.scratch), 0};
  attention_pass<T> pass(in, pieces);
  const bool wants_rows = sizes.n_q > 0 && (task.log_y || task.sign_y || task.log_z);
  const bool wants_state =
      task.final_log_numerator || task.final_sign_numerator || task.final_log_denominator;
  pass.load_state();
  if (sizes.causal) {
    for (std::int64_t begin = 0; begin < sizes.n;) {
      const std::int64_t end = pass.chunk_end(begin);
      const std::int64_t count = end - begin;
      if (pass.starts_run(begin)) pass.clear_state();
      pass.enter(begin, count);
      pass.load_keys(begin, count, false);
      if (wants_rows) {
        pass.load_queries(begin, count);
        pass.sum_values(pass.state.sum.rounded(), pass.state.empty, count);
        write_rows<T>(pass, task, begin, count);
      }
      if (end < sizes.n || wants_state) pass.advance(count);
      begin = end;
    }
  } else {
    std::int64_t begin = 0;
    do {
      if (begin > 0) pass.clear_state();
      const std::int64_t end = pass.run_end(begin);
      for (std::int64_t j = begin; j < end; j += kChunk) pass.step(j, smaller(kChunk, end - j));
      const std::int64_t rows_end = in.segments ? smaller(end, sizes.n_q) : sizes.n_q;
      for (std::int64_t t = begin; wants_rows && t < rows_end; t += kChunk) {
        const std::int64_t count = smaller(kChunk, rows_end - t);
        pass.load_queries(t, count);
        pass.sum_values(pass.state.sum.rounded(), pass.state.empty, 0);
        write_rows<T>(pass, task, t, count);
      }
      begin = end;
    } while (begin < sizes.n);
  }
  if (wants_state) write_state<T>(pass, task);
}

template <class T>
std::size_t log_attention_scratch(const log_attention_sizes& sizes) {
  scratch_pieces pieces{nullptr, 0};
  log_attention_inputs<T> inputs{};
  inputs.sizes = sizes;
  attention_pass<T> pass(inputs, pieces);
  return pieces.used;
}

template <class T>
std::size_t log_attention_vjp_scratch(const log_attention_sizes& sizes) {
  scratch_pieces pieces{nullptr, 0};
  log_attention_vjp_task<T> task{};
  task.inputs.sizes = sizes;
  attention_pass<T> forward(task.inputs, pieces);
  reverse_pass<T> pass(task, forward, pieces);
  return pieces.used;
}

template <class T>
constexpr log_attention_functions<T> functions = {
    log_attention_scratch<T>, log_attention<T>, log_attention_vjp_scratch<T>, log_attention_vjp<T>};

}  // namespace

extern const log_attention_kernels kernels_log_attention;
const log_attention_kernels kernels_log_attention = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
