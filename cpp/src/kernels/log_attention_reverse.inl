// The reverse of linear attention with values in logarithms, by the formulas that stand in
// log_attention_pass.inl.
#ifndef SUBQUAD_KERNELS_LOG_ATTENTION_REVERSE_INL
#define SUBQUAD_KERNELS_LOG_ATTENTION_REVERSE_INL

#include "log_attention_pass.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// What the reverse keeps beside the pass.
template <class T>
struct reverse_pass {
  const log_attention_vjp_task<T>& task;
  attention_pass<T>& pass;
  extended_sum<T> later;  // R
  bool later_empty = true;
  extended_matrix<T> gammas;     // token x value
  extended_matrix<T> gammas_t;   // value x token
  extended_matrix<T> slopes;     // query x key
  extended_matrix<T> slopes_t;   // key x query
  extended_matrix<T> weights;    // query x key
  extended_matrix<T> gradients;  // token x feature, or value x token
  T* grad_queries;               // token x feature
  T* grad_keys;
  double* decay_sum;    // the gradient of log_decay at the next token
  double* decay_first;  // ... at the first of a chunk
  attention_state<T> kept[kKept];
  attention_state<T> checkpoints;  // one before every block, in rows of states
  double* row_sums;

  reverse_pass(const log_attention_vjp_task<T>& vjp, attention_pass<T>& forward,
               scratch_pieces& pieces)
      : task(vjp), pass(forward) {
    const log_attention_sizes& sizes = pass.in.sizes;
    const std::int64_t keys = pass.keys_width;
    const std::int64_t values = pass.values_width;
    later = take_state<T>(pieces, values, keys).sum;
    gammas = take_matrix<T>(pieces, kChunk, values);
    gammas_t = take_matrix<T>(pieces, values, kChunk);
    slopes = take_matrix<T>(pieces, kChunk, kChunk);
    slopes_t = take_matrix<T>(pieces, kChunk, kChunk);
    weights = take_matrix<T>(pieces, kChunk, kChunk);
    const std::int64_t widest = keys > values ? keys : values;
    gradients = take_matrix<T>(pieces, 1, kChunk * widest);
    grad_queries = pieces.take<T>(kChunk * keys);
    grad_keys = pieces.take<T>(kChunk * keys);
    decay_sum = pieces.take<double>(keys);
    decay_first = pieces.take<double>(keys);
    row_sums = pieces.take<double>(kChunk);
    if (!sizes.causal) return;
    for (attention_state<T>& state : kept) state = take_state<T>(pieces, values, keys);
    const std::int64_t blocks = divide_up(sizes.n, kBlock);
    checkpoints.sum.high = pieces.take<T>(blocks * values * keys);
    checkpoints.sum.low = pieces.take<T>(blocks * values * keys);
    checkpoints.sum.k = pieces.take<exponent<T>>(blocks * values * keys);
    checkpoints.sum.stride = keys;
    checkpoints.decay = take_decay_sums(pieces, blocks * keys);
  }

  attention_state<T> checkpoint(std::int64_t block) const {
    const std::int64_t at = block * pass.values_width * pass.keys_width;
    attention_state<T> state = checkpoints;
    state.sum.high += at;
    state.sum.low += at;
    state.sum.k += at;
    state.decay.high += block * pass.keys_width;
    state.decay.low += block * pass.keys_width;
    return state;
  }

  void copy_decay(const decay_sums& from, const decay_sums& to) const {
    copy_line(from.high, pass.keys_width, to.high);
    copy_line(from.low, pass.keys_width, to.low);
  }

  void copy_sum(const extended_sum<T>& from, const extended_sum<T>& to) const {
    const std::int64_t count = pass.values_width * pass.keys_width;
    copy_line(from.high, count, to.high);
    copy_line(from.low, count, to.low);
    copy_line(from.k, count, to.k);
  }

  extended_matrix<T> token_rows() const { return {gradients.s, gradients.k, pass.keys_width}; }
  extended_matrix<T> value_rows() const { return {gradients.s, gradients.k, kChunk}; }

  void clear_later() {
    clear<T>(later, pass.values_width);
    later_empty = true;
    for (std::int64_t d = 0; d < pass.keys_width; ++d) decay_sum[d] = 0;
  }

  // x / y, 0 where `live` is not set, and NaN where y is infinite: nothing is known of its parts.
  static extended<T> quotient(vec<T> x, const extended<T>& y, ivec<T> live) {
    const extended<T> numerator = normalised<T>(x, ivec<T>{});
    const extended<T> value = normalised<T>(numerator.s / y.s + (y.s - y.s), numerator.k - y.k);
    return {live ? value.s : vec<T>{},
            live ? value.k : broadcast_exponent<T>(extended_format<T>::kZero)};
  }

  static ivec<T> nonzero(const extended<T>& x) { return x.k != extended_format<T>::kZero; }

  // From the gradients of the final state, in its scale.
  void seed() {
    clear_later();
    const log_attention_sizes& sizes = pass.in.sizes;
    if (!task.grad_final_log_numerator && !task.grad_final_log_denominator) return;
    later_empty = false;
    T* line = pass.results;
    for (std::int64_t v = 0; v < pass.values_count; ++v) {
      const bool given = v < sizes.d_v ? static_cast<bool>(task.grad_final_log_numerator)
                                       : static_cast<bool>(task.grad_final_log_denominator);
      if (!given) continue;
      for (std::int64_t d = 0; d < pass.keys_width; ++d) {
        line[d] = d >= sizes.d_k  ? T(0)
                  : v < sizes.d_v ? task.grad_final_log_numerator(d, v)
                                  : task.grad_final_log_denominator[d];
      }
      for (std::int64_t d = 0; d < pass.keys_width; d += lanes<T>) {
        const vec<T> grad = load(line + d);
        const extended<T> sum = load_extended<T>(pass.state.sum.rounded(), v, d);
        const ivec<T> live = nonzero(sum) & (grad != T{0});
        store_extended<T>(later.rounded(), v, d, quotient(grad, sum, live));
        store<T>(line + d, live ? grad : vec<T>{});
      }
      for (std::int64_t d = 0; d < sizes.d_k; ++d) decay_sum[d] += line[d];
    }
  }

  void load_gammas(std::int64_t begin, std::int64_t count) {
    const std::int64_t d_v = pass.in.sizes.d_v;
    const extended_matrix<T>& sums = pass.sums_t;
    fill_zero<T>(gammas_t, pass.values_width, kChunk);
    T line[kChunk];
    for (std::int64_t t = 0; t < kChunk; ++t) {
      row_sums[t] = task.grad_log_z && t < count ? task.grad_log_z[begin + t] : 0;
    }
    for (std::int64_t v = 0; v <= d_v; ++v) {
      if (v < d_v && !task.grad_log_y) continue;
      for (std::int64_t t = 0; t < kChunk; ++t) {
        line[t] = t >= count ? T(0)
                  : v < d_v  ? task.grad_log_y(begin + t, v)
                             : static_cast<T>(row_sums[t]);
      }
      for (std::int64_t t = 0; t < kChunk; t += lanes<T>) {
        const extended<T> den = load_extended<T>(sums, d_v, t);
        const extended<T> sum = load_extended<T>(sums, v, t);
        const vec<T> grad = load(line + t);
        const ivec<T> live = nonzero(den) & nonzero(sum) & (grad != T{0});
        store_extended<T>(gammas_t, v, t, quotient(grad, sum, live));
        store<T>(line + t, live ? grad : vec<T>{});
      }
      for (std::int64_t t = 0; v < d_v && t < kChunk; ++t) row_sums[t] -= line[t];
    }
    transpose<T>(gammas_t, pass.values_width, kChunk, gammas);
  }

  // out = `rows` of the product times `by`, as plain numbers.
  void finish_rows(const extended_matrix<T>& by, std::int64_t rows, std::int64_t columns, T* out) {
    const extended_matrix<T> from = {gradients.s, gradients.k, columns};
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; c += lanes<T>) {
        store<T>(out + r * columns + c, value_of<T>(multiply<T>(load_extended<T>(from, r, c),
                                                                load_extended<T>(by, r, c))));
      }
    }
  }

  void write_tokens(const T* rows, std::int64_t begin, std::int64_t count,
                    const matrix_view<T>& out) const {
    if (!out) return;
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t d = 0; d < pass.in.sizes.d_k; ++d) {
        out(begin + t, d) = rows[t * pass.keys_width + d];
      }
    }
  }

  // The chunk's own keys (`keys` of them) count where the call is causal.
  void reverse_queries(const extended_matrix<T>& from, bool empty, std::int64_t begin,
                       std::int64_t count, std::int64_t keys) {
    if (!task.grad_log_q && !task.grad_log_decay) return;
    pass.multiply_matrices({gammas, from, empty ? 0 : pass.values_count}, {slopes, pass.keys, keys},
                           count, pass.keys_width, token_rows());
    finish_rows(pass.queries, count, pass.keys_width, grad_queries);
    write_tokens(grad_queries, begin, count, task.grad_log_q);
  }

  void reverse_keys(std::int64_t begin, std::int64_t count, std::int64_t queries) {
    const log_attention_sizes& sizes = pass.in.sizes;
    if (task.grad_log_k || task.grad_log_decay) {
      pass.multiply_matrices({pass.values, later.rounded(), later_empty ? 0 : pass.values_count},
                             {slopes_t, pass.queries, queries}, count, pass.keys_width,
                             token_rows());
      finish_rows(pass.keys, count, pass.keys_width, grad_keys);
      write_tokens(grad_keys, begin, count, task.grad_log_k);
    }
    if (task.grad_log_v) {
      pass.multiply_matrices({later.rounded(), pass.keys_t, later_empty ? 0 : sizes.d_k},
                             {gammas_t, weights, queries}, sizes.d_v, kChunk, value_rows());
      finish_rows(pass.values_t, sizes.d_v, kChunk, pass.results);
      for (std::int64_t t = 0; t < count; ++t) {
        for (std::int64_t v = 0; v < sizes.d_v; ++v) {
          task.grad_log_v(begin + t, v) = pass.results[v * kChunk + t];
        }
      }
    }
  }

  void add_later(std::int64_t count) {
    pass.multiply_matrices({gammas_t, pass.queries, count}, pass.nothing(pass.queries),
                           pass.values_count, pass.keys_width, pass.delta);
    add<T>(later, pass.delta, pass.values_count);
    later_empty = false;
  }

  // decay_first = sum over values of `from` times R.
  void pair_with_later(const extended_matrix<T>& from) {
    for (std::int64_t d = 0; d < pass.keys_width; d += lanes<T>) {
      ivec<T> top = broadcast_exponent<T>(extended_format<T>::kFloor);
      for (std::int64_t v = 0; v < pass.values_count; ++v) {
        const ivec<T> k =
            load_extended<T>(from, v, d).k + load_extended<T>(later.rounded(), v, d).k;
        top = larger<T>(k, top);
      }
      vec<T> sum = {};
      for (std::int64_t v = 0; v < pass.values_count; ++v) {
        const extended<T> a = load_extended<T>(from, v, d);
        const extended<T> b = load_extended<T>(later.rounded(), v, d);
        const ivec<T> k = a.k + b.k;
        sum = k > extended_format<T>::kFloor ? sum + a.s * b.s * power_of_two<T>(k - top) : sum;
      }
      T values[lanes<T>];
      store<T>(values, value_of<T>(normalised<T>(sum, top)));
      for (int i = 0; i < lanes<T>; ++i) decay_first[d + i] = values[i];
    }
  }

  void write_decays(std::int64_t begin, std::int64_t count) {
    for (std::int64_t d = 0; d < pass.in.sizes.d_k; ++d) {
      double sum = decay_sum[d];
      for (std::int64_t t = count - 1; t > 0; --t) {
        sum += static_cast<double>(grad_queries[t * pass.keys_width + d]) -
               static_cast<double>(grad_keys[t * pass.keys_width + d]);
        task.grad_log_decay(begin + t, d) = static_cast<T>(sum);
      }
      task.grad_log_decay(begin, d) = static_cast<T>(decay_first[d]);
      decay_sum[d] = decay_first[d];
    }
  }

  // One chunk, from the state before it.
  void reverse_chunk(const attention_state<T>& before, std::int64_t begin, std::int64_t count) {
    const extended_matrix<T> from = before.sum.rounded();
    const bool has_rows = pass.in.sizes.n_q > 0;
    const std::int64_t queries = has_rows ? count : 0;
    if (begin + count < pass.in.sizes.n && pass.starts_run(begin + count)) clear_later();
    copy_decay(before.decay, pass.state.decay);
    pass.load_decays(begin, count);
    pass.load_keys(begin, count, true);
    if (has_rows) {
      pass.load_queries(begin, count);
      pass.sum_values(from, before.empty, count);
      fill_zero<T>(pass.weights_t.from(count), kChunk - count, kChunk);
      transpose<T>(pass.weights_t, kChunk, kChunk, weights);
      load_gammas(begin, count);
      pass.multiply_matrices({pass.values, gammas_t, pass.values_count}, pass.nothing(gammas_t),
                             count, kChunk, slopes_t);
      fill_zero<T>(slopes_t.from(count), kChunk - count, kChunk);
      pass.mask_future(slopes_t);
      transpose<T>(slopes_t, kChunk, kChunk, slopes);
      reverse_queries(from, before.empty, begin, count, count);
    } else {
      for (std::int64_t i = 0; i < count * pass.keys_width; ++i) grad_queries[i] = 0;
    }
    reverse_keys(begin, count, queries);
    if (has_rows) add_later(count);
    if (task.grad_log_decay) {
      pair_with_later(from);
      write_decays(begin, count);
    }
    if (pass.scaled) scale_columns<T>(later, pass.factor, pass.values_count);
  }

  void reverse_block(std::int64_t block) {
    const std::int64_t first = block * kBlock;
    const std::int64_t last = smaller(pass.in.sizes.n, first + kBlock);
    std::int64_t begins[kBlock + 1];
    std::int64_t chunks = 0;
    for (std::int64_t begin = first; begin < last; begin = pass.chunk_end(begin)) {
      begins[chunks++] = begin;
    }
    begins[chunks] = last;
    // More chunks than states that are kept: those before a group of them are run through again.
    for (std::int64_t group = (chunks - 1) / kKept * kKept; group >= 0; group -= kKept) {
      const attention_state<T> start = checkpoint(block);
      copy_sum(start.sum, pass.state.sum);
      copy_decay(start.decay, pass.state.decay);
      pass.state.empty = false;
      const std::int64_t end = smaller(chunks, group + kKept);
      for (std::int64_t c = 0; c < end; ++c) {
        const std::int64_t count = begins[c + 1] - begins[c];
        if (c < group) {
          pass.step(begins[c], count);
          continue;
        }
        attention_state<T>& state = kept[c - group];
        if (pass.starts_run(begins[c])) pass.clear_state();
        copy_decay(pass.state.decay, state.decay);
        pass.enter(begins[c], count);
        copy_sum(pass.state.sum, state.sum);
        state.empty = pass.state.empty;
        if (c + 1 == end) break;
        pass.load_keys(begins[c], count, false);
        pass.advance(count);
      }
      for (std::int64_t c = end - 1; c >= group; --c) {
        reverse_chunk(kept[c - group], begins[c], begins[c + 1] - begins[c]);
      }
    }
  }

  void write_state_gradients() {
    if (!task.grad_log_numerator && !task.grad_log_denominator) return;
    const log_attention_sizes& sizes = pass.in.sizes;
    pass.load_state();
    T* line = pass.results;
    for (std::int64_t v = 0; v < pass.values_count; ++v) {
      for (std::int64_t d = 0; d < pass.keys_width; d += lanes<T>) {
        store<T>(line + d, value_of<T>(multiply<T>(load_extended<T>(pass.state.sum.rounded(), v, d),
                                                   load_extended<T>(later.rounded(), v, d))));
      }
      for (std::int64_t d = 0; d < sizes.d_k; ++d) {
        if (v < sizes.d_v) {
          if (task.grad_log_numerator) task.grad_log_numerator(d, v) = line[d];
        } else if (task.grad_log_denominator) {
          task.grad_log_denominator[d] = line[d];
        }
      }
    }
  }

  void run_causal() {
    const log_attention_sizes& sizes = pass.in.sizes;
    pass.load_state();
    for (std::int64_t begin = 0; begin < sizes.n;) {
      if (begin % kBlock == 0) {
        const attention_state<T> to = checkpoint(begin / kBlock);
        copy_sum(pass.state.sum, to.sum);
        copy_decay(pass.state.decay, to.decay);
      }
      const std::int64_t end = pass.chunk_end(begin);
      pass.step(begin, end - begin);
      begin = end;
    }
    seed();
    for (std::int64_t block = divide_up(sizes.n, kBlock) - 1; block >= 0; --block) {
      reverse_block(block);
    }
    write_state_gradients();
  }

  void run_bidirectional() {
    const log_attention_sizes& sizes = pass.in.sizes;
    std::int64_t begin = 0;
    do {
      const std::int64_t end = pass.run_end(begin);
      if (begin > 0) {
        pass.clear_state();
      } else {
        pass.load_state();
      }
      for (std::int64_t j = begin; j < end; j += kChunk) pass.step(j, smaller(kChunk, end - j));
      if (end == sizes.n) {
        seed();
      } else {
        clear_later();
      }
      const std::int64_t rows_end = pass.in.segments ? smaller(end, sizes.n_q) : sizes.n_q;
      const extended_matrix<T> from = pass.state.sum.rounded();
      for (std::int64_t t = begin; t < rows_end; t += kChunk) {
        const std::int64_t count = smaller(kChunk, rows_end - t);
        pass.load_queries(t, count);
        pass.sum_values(from, pass.state.empty, 0);
        load_gammas(t, count);
        reverse_queries(from, pass.state.empty, t, count, 0);
        add_later(count);
      }
      for (std::int64_t j = begin; j < end; j += kChunk) {
        const std::int64_t count = smaller(kChunk, end - j);
        pass.load_keys(j, count, true);
        reverse_keys(j, count, 0);
      }
      if (begin == 0) write_state_gradients();
      begin = end;
    } while (begin < sizes.n);
  }
};

template <class T>
void log_attention_vjp(const log_attention_vjp_task<T>& task) {
  scratch_pieces pieces{static_cast<char*>(task.scratch), 0};
  attention_pass<T> forward(task.inputs, pieces);
  reverse_pass<T> pass(task, forward, pieces);
  if (task.inputs.sizes.causal) {
    pass.run_causal();
  } else {
    pass.run_bidirectional();
  }
}

}  // namespace
}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LOG_ATTENTION_REVERSE_INL
