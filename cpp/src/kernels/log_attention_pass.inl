// What both directions of linear attention with values in logarithms share: the state, chunks of
// tokens as numbers of an extended range, and their sums.
//
// With the column of ones that makes the denominator one more numerator, S = sum_j K_j V_j^T for
// K = e^(log_k - A), V = (sign_v e^log_v, 1), Q = e^(log_q + A), and A the sum of log_decay since
// the state was last scaled: within 32 tokens
//   num_t = S^T Q_t + sum_{j <= t} (K_j . Q_t) V_j
// and in reverse, with gamma_t = (gradient of log_y_t / num_t, that of the denominator),
// R = sum_t Q_t gamma_t^T of later tokens and slope_tj = gamma_t . V_j
//   gQ_t = Q_t (S gamma_t + sum_j slope_tj K_j),  gK_j = K_j (R V_j + sum_t slope_tj Q_t),
//   gV_j = V_j (R^T K_j + sum_t (K_j . Q_t) gamma_t).
// S and R are stored transposed, a row for each value.
#ifndef SUBQUAD_KERNELS_LOG_ATTENTION_PASS_INL
#define SUBQUAD_KERNELS_LOG_ATTENTION_PASS_INL

#include "extended.inl"
#include "log_attention_kernels.hpp"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

constexpr std::int64_t kChunk = 32;   // tokens between two updates of the state
constexpr std::int64_t kBlock = 256;  // tokens between two states kept for the reverse
constexpr std::int64_t kKept = kBlock / kChunk;

// A decay beyond this ends a chunk and scales the state, as does a sum of decays beyond the second.
constexpr double kLargeDecay = 0x1p17;
constexpr double kLargeSum = 0x1p21;

// Pieces of scratch; counts without memory behind it.
struct scratch_pieces {
  char* begin;
  std::size_t used;

  template <class U>
  U* take(std::int64_t count) {
    U* piece = begin ? reinterpret_cast<U*>(begin + used) : nullptr;
    used += (static_cast<std::size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return piece;
  }
};

template <class T>
extended_matrix<T> take_matrix(scratch_pieces& pieces, std::int64_t rows, std::int64_t columns) {
  T* s = pieces.take<T>(rows * columns);
  return {s, pieces.take<exponent<T>>(rows * columns), columns};
}

// A sum of decays, and what rounding took from it.
struct decay_sums {
  double* high;
  double* low;
};

decay_sums take_decay_sums(scratch_pieces& pieces, std::int64_t count) {
  double* high = pieces.take<double>(count);
  return {high, pieces.take<double>(count)};
}

// The sum over keys, each row a value.
template <class T>
struct attention_state {
  extended_sum<T> sum;
  decay_sums decay;
  bool empty;
};

template <class T>
attention_state<T> take_state(scratch_pieces& pieces, std::int64_t rows, std::int64_t columns) {
  attention_state<T> state;
  state.sum.high = pieces.take<T>(rows * columns);
  state.sum.low = pieces.take<T>(rows * columns);
  state.sum.k = pieces.take<exponent<T>>(rows * columns);
  state.sum.stride = columns;
  state.decay = take_decay_sums(pieces, columns);
  state.empty = true;
  return state;
}

template <class T>
SUBQUAD_INLINE void copy_line(const T* from, std::int64_t count, T* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
struct attention_pass {
  const log_attention_inputs<T>& in;
  std::int64_t keys_width;    // d_k, padded
  std::int64_t values_count;  // d_v and the ones
  std::int64_t values_width;  // that, padded

  attention_state<T> state;
  extended_matrix<T> delta;   // values x keys
  extended_matrix<T> keys;    // token x feature
  extended_matrix<T> keys_t;  // feature x token
  extended_matrix<T> queries;
  extended_matrix<T> queries_t;
  extended_matrix<T> values;
  extended_matrix<T> values_t;
  extended_matrix<T> weights_t;  // key x query
  extended_matrix<T> sums_t;     // value x query
  extended_matrix<T> factor;     // what the state is scaled by, a row of features
  decay_sums decays;             // token x feature
  double* line;
  double* line_low;
  T* results;  // value x token, or token x feature
  product_scratch<T> product_space;
  bool scaled = false;

  attention_pass(const log_attention_inputs<T>& inputs, scratch_pieces& pieces) : in(inputs) {
    const log_attention_sizes& sizes = in.sizes;
    keys_width = divide_up(sizes.d_k + (sizes.d_k == 0), kTileColumns<T>) * kTileColumns<T>;
    values_count = sizes.d_v + 1;
    values_width = divide_up(values_count, lanes<T>) * lanes<T>;
    state = take_state<T>(pieces, values_width, keys_width);
    delta = take_matrix<T>(pieces, values_width, keys_width);
    keys = take_matrix<T>(pieces, kChunk, keys_width);
    keys_t = take_matrix<T>(pieces, keys_width, kChunk);
    queries = take_matrix<T>(pieces, kChunk, keys_width);
    queries_t = take_matrix<T>(pieces, keys_width, kChunk);
    values = take_matrix<T>(pieces, kChunk, values_width);
    values_t = take_matrix<T>(pieces, values_width, kChunk);
    weights_t = take_matrix<T>(pieces, kChunk, kChunk);
    sums_t = take_matrix<T>(pieces, values_width, kChunk);
    factor = take_matrix<T>(pieces, 1, keys_width);
    decays = take_decay_sums(pieces, kChunk * keys_width);
    const std::int64_t widest = keys_width > values_width ? keys_width : values_width;
    line = pieces.take<double>(widest);
    line_low = pieces.take<double>(widest);
    results = pieces.take<T>(kChunk * widest);
    const std::int64_t depth = widest + kChunk;
    const std::int64_t rows = values_width > kChunk ? values_width : kChunk;
    const std::int64_t columns = keys_width > kChunk ? keys_width : kChunk;
    T* space = pieces.take<T>(product_scratch_size<T>(rows, depth, columns));
    if (space) product_space = cut_product_scratch<T>(space, depth, columns);
  }

  void multiply_matrices(const extended_term<T>& first, const extended_term<T>& second,
                         std::int64_t rows, std::int64_t columns,
                         const extended_matrix<T>& out) const {
    const extended_term<T> terms[2] = {first, second};
    product<T>(terms, rows, columns, product_space, out);
  }

  static extended_term<T> nothing(const extended_matrix<T>& any) { return {any, any, 0}; }

  // e^(sign decays + x_i) in one row, 0 past `count`.
  void load_row(const T* x, std::int64_t stride, std::int64_t count, std::int64_t width,
                const double* decay, const double* decay_low, double sign,
                const extended_matrix<T>& to, std::int64_t row) const {
    if (stride == 1) {
      for (std::int64_t i = 0; i < count; ++i) line[i] = x[i];
    } else {
      for (std::int64_t i = 0; i < count; ++i) line[i] = x[i * stride];
    }
    for (std::int64_t i = count; i < width; ++i) line[i] = -kInfinity<double>;
    for (std::int64_t i = 0; i < width; ++i) line_low[i] = 0;
    if (decay) {
      for (std::int64_t i = 0; i < count; ++i) {
        line_low[i] = sign * decay_low[i];
        add_compensated(line[i], line_low[i], sign * decay[i]);
      }
    }
    exponentials<T>(line, line_low, width, to.s + row * to.stride, to.k + row * to.stride);
  }

  // A row times weights, of which those of a zero do not matter.
  void weigh_row(const T* weights, std::int64_t stride, std::int64_t count, std::int64_t width,
                 const extended_matrix<T>& to, std::int64_t row) const {
    T* s = to.s + row * to.stride;
    const exponent<T>* k = to.k + row * to.stride;
    for (std::int64_t i = 0; i < count; ++i) {
      if (k[i] != extended_format<T>::kZero) s[i] *= weights[i * stride];
    }
    for (std::int64_t i = 0; i < width; i += lanes<T>) {
      const extended<T> x = load_extended<T>(to, row, i);
      extended<T> weighed = normalised<T>(x.s, x.k);
      store_extended<T>(to, row, i, weighed);
    }
  }

  void clear_state() {
    clear<T>(state.sum, values_width);
    for (std::int64_t i = 0; i < keys_width; ++i) state.decay.high[i] = state.decay.low[i] = 0;
    state.empty = true;
  }

  void load_state() {
    clear_state();
    if (!in.has_state) return;
    state.empty = false;
    const extended_matrix<T> to = state.sum.rounded();
    for (std::int64_t v = 0; v < in.sizes.d_v; ++v) {
      load_row(in.log_numerator.data + v * in.log_numerator.column_stride,
               in.log_numerator.row_stride, in.sizes.d_k, keys_width, nullptr, nullptr, 0, to, v);
      if (in.sign_numerator) {
        weigh_row(in.sign_numerator.data + v * in.sign_numerator.column_stride,
                  in.sign_numerator.row_stride, in.sizes.d_k, keys_width, to, v);
      }
    }
    load_row(in.log_denominator.data, in.log_denominator.stride, in.sizes.d_k, keys_width, nullptr,
             nullptr, 0, to, in.sizes.d_v);
  }

  bool starts_run(std::int64_t token) const {
    return token > 0 && in.segments && in.segments[token] != in.segments[token - 1];
  }

  bool has_large_decay(std::int64_t token) const {
    if (!in.log_decay) return false;
    const matrix_view<const T> row = in.log_decay.from(token);
    bool small = true;
    for (std::int64_t d = 0; d < in.sizes.d_k; ++d) {
      const T decay = row(0, d);
      small &= decay <= T(kLargeDecay) && decay >= T(-kLargeDecay);
    }
    return !small;
  }

  // Where the chunk that starts at `begin` ends.
  std::int64_t chunk_end(std::int64_t begin) const {
    std::int64_t limit = smaller(in.sizes.n, (begin / kBlock + 1) * kBlock);
    limit = smaller(limit, begin + kChunk);
    std::int64_t end = begin + 1;
    while (end < limit && !starts_run(end) && !has_large_decay(end)) ++end;
    return end;
  }

  // The sums of decays of a chunk, from the state's, which go on; `factor` is what the state is to
  // be scaled by before, where `scaled`.
  void load_decays(std::int64_t begin, std::int64_t count) {
    scaled = false;
    if (!in.log_decay) return;
    double* high = state.decay.high;
    double* low = state.decay.low;
    for (std::int64_t t = 0; t < count; ++t) {
      const matrix_view<const T> row = in.log_decay.from(begin + t);
      double* out = decays.high + t * keys_width;
      double* out_low = decays.low + t * keys_width;
      if (t == 0) {
        for (std::int64_t d = 0; d < keys_width; ++d) line[d] = line_low[d] = 0;
        for (std::int64_t d = 0; d < in.sizes.d_k; ++d) {
          const double decay = row(0, d);
          const bool large = !(decay <= kLargeDecay && decay >= -kLargeDecay);
          if (large || __builtin_fabs(high[d]) > kLargeSum) {
            line[d] = large ? high[d] + decay : high[d];
            line_low[d] = low[d];
            high[d] = low[d] = 0;
            scaled = true;
          }
          if (!large) add_compensated(high[d], low[d], decay);
        }
        if (scaled) exponentials<T>(line, line_low, keys_width, factor.s, factor.k);
      } else {
        for (std::int64_t d = 0; d < in.sizes.d_k; ++d) add_compensated(high[d], low[d], row(0, d));
      }
      copy_line(high, keys_width, out);
      copy_line(low, keys_width, out_low);
    }
  }

  void load_keys(std::int64_t begin, std::int64_t count, bool transposed) const {
    fill_zero<T>(keys, kChunk, keys_width);
    fill_zero<T>(values, kChunk, values_width);
    for (std::int64_t t = 0; t < count; ++t) {
      if (in.key_mask && in.key_mask[begin + t] == 0) continue;
      const matrix_view<const T> key = in.log_k.from(begin + t);
      bool present = false;
      for (std::int64_t d = 0; d < in.sizes.d_k; ++d) present |= key(0, d) != -kInfinity<T>;
      if (!present) continue;
      const std::int64_t at = t * keys_width;
      load_row(key.data, key.column_stride, in.sizes.d_k, keys_width,
               in.log_decay ? decays.high + at : nullptr, decays.low + at, -1, keys, t);
      const matrix_view<const T> value = in.log_v.from(begin + t);
      load_row(value.data, value.column_stride, in.sizes.d_v, values_width, nullptr, nullptr, 0,
               values, t);
      if (in.sign_v) {
        const matrix_view<const T> sign = in.sign_v.from(begin + t);
        weigh_row(sign.data, sign.column_stride, in.sizes.d_v, values_width, values, t);
      }
      values.s[t * values_width + in.sizes.d_v] = T(1);
      values.k[t * values_width + in.sizes.d_v] = 0;
    }
    transpose<T>(values, kChunk, values_width, values_t);
    if (transposed) transpose<T>(keys, kChunk, keys_width, keys_t);
  }

  void load_queries(std::int64_t begin, std::int64_t count) const {
    fill_zero<T>(queries, kChunk, keys_width);
    for (std::int64_t t = 0; t < count; ++t) {
      const matrix_view<const T> query = in.log_q.from(begin + t);
      const std::int64_t at = t * keys_width;
      load_row(query.data, query.column_stride, in.sizes.d_k, keys_width,
               in.log_decay ? decays.high + at : nullptr, decays.low + at, 1, queries, t);
    }
    transpose<T>(queries, kChunk, keys_width, queries_t);
  }

  // Entries of keys after their query.
  static void mask_future(const extended_matrix<T>& key_by_query) {
    for (std::int64_t j = 1; j < kChunk; ++j) {
      for (std::int64_t t = 0; t < j; ++t) {
        key_by_query.s[j * kChunk + t] = T(0);
        key_by_query.k[j * kChunk + t] = extended_format<T>::kZero;
      }
    }
  }

  // The queries' numerators: from `from`, a state, and from the `count` keys of their chunk up to
  // each of them.
  void sum_values(const extended_matrix<T>& from, bool empty, std::int64_t count) const {
    const std::int64_t d_k = in.sizes.d_k;
    if (count > 0) {
      multiply_matrices({keys, queries_t, d_k}, nothing(keys), count, kChunk, weights_t);
      mask_future(weights_t);
    }
    multiply_matrices({from, queries_t, empty ? 0 : d_k}, {values_t, weights_t, count},
                      values_count, kChunk, sums_t);
  }

  void advance(std::int64_t count) {
    multiply_matrices({values_t, keys, count}, nothing(keys), values_count, keys_width, delta);
    add<T>(state.sum, delta, values_count);
    state.empty = false;
  }

  // Before a chunk: the state of a new run is empty, and that of an old one may have to be scaled.
  void enter(std::int64_t begin, std::int64_t count) {
    load_decays(begin, count);
    if (scaled) scale_columns<T>(state.sum, factor, values_count);
  }

  void step(std::int64_t begin, std::int64_t count) {
    if (starts_run(begin)) clear_state();
    enter(begin, count);
    load_keys(begin, count, false);
    advance(count);
  }

  // [begin, end) of the run of equal segments that starts at `begin`.
  std::int64_t run_end(std::int64_t begin) const {
    if (!in.segments) return in.sizes.n;
    std::int64_t end = begin + 1;
    while (end < in.sizes.n && !starts_run(end)) ++end;
    return end < in.sizes.n ? end : in.sizes.n;
  }
};

}  // namespace
}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LOG_ATTENTION_PASS_INL
