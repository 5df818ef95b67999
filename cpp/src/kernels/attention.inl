// Contracts stand in attention_kernels.hpp, what a sub-chunk is in attention_chunk.inl. A chunk's
// queries lie in lanes until their weights are known; then the weights are broadcast, and values
// lie in lanes: every product reads its operands in the layout in which they were made.
#include "attention_chunk.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Scratch of one chunk of queries and keys.
template <class T>
struct chunk_scratch {
  attention_scale<T> queries;  // [d_k][kChunk], and a vector that is read past it
  T* query_rows;               // [2][kChunk][features]
  T* weighted;                 // Q^, [d_k][kChunk]
  T* rows;                     // K^, [kChunk][features]
  T* columns;                  // K^, [features][kChunk]
  T* weights;                  // [kChunk][kChunk]
  T* sums;                     // those of earlier keys in the scale of the sub-chunk
  T* local;
  T* local_factor;  // [features]
  T* base_factor;
  attention_scale<T> base_scale;  // that of the base, decayed along
  T* c;                           // [kChunk]
  T* den;
};

template <class T>
void place_chunk_scratch(T* scratch, std::int64_t d_k, std::int64_t d_v, chunk_scratch<T>& to) {
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t block = features * kChunk;
  const std::int64_t sums = attention_sums_size<T>(d_k, d_v);
  const auto take = [&](std::int64_t size) {
    T* const piece = scratch;
    scratch += size;
    return piece;
  };
  to.queries.high = take(block + kChunk);
  to.queries.low = take(block + kChunk);
  to.query_rows = take(2 * block);
  to.weighted = take(block);
  to.rows = take(block);
  to.columns = take(block);
  to.weights = take(kChunk * kChunk);
  to.sums = take(sums);
  to.local = take(sums);
  to.local_factor = take(features);
  to.base_factor = take(features);
  to.base_scale.high = take(features);
  to.base_scale.low = take(features);
  to.c = take(kChunk);
  to.den = take(kChunk);
}

template <class T>
std::size_t attention_scratch(std::int64_t d_k, std::int64_t d_v) {
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t own =
      (7 * features + kChunk + 4) * kChunk + 2 * attention_sums_size<T>(d_k, d_v) + 4 * features;
  return sizeof(T) *
         static_cast<std::size_t>(key_chunk_size<T>(d_k, d_v) + sub_chunk_size<T>(d_k) + own);
}

// Rows of a sub-chunk: numerators over 1 / den.
template <class T>
struct output_rows {
  matrix_view<T> y;
  std::int64_t count;
  std::int64_t d_k;
  std::int64_t d_v;
  std::int64_t columns;
  const T* queries;  // Q^, [d_k][kChunk]
  const T* sums;     // S, rows of columns
  const T* weights;  // null: the sums alone
  const T* values;
  const T* scale;  // 1 / den
};

template <class T, int Vectors>
SUBQUAD_INLINE void output_columns(const output_rows<T>& rows, std::int64_t v) {
  const std::int64_t width = smaller<std::int64_t>(rows.d_v - v, Vectors * lanes<T>);
  const bool direct = rows.y.column_stride == 1 && width == Vectors * lanes<T>;
  for (std::int64_t t = 0; t < rows.count; t += kBlockRows) {
    block<T, Vectors> acc;
    block_zero<T, Vectors>(acc);
    block_product<T, Vectors>(rows.d_k, rows.queries + t, kChunk, rows.sums + v, rows.columns, acc);
    if (rows.weights) {
      block_product<T, Vectors>(smaller<std::int64_t>(t + kBlockRows, rows.count), rows.weights + t,
                                kChunk, rows.values + v, rows.columns, acc);
    }
    if (direct && t + kBlockRows <= rows.count) {
      SUBQUAD_UNROLL_BLOCK
      for (int r = 0; r < kBlockRows; ++r) {
        T* const to = rows.y.data + (t + r) * rows.y.row_stride + v;
        SUBQUAD_UNROLL_VECTORS
        for (int i = 0; i < Vectors; ++i) {
          store<T>(to + i * lanes<T>, acc[r][i] * rows.scale[t + r]);
        }
      }
    } else {
      T tile[kBlockRows * Vectors * lanes<T>];
      SUBQUAD_UNROLL_BLOCK
      for (int r = 0; r < kBlockRows; ++r) {
        SUBQUAD_UNROLL_VECTORS
        for (int i = 0; i < Vectors; ++i) {
          store<T>(tile + (r * Vectors + i) * lanes<T>, acc[r][i] * rows.scale[t + r]);
        }
      }
      for (std::int64_t r = 0; r < smaller<std::int64_t>(kBlockRows, rows.count - t); ++r) {
        for (std::int64_t i = 0; i < width; ++i) {
          rows.y(t + r, v + i) = tile[r * Vectors * lanes<T> + i];
        }
      }
    }
  }
}

// log_z = c + log(den), formed in double: -inf where den is 0, whatever c.
template <class T>
void write_log_z(const T* c, const T* den, std::int64_t count, vector_view<T> log_z) {
  for (std::int64_t t = 0; t < count; t += lanes<double>) {
    vec<double> shift;
    vec<double> sum;
    for (int i = 0; i < lanes<double>; ++i) {
      shift[i] = static_cast<double>(c[t + i]);
      sum[i] = static_cast<double>(den[t + i]);
    }
    const vec<double> result = shift + log<double>(sum);
    for (std::int64_t i = t; i < smaller<std::int64_t>(count, t + lanes<double>); ++i) {
      log_z[i] = static_cast<T>(result[i - t]);
    }
  }
}

// Writes y and log_z from numerators' operands and den, which becomes 1 / den.
template <class T>
void write_rows(output_rows<T>& rows, const T* c, T* den, vector_view<T> log_z, bool empty_is_nan) {
  if (log_z) write_log_z<T>(c, den, rows.count, log_z);
  if (!rows.y) return;
  const vec<T> empty = empty_is_nan ? broadcast(static_cast<T>(__builtin_nan(""))) : vec<T>{};
  for (std::int64_t t = 0; t < rows.count; t += lanes<T>) {
    const vec<T> sum = load(den + t);
    store<T>(den + t, sum == T(0) ? empty : T(1) / sum);
  }
  rows.scale = den;
  for (std::int64_t v = 0; v < rows.d_v; v += kTileColumns<T>) {
    if (rows.d_v - v > lanes<T>) {
      output_columns<T, 2>(rows, v);
    } else {
      output_columns<T, 1>(rows, v);
    }
  }
}

template <class T>
void add_total_decay(const sub_chunk<T>& sub, const key_chunk<T>& chunk,
                     const attention_scale<T>& total) {
  for (std::int64_t i = 0; i < chunk.features; i += lanes<T>) {
    two_float<T> sum = sub.fresh ? two_float<T>{} : load_pair(total, i);
    if (chunk.decays) {
      sum = add<T>(sum, {load(chunk.decays + sub.first * chunk.features + i), vec<T>{}});
      sum = add<T>(sum, load_pair(sub.sums, (sub.count - 1) * chunk.features + i));
    }
    store_pair<T>(total, i, sum);
  }
}

template <class T>
void attention_scale_of(const attention_group_task<T>& task) {
  key_chunk<T> chunk;
  sub_chunk<T> sub;
  T* const rest = place_key_chunk<T>(static_cast<T*>(task.scratch), task.tokens, chunk);
  place_sub_chunk<T>(rest, task.tokens.d_k, sub);
  for (std::int64_t begin = task.begin; begin < task.end; begin += kChunk) {
    load_chunk(task.tokens, begin, smaller<std::int64_t>(kChunk, task.end - begin), chunk);
    for (std::int64_t first = 0; first < chunk.count; first += sub.count) {
      begin_sub_chunk(task.tokens, chunk, first, task.scale, sub);
      if (task.total_decay.high) add_total_decay(sub, chunk, task.total_decay);
      decay_to_last(sub, sub.top, chunk.features, task.scale);
    }
  }
}

// Asks for rows [begin, end) of the next chunk while this one is worked on.
template <class T>
SUBQUAD_INLINE void prefetch_rows(matrix_view<const T> rows, std::int64_t begin, std::int64_t end,
                                  std::int64_t columns) {
  if (!rows || rows.column_stride != 1) return;
  for (std::int64_t t = begin; t < end; ++t) {
    const T* const row = rows.data + t * rows.row_stride;
    for (std::int64_t i = 0; i < columns; i += 64 / static_cast<std::int64_t>(sizeof(T))) {
      __builtin_prefetch(row + i);
    }
  }
}

template <class T>
void attention_group(const attention_group_task<T>& task) {
  const attention_tokens<T>& tokens = task.tokens;
  const std::int64_t d_k = tokens.d_k;
  const std::int64_t d_v = tokens.d_v;
  key_chunk<T> chunk;
  sub_chunk<T> sub;
  chunk_scratch<T> own;
  T* rest = place_key_chunk<T>(static_cast<T*>(task.scratch), tokens, chunk);
  rest = place_sub_chunk<T>(rest, d_k, sub);
  place_chunk_scratch<T>(rest, d_k, d_v, own);
  const std::int64_t features = chunk.features;
  T* const local = task.local ? task.local : own.local;
  const bool outputs = task.y || task.log_z;
  fill_row<T>(local, attention_sums_size<T>(d_k, d_v), T(0));
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    store_pair<T>(own.base_scale, i, load_pair(task.scale, i));
  }
  attention_scale<T> queries = own.queries;
  if (!tokens.log_decay) queries.low = nullptr;

  for (std::int64_t begin = task.begin; begin < task.end; begin += kChunk) {
    load_chunk(tokens, begin, smaller<std::int64_t>(kChunk, task.end - begin), chunk);
    if (outputs && !tokens.log_decay) {
      load_queries<T>(task.log_q.from(begin), chunk.count, d_k, queries.high);
    }
    const std::int64_t next = begin + chunk.count;
    const std::int64_t next_end = smaller<std::int64_t>(next + kChunk, task.end);
    for (std::int64_t first = 0; first < chunk.count; first += sub.count) {
      begin_sub_chunk(tokens, chunk, first, task.scale, sub);
      if (task.total_decay.high) add_total_decay(sub, chunk, task.total_decay);
      decay_scale<T>(own.base_scale, chunk.decays ? chunk.decays + first * features : nullptr,
                     sub.fresh, features, own.base_scale);
      scale_factors<T>(sub.before, sub.top, features, own.local_factor);
      scale_factors<T>(own.base_scale, sub.top, features, own.base_factor);
      prefetch_rows<T>(tokens.log_k, next, next_end, d_k);
      key_exponentials<T>(sub, d_k, own.rows, outputs ? own.columns : nullptr);
      const T* const values = chunk.values + first * chunk.columns;
      if (outputs) {
        const std::int64_t t = begin + first;
        attention_scale<T> sub_queries = queries;
        if (tokens.log_decay) {
          load_decayed_queries<T>(sub, task.log_q.from(t), d_k, own.query_rows, queries);
        } else {
          sub_queries.high += first;
        }
        prefetch_rows<T>(tokens.v, next, next_end, d_v);
        query_exponentials<T>(sub_queries, sub.count, d_k, sub.top, own.weighted, own.c);
        rescale_sums<T>(local, own.local_factor, task.base, own.base_factor, d_k, d_v, own.sums);
        prefetch_rows<T>(task.log_q, next, next_end, d_k);
        weigh_keys<T>(own.weighted, own.columns, own.sums, sub.count, d_k, own.weights, own.den);
        output_rows<T> rows{};
        if (task.y) rows.y = task.y.from(t);
        rows.count = sub.count;
        rows.d_k = d_k;
        rows.d_v = d_v;
        rows.columns = chunk.columns;
        rows.queries = own.weighted;
        rows.sums = own.sums + features;
        rows.weights = own.weights;
        rows.values = values;
        write_rows<T>(rows, own.c, own.den, task.log_z.from(t), task.empty_is_nan);
      }
      if (task.local || begin + first + sub.count < task.end) {
        add_keys<T>(own.rows, values, sub.count, own.local_factor, d_k, d_v, local);
      }
      decay_to_last(sub, sub.top, features, task.scale);
      decay_to_last(sub, own.base_scale, features, own.base_scale);
    }
  }
  if (task.factor) {
    for (std::int64_t i = 0; i < features; ++i) task.factor[i] = own.base_factor[i];
  }
}

// One vector of a fold. Scaled: not all factors are 1; what they round is no more than their own
// error, and a new maximum alone makes another factor than 1.
template <class T, bool Scaled>
SUBQUAD_INLINE void fold(vec<T> factor, const T* local, T* high, T* low, T* before) {
  two_float<T> held = {load(high), load(low)};
  const vec<T> own = load(local);
  if (before) store<T>(before, held.high);
  if constexpr (Scaled) {
    const auto dropped = factor < T(0);
    held.high = dropped ? vec<T>{} : held.high * factor;
    held.low = dropped ? vec<T>{} : held.low * factor;
  }
  held = add<T>(held, {own, vec<T>{}});
  store<T>(high, held.high);
  store<T>(low, held.low);
}

template <class T>
void attention_fold(const attention_fold_task<T>& task) {
  const std::int64_t features = attention_padded<T>(task.d_k);
  const std::int64_t columns = attention_padded<T>(task.d_v);
  const auto before = [&](std::int64_t i) { return task.before ? task.before + i : nullptr; };
  for (std::int64_t i = task.begin; i < task.end; i += lanes<T>) {
    fold<T, true>(load(task.factor + i), task.local + i, task.high + i, task.low + i, before(i));
  }
  for (std::int64_t k = task.begin; k < task.end; ++k) {
    const std::int64_t row = features + k * columns;
    const vec<T> factor = broadcast(task.factor[k]);
    if (task.factor[k] == T(1)) {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) {
        fold<T, false>(factor, task.local + i, task.high + i, task.low + i, before(i));
      }
    } else {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) {
        fold<T, true>(factor, task.local + i, task.high + i, task.low + i, before(i));
      }
    }
  }
}

template <class T>
void attention_rows(const attention_rows_task<T>& task) {
  const std::int64_t d_k = task.d_k;
  chunk_scratch<T> own;
  place_chunk_scratch<T>(static_cast<T*>(task.scratch), d_k, task.d_v, own);
  for (std::int64_t t = 0; t < task.n; t += kChunk) {
    const std::int64_t count = smaller<std::int64_t>(kChunk, task.n - t);
    load_queries<T>(task.log_q.from(t), count, d_k, own.queries.high);
    query_exponentials<T>({own.queries.high, nullptr}, count, d_k, task.scale, own.weighted, own.c);
    for (std::int64_t i = 0; i < count; i += lanes<T>) {
      vec<T> sum{};
      for (std::int64_t k = 0; k < d_k; ++k) {
        sum += task.sums[k] * load(own.weighted + k * kChunk + i);
      }
      store<T>(own.den + i, sum);
    }
    output_rows<T> rows{};
    if (task.y) rows.y = task.y.from(t);
    rows.count = count;
    rows.d_k = d_k;
    rows.d_v = task.d_v;
    rows.columns = attention_padded<T>(task.d_v);
    rows.queries = own.weighted;
    rows.sums = task.sums + attention_padded<T>(d_k);
    write_rows<T>(rows, own.c, own.den, task.log_z.from(t), task.empty_is_nan);
  }
}

template <class T>
constexpr attention_functions<T> functions = {attention_scratch<T>, attention_scale_of<T>,
                                              attention_group<T>, attention_fold<T>,
                                              attention_rows<T>};

}  // namespace

extern const attention_kernels kernels_attention;
const attention_kernels kernels_attention = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
