// Contracts stand in attention_vjp_kernels.hpp. Rows of queries lie in lanes where weights are made
// (sums over keys and features then never cross lanes), features or values where gradients of keys
// are: what is read in both ways is transposed once, in squares.
#include "attention_vjp_kernels.hpp"

#include "attention_chunk.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// acc[r][v] += sum_k left[r * left_stride + k] * right[k * right_stride + v * lanes + lane]
template <class T, int Vectors>
SUBQUAD_INLINE void block_product_of_rows(std::int64_t depth, const T* left,
                                          std::int64_t left_stride, const T* right,
                                          std::int64_t right_stride, block<T, Vectors>& acc) {
  const T* rows[3] = {left, left + 3 * left_stride, left + 6 * left_stride};
  for (std::int64_t k = 0; k < depth; ++k) {
    vec<T> columns[Vectors];
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < Vectors; ++v) columns[v] = load(right + v * lanes<T>);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      const vec<T> value = broadcast(rows[r / 3][r % 3 * left_stride]);
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < Vectors; ++v) acc[r][v] += value * columns[v];
    }
    ++rows[0];
    ++rows[1];
    ++rows[2];
    right += right_stride;
  }
}

// to[c * to_stride + r] = from[r * from_stride + c]; rows and columns are multiples of 4.
template <class T>
void transpose(const T* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
               T* to, std::int64_t to_stride) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  for (std::int64_t r = 0; r < rows; r += kSide) {
    for (std::int64_t c = 0; c < columns; c += kSide) {
      const T* square[kSide];
      for (int i = 0; i < kSide; ++i) square[i] = from + (r + i) * from_stride + c;
      transpose_square(square, to + c * to_stride + r, to_stride);
    }
  }
}

// Calls body(width, first) for pairs of vectors, and for one where a pair does not fit.
template <int Vectors>
struct vector_count {
  static constexpr int kValue = Vectors;
};
template <class T, class F>
SUBQUAD_INLINE void for_vectors(std::int64_t padded, F&& body) {
  std::int64_t i = 0;
  for (; i + 2 * lanes<T> <= padded; i += 2 * lanes<T>) body(vector_count<2>{}, i);
  if (i < padded) body(vector_count<1>{}, i);
}

template <class T>
void copy_out(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t columns,
              matrix_view<T> to, std::int64_t first) {
  for (std::int64_t j = 0; to && j < count; ++j) {
    const T* const row = rows + j * stride;
    T* const out = to.data + (first + j) * to.row_stride;
    std::int64_t i = 0;
    if (to.column_stride == 1) {
      for (; i + lanes<T> <= columns; i += lanes<T>) store<T>(out + i, load(row + i));
    }
    for (; i < columns; ++i) out[i * to.column_stride] = row[i];
  }
}

// Rows that are wanted when the work at hand is done: chunks are walked in a direction that the
// processor does not foresee.
template <class U>
void prefetch_rows(matrix_view<U> rows, std::int64_t first, std::int64_t count,
                   std::int64_t columns) {
  if (!rows || rows.column_stride != 1) return;
  constexpr auto kStep = static_cast<std::int64_t>(64 / sizeof(U));
  for (std::int64_t j = first; j < first + count; ++j) {
    const U* const row = rows.data + j * rows.row_stride;
    for (std::int64_t i = 0; i < columns; i += kStep) __builtin_prefetch(row + i);
  }
}

// Hands out aligned pieces of memory, or counts them where there is none.
struct memory_pieces {
  char* begin;
  std::size_t used;

  template <class U>
  SUBQUAD_ALWAYS_INLINE U* take(std::int64_t count) {
    U* const piece = reinterpret_cast<U*>(begin + used);
    used += (static_cast<std::size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return piece;
  }
};

// What the chunks of a run share.
template <class T>
struct run_memory {
  std::int64_t d_k;
  std::int64_t d_v;
  std::int64_t features;  // padded
  std::int64_t columns;   // padded
  std::int64_t size;      // of a set of sums
  std::int64_t chunks;    // of keys
  T* centre;
  attention_scale<T> scales;  // M before each chunk and after the last, [chunks + 1][features]
  double* sums;
  double* gradients;
  T* kept;      // sums before each chunk and after the last; not causal: of all keys
  T* gradient;  // E, where not causal
  std::size_t bytes;

  run_memory(void* memory, std::int64_t n, std::int64_t n_features, std::int64_t n_values,
             bool causal)
      : d_k(n_features), d_v(n_values) {
    features = attention_padded<T>(d_k);
    columns = attention_padded<T>(d_v);
    size = attention_sums_size<T>(d_k, d_v);
    chunks = divide_up(n, kChunk);
    memory_pieces pieces{static_cast<char*>(memory), 0};
    centre = pieces.take<T>(columns);
    scales.high = pieces.take<T>((chunks + 1) * features);
    scales.low = pieces.take<T>((chunks + 1) * features);
    sums = pieces.take<double>(size);
    gradients = pieces.take<double>(size);
    kept = pieces.take<T>((causal ? chunks + 1 : 1) * size);
    gradient = pieces.take<T>(size);
    bytes = pieces.used;
  }
  explicit run_memory(const attention_vjp_task<T>& task)
      : run_memory(task.run, task.n, task.keys.d_k, task.keys.d_v, task.causal) {}

  attention_scale<T> scale(std::int64_t chunk) const {
    return {scales.high + chunk * features, scales.low + chunk * features};
  }
};

// What a chunk has to itself. Rows of tokens have room for a whole chunk after the last.
template <class T>
struct chunk_memory {
  key_chunk<T> tokens;
  sub_chunk<T> sub;
  attention_scale<T> scale;
  T* factor;        // of the current sub-chunk
  double* first;    // factors from the chunk's start into its first sub-chunk
  double* rest;     // ... and from there to its end
  double* flow;     // <S, E> of each feature at the end of the chunk
  T* part;          // what the chunk adds to S and Z, or to E; in `keys`, E at its end
  T* running;       // sums, or their gradients, between sub-chunks
  T* transposed;    // E_S with features in lanes
  T* key_rows;      // K^
  T* key_columns;   // K^ of the last sub-chunk that was packed
  T* query_rows;    // Q~
  T* grad_rows;     // grad_y
  T* weights;       // P^T: rows of keys of kChunk
  T* grad_weights;  // dW^T
  T* grad_queries;  // grad_log_q
  T* grad_keys;     // grad_log_k
  T* factors;       // into each sub-chunk
  T* delta;         // one per row
  T* grad_log_z;    // one per row
  T* absent;        // 1 for rows whose gradients are all 0
  T* total;         // one per row of a sub-chunk: its weights
  T* c;
  attention_scale<T> queries;  // in rows of features
  T* query_columns;            // Q^, then Q~
  T* products;                 // grad_y S^T, then grad_log_q
  T* grad_columns;             // grad_y in rows of values
  T* scratch;
  T* out;
  std::int64_t* starts;   // of sub-chunks, and the chunk's end
  std::int64_t* counted;  // keys that count for something
  std::int64_t* ends;     // rows after which a sub-chunk has to end
  std::int64_t* subs;     // how many
  std::size_t bytes;

  chunk_memory(void* memory, const attention_tokens<T>& keys) {
    const std::int64_t features = attention_padded<T>(keys.d_k);
    const std::int64_t columns = attention_padded<T>(keys.d_v);
    const std::int64_t size = attention_sums_size<T>(keys.d_k, keys.d_v);
    constexpr std::int64_t kRows = 2 * kChunk;
    memory_pieces pieces{static_cast<char*>(memory), 0};
    place_key_chunk<T>(pieces.take<T>(key_chunk_size<T>(keys.d_k, keys.d_v)), keys, tokens);
    place_sub_chunk<T>(pieces.take<T>(sub_chunk_size<T>(keys.d_k)), keys.d_k, sub);
    scale = {pieces.take<T>(features), pieces.take<T>(features)};
    factor = pieces.take<T>(features);
    first = pieces.take<double>(features);
    rest = pieces.take<double>(features);
    flow = pieces.take<double>(features);
    part = pieces.take<T>(size);
    running = pieces.take<T>(size);
    transposed = pieces.take<T>(columns * features);
    key_rows = pieces.take<T>(kRows * features);
    key_columns = pieces.take<T>(kChunk * features);
    query_rows = pieces.take<T>(kRows * features);
    grad_rows = pieces.take<T>(kRows * columns);
    weights = pieces.take<T>(kRows * kChunk);
    grad_weights = pieces.take<T>(kRows * kChunk);
    grad_queries = pieces.take<T>(kRows * features);
    grad_keys = pieces.take<T>(kRows * features);
    factors = pieces.take<T>(kChunk * features);
    delta = pieces.take<T>(kRows);
    grad_log_z = pieces.take<T>(kRows);
    absent = pieces.take<T>(kRows);
    total = pieces.take<T>(kRows);
    c = pieces.take<T>(kRows);
    queries.high = pieces.take<T>((features + 1) * kChunk);
    queries.low = pieces.take<T>((features + 1) * kChunk);
    query_columns = pieces.take<T>((features + 1) * kChunk);
    products = pieces.take<T>(features * kChunk);
    grad_columns = pieces.take<T>(columns * kChunk);
    scratch = pieces.take<T>(2 * kChunk * features);
    out = pieces.take<T>(kRows * (features > columns ? features : columns));
    starts = pieces.take<std::int64_t>(kChunk + 1);
    counted = pieces.take<std::int64_t>(kChunk);
    ends = pieces.take<std::int64_t>(kChunk);
    subs = pieces.take<std::int64_t>(1);
    bytes = pieces.used;
  }
};

template <class T>
std::size_t run_bytes(std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool causal) {
  return run_memory<T>(nullptr, n, d_k, d_v, causal).bytes;
}

template <class T>
std::size_t chunk_bytes(std::int64_t d_k, std::int64_t d_v) {
  attention_tokens<T> keys{};
  keys.d_k = d_k;
  keys.d_v = d_v;
  return chunk_memory<T>(nullptr, keys).bytes;
}

// ---- rows of sums -------------------------------------------------------------------------------

// Calls body(feature, i, count) for the elements [i, i + count) of a set of sums that belong to one
// feature. What pads them may hold anything.
template <class T, class F>
SUBQUAD_INLINE void for_sums(const run_memory<T>& run, F&& body) {
  for (std::int64_t r = 0; r < run.d_k; ++r) {
    body(r, r, std::int64_t{1});
    body(r, run.features + r * run.columns, run.d_v);
  }
}

SUBQUAD_INLINE double dropped_or(double factor, double value) {
  return factor < 0 ? 0 : factor * value;
}

// exp(from - to) in double: over a long sequence the rounding of factors in T would add up.
template <class T>
void exact_factors(const attention_scale<T>& from, const attention_scale<T>& to,
                   std::int64_t features, double* factors) {
  for (std::int64_t i = 0; i < features; ++i) {
    factors[i] = (static_cast<double>(from.high[i]) - static_cast<double>(to.high[i])) +
                 (static_cast<double>(from.low[i]) - static_cast<double>(to.low[i]));
  }
  for (std::int64_t i = 0; i < features; i += lanes<double>) {
    store<double>(factors + i, exp<double>(load(factors + i)));
  }
  for (std::int64_t i = 0; i < features; ++i) {
    if (from.high[i] == -kInfinity<T>) factors[i] = -1;
  }
}

// Factors of one way after another.
SUBQUAD_INLINE void compose(const double* more, std::int64_t features, double* factors) {
  for (std::int64_t i = 0; i < features; ++i) {
    factors[i] = factors[i] < 0 || more[i] < 0 ? -1 : factors[i] * more[i];
  }
}

// ---- the start ----------------------------------------------------------------------------------

// The entry nearest to zero of each column of values whose entries are finite and of one sign; 0 of
// the others. Few rows are looked at where signs are mixed.
template <class T>
void find_centre(const attention_vjp_task<T>& task, const run_memory<T>& run, T* row) {
  const attention_tokens<T>& keys = task.keys;
  T* const low = row + run.columns;
  T* const high = low + run.columns;
  fill_row<T>(low, run.columns, kInfinity<T>);
  fill_row<T>(high, run.columns, -kInfinity<T>);
  for (std::int64_t j = 0; j < task.n; ++j) {
    if (keys.key_mask && keys.key_mask[j] == 0) continue;
    bool counts = false;
    for (std::int64_t r = 0; r < keys.d_k && !counts; ++r) {
      counts = keys.log_k(j, r) != -kInfinity<T>;
    }
    if (!counts) continue;
    copy_row<T>(keys.v.data + j * keys.v.row_stride, keys.v.column_stride, keys.d_v, run.columns,
                T(0), row);
    ivec<T> one_sign{};
    for (std::int64_t i = 0; i < run.columns; i += lanes<T>) {
      const vec<T> x = load(row + i);
      const auto whole = x - x == T(0);
      const vec<T> least = min<T>(whole ? x : broadcast(kInfinity<T>), load(low + i));
      const vec<T> most = max<T>(whole ? x : broadcast(-kInfinity<T>), load(high + i));
      store<T>(low + i, least);
      store<T>(high + i, most);
      one_sign |= (ivec<T>)(least > T(0)) | (ivec<T>)(most < T(0));
    }
    if (!any<T>(one_sign)) break;
  }
  for (std::int64_t i = 0; i < run.columns; ++i) {
    const T nearest = low[i] > T(0) ? low[i] : high[i] < T(0) ? high[i] : T(0);
    run.centre[i] = nearest - nearest == T(0) ? nearest : T(0);
  }
}

template <class T>
void begin(const attention_vjp_task<T>& task, void* memory) {
  const run_memory<T> run(task);
  const std::int64_t d_k = task.keys.d_k;
  const std::int64_t d_v = task.keys.d_v;
  find_centre(task, run, chunk_memory<T>(memory, task.keys).out);
  for (std::int64_t i = 0; i < run.size; ++i) run.sums[i] = 0;
  for (std::int64_t r = 0; r < run.features; ++r) {
    const bool held = task.key_sums && r < d_k;
    run.scales.high[r] = held ? task.key_sums(0, r) : -kInfinity<T>;
    run.scales.low[r] = held ? task.key_sums(1, r) : T(0);
    if (!held) continue;
    const double mass = static_cast<double>(task.key_sums(2, r)) + task.key_sums(3, r);
    run.sums[r] = mass;
    double* const row = run.sums + run.features + r * run.columns;
    for (std::int64_t i = 0; i < d_v; ++i) {
      row[i] = (static_cast<double>(task.value_sums[0](r, i)) + task.value_sums[1](r, i)) -
               mass * run.centre[i];
    }
  }
}

// ---- keys ---------------------------------------------------------------------------------------

template <class T>
void load_keys(const attention_vjp_task<T>& task, const run_memory<T>& run, std::int64_t chunk,
               key_chunk<T>& tokens) {
  const std::int64_t begin = chunk * kChunk;
  load_chunk(task.keys, begin, smaller<std::int64_t>(kChunk, task.n - begin), tokens);
  for (std::int64_t j = 0; j < tokens.count; ++j) {
    T* const row = tokens.values + j * run.columns;
    for (std::int64_t i = 0; i < run.columns; i += lanes<T>) {
      store<T>(row + i, load(row + i) - load(run.centre + i));
    }
  }
}

template <class T>
void copy_scale(const attention_scale<T>& from, std::int64_t features,
                const attention_scale<T>& to) {
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    store_pair<T>(to, i, load_pair(from, i));
  }
}

// All tokens of a chunk as one sub-chunk in a scale that is known.
template <class T>
void whole_chunk(const key_chunk<T>& tokens, const attention_scale<T>& scale, sub_chunk<T>& sub) {
  sub.first = 0;
  sub.count = tokens.count;
  sub.fresh = false;
  sub.keys = {tokens.keys, nullptr};
  sub.sums = {nullptr, nullptr};
  copy_scale(scale, tokens.features, sub.top);
}

// One more sub-chunk, up to token `end` of the chunk at most, from the scale `own.scale`, which
// becomes that of its end. Sets the factors into it.
template <class T>
void next_sub_chunk(const attention_vjp_task<T>& task, const run_memory<T>& run,
                    chunk_memory<T>& own, std::int64_t first, std::int64_t end) {
  const std::int64_t count = own.tokens.count;
  own.tokens.count = end;
  begin_sub_chunk(task.keys, own.tokens, first, own.scale, own.sub);
  own.tokens.count = count;
  scale_factors(own.sub.before, own.sub.top, run.features, own.factor);
  decay_to_last(own.sub, own.sub.top, run.features, own.scale);
}

// Factors into a chunk's first sub-chunk, and from there on.
template <class T>
void collect_factors(const run_memory<T>& run, const chunk_memory<T>& own) {
  exact_factors(own.sub.before, own.sub.top, run.features, own.flow);
  if (own.sub.first == 0) {
    for (std::int64_t i = 0; i < run.features; ++i) {
      own.first[i] = own.flow[i];
      own.rest[i] = 1;
    }
  } else {
    compose(own.flow, run.features, own.rest);
  }
}

template <class T>
void scales(const attention_vjp_task<T>& task, void* memory) {
  const run_memory<T> run(task);
  chunk_memory<T> own(memory, task.keys);
  for (std::int64_t chunk = 0; chunk < run.chunks; ++chunk) {
    load_keys(task, run, chunk, own.tokens);
    copy_scale(run.scale(chunk), run.features, own.scale);
    if (task.causal) {
      for (std::int64_t first = 0; first < own.tokens.count; first += own.sub.count) {
        next_sub_chunk(task, run, own, first, own.tokens.count);
      }
    } else {
      for (std::int64_t i = 0; i < run.features; i += lanes<T>) {
        const vec<T> before = load(own.scale.high + i);
        vec<T> top = before;
        for (std::int64_t j = 0; j < own.tokens.count; ++j) {
          top = max<T>(as_maximum<T>(load(own.tokens.keys + j * run.features + i)), top);
        }
        store<T>(own.scale.high + i, top);
        store<T>(own.scale.low + i, top == before ? load(own.scale.low + i) : vec<T>{});
      }
    }
    copy_scale(own.scale, run.features, run.scale(chunk + 1));
  }
}

template <class T>
void sums(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory) {
  const run_memory<T> run(task);
  chunk_memory<T> own(memory, task.keys);
  load_keys(task, run, chunk, own.tokens);
  const std::int64_t next = (chunk + 1) * kChunk;
  const std::int64_t rows = smaller<std::int64_t>(kChunk, task.n - next);
  prefetch_rows(task.keys.log_k, next, rows, run.d_k);
  prefetch_rows(task.keys.v, next, rows, run.d_v);
  fill_row<T>(own.factors, run.features, T(-1));
  if (!task.causal) {
    whole_chunk(own.tokens, run.scale(run.chunks), own.sub);
    key_exponentials<T>(own.sub, task.keys.d_k, own.key_rows, nullptr);
    add_keys(own.key_rows, own.tokens.values, own.sub.count, own.factors, task.keys.d_k,
             task.keys.d_v, own.part);
    return;
  }
  copy_scale(run.scale(chunk), run.features, own.scale);
  for (std::int64_t first = 0; first < own.tokens.count; first += own.sub.count) {
    next_sub_chunk(task, run, own, first, own.tokens.count);
    collect_factors(run, own);
    key_exponentials<T>(own.sub, task.keys.d_k, own.key_rows, nullptr);
    add_keys(own.key_rows, own.tokens.values + first * run.columns, own.sub.count,
             first == 0 ? own.factors : own.factor, task.keys.d_k, task.keys.d_v, own.part);
  }
  compose(own.rest, run.features, own.first);
  if (!task.scales_known) copy_scale(own.scale, run.features, run.scale(chunk + 1));
}

template <class T>
void advance_sums(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory) {
  const run_memory<T> run(task);
  const chunk_memory<T> own(memory, task.keys);
  if (!task.causal && chunk == 0) {
    exact_factors(run.scale(0), run.scale(run.chunks), run.features, own.first);
  }
  T* const kept = run.kept + chunk * run.size;
  for_sums(run, [&](std::int64_t r, std::int64_t first, std::int64_t count) {
    const double factor = task.causal || chunk == 0 ? own.first[r] : 1;
    for (std::int64_t i = first; i < first + count; ++i) {
      const double before = run.sums[i];
      if (task.causal) kept[i] = static_cast<T>(before);
      run.sums[i] = dropped_or(factor, before) + static_cast<double>(own.part[i]);
    }
  });
}

template <class T>
void turn(const attention_vjp_task<T>& task) {
  const run_memory<T> run(task);
  const std::int64_t d_k = task.keys.d_k;
  T* const kept = run.kept + (task.causal ? run.chunks * run.size : 0);
  for (std::int64_t i = 0; i < run.size; ++i) {
    kept[i] = static_cast<T>(run.sums[i]);
    run.gradients[i] = 0;
  }
  for (std::int64_t r = 0; r < d_k; ++r) {
    double mass = task.grad_final_key_sums ? task.grad_final_key_sums(2, r) : T(0);
    if (task.grad_final_value_sums) {
      double* const row = run.gradients + run.features + r * run.columns;
      for (std::int64_t i = 0; i < task.keys.d_v; ++i) {
        row[i] = task.grad_final_value_sums[0](r, i);
        mass += row[i] * run.centre[i];
      }
    }
    run.gradients[r] = mass;
  }
}

// ---- queries ------------------------------------------------------------------------------------

// Copies gradients of rows; a row whose gradients are all 0 is left out of everything, and one that
// is not finite may be followed by none in a product, so that it spreads to nothing before it.
template <class T>
void load_gradients(const attention_vjp_task<T>& task, const run_memory<T>& run, std::int64_t begin,
                    std::int64_t count, const chunk_memory<T>& own) {
  for (std::int64_t t = 0; t < count; ++t) {
    T* const row = own.grad_rows + t * run.columns;
    if (task.grad_y) {
      copy_row<T>(task.grad_y.data + (begin + t) * task.grad_y.row_stride,
                  task.grad_y.column_stride, task.keys.d_v, run.columns, T(0), row);
    } else {
      fill_row<T>(row, run.columns, T(0));
    }
    const T of_log_z = task.grad_log_z ? task.grad_log_z[begin + t] : T(0);
    bool absent = of_log_z == T(0);
    for (std::int64_t i = 0; i < run.d_v && absent; ++i) absent = row[i] == T(0);
    own.grad_log_z[t] = of_log_z;
    own.absent[t] = absent ? T(1) : T(0);
    bool ends = false;
    if (task.causal && !absent) {
      copy_row<T>(task.log_q.data + (begin + t) * task.log_q.row_stride, task.log_q.column_stride,
                  task.keys.d_k, run.features, T(0), own.out);
      ivec<T> bad{};
      for (std::int64_t i = 0; i < run.features; i += lanes<T>) {
        bad |= ~(ivec<T>)(load(own.out + i) < kInfinity<T>);
      }
      for (std::int64_t i = 0; i < run.columns; i += lanes<T>) {
        const vec<T> x = load(row + i);
        bad |= ~(ivec<T>)(x - x == T(0));
      }
      ends = of_log_z - of_log_z != T(0) || any<T>(bad);
    }
    own.ends[t] = ends;
  }
}

// Two vectors of rows of a sub-chunk, t0 and on: their weights, the weights' gradients and
// grad_log_q, in rows of features. `keys` says how many of the sub-chunk's keys any may attend.
template <class T>
SUBQUAD_INLINE void query_step(const run_memory<T>& run, const chunk_memory<T>& own,
                               std::int64_t d_k, std::int64_t d_v, const T* sums,
                               std::int64_t first, std::int64_t t0, std::int64_t keys) {
  using pair = vec<T>[2];
  constexpr std::int64_t kWidth = lanes<T>;
  const T* const values = own.tokens.values + first * run.columns;
  const T* const key_rows = own.key_rows + first * run.features;
  T* const weights = own.weights + first * kChunk + t0;
  T* const grad_weights = own.grad_weights + first * kChunk + t0;
  T* const queries = own.query_columns + t0;
  T* const products = own.products + t0;
  const T* const gradients = own.grad_columns + t0;
  pair total{};
  pair mean{};
  if (keys > 0) {
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < 2; ++v) total[v] = load(own.total + t0 + v * kWidth);
  }
  for (std::int64_t r0 = 0; r0 < d_k; r0 += kBlockRows) {
    block<T, 2> acc;
    block_zero<T, 2>(acc);
    block_product_of_rows<T, 2>(d_v, sums + run.features + r0 * run.columns, run.columns, gradients,
                                kChunk, acc);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      const T factor = own.factor[r0 + r];
      const T mass = factor < T(0) ? T(0) : factor * sums[r0 + r];
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < 2; ++v) {
        const std::int64_t at = (r0 + r) * kChunk + v * kWidth;
        const vec<T> query = load(queries + at);
        const vec<T> product = factor < T(0) ? vec<T>{} : acc[r][v] * factor;
        total[v] += query * mass;
        mean[v] += query * product;
        store<T>(products + at, product);
      }
    }
  }
  using lane_index = typename vector_of<T>::scalar_int;
  ivec<T> lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = static_cast<lane_index>(i);
  const auto attends = [&](int v, std::int64_t j) __attribute__((always_inline)) {
    return lane >= static_cast<lane_index>(j - t0 - v * kWidth);
  };
  for (std::int64_t j0 = 0; j0 < keys; j0 += kBlockRows) {
    block<T, 2> acc;
    block_zero<T, 2>(acc);
    block_product_of_rows<T, 2>(d_v, values + j0 * run.columns, run.columns, gradients, kChunk,
                                acc);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < 2; ++v) {
        const std::int64_t at = (j0 + r) * kChunk + v * kWidth;
        mean[v] += attends(v, j0 + r) ? load(weights + at) * acc[r][v] : vec<T>{};
        store<T>(grad_weights + at, acc[r][v]);
      }
    }
  }
  pair inverse;
  pair delta;
  SUBQUAD_UNROLL_VECTORS
  for (int v = 0; v < 2; ++v) {
    const std::int64_t t = first + t0 + v * kWidth;
    const auto left_out = (total[v] == T(0)) | (load(own.absent + t) != T(0));
    inverse[v] = left_out ? vec<T>{} : T(1) / total[v];
    delta[v] = left_out ? vec<T>{} : mean[v] * inverse[v] - load(own.grad_log_z + t);
    store<T>(own.delta + t, delta[v]);
  }
  const auto scaled = [&](T* at, int v) __attribute__((always_inline)) {
    const vec<T> value = inverse[v] == T(0) ? vec<T>{} : load(at) * inverse[v];
    store<T>(at, value);
    return value;
  };
  for (std::int64_t j = 0; j < keys; ++j) {
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < 2; ++v) {
      const std::int64_t at = j * kChunk + v * kWidth;
      scaled(weights + at, v);
      const auto counts = attends(v, j) & (inverse[v] != T(0));
      store<T>(grad_weights + at, counts ? load(grad_weights + at) - delta[v] : vec<T>{});
    }
  }
  for (std::int64_t r0 = 0; r0 < d_k; r0 += kBlockRows) {
    block<T, 2> acc;
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      const T factor = own.factor[r0 + r];
      const T mass = factor < T(0) ? T(0) : factor * sums[r0 + r];
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < 2; ++v) {
        acc[r][v] = load(products + (r0 + r) * kChunk + v * kWidth) - delta[v] * mass;
      }
    }
    block_product<T, 2>(keys, key_rows + r0, run.features, grad_weights, kChunk, acc);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < 2; ++v) {
        const std::int64_t at = (r0 + r) * kChunk + v * kWidth;
        const vec<T> query = scaled(queries + at, v);
        store<T>(products + at, query == T(0) ? vec<T>{} : query * acc[r][v]);
      }
    }
  }
}

// Rows [first, first + count) of a chunk of queries that starts at `begin`, which find `sums` times
// own.factor and, where causal, the keys of own.sub.
template <class T>
void query_rows(const attention_vjp_task<T>& task, const run_memory<T>& run,
                const chunk_memory<T>& own, const T* sums, std::int64_t begin, std::int64_t first,
                std::int64_t count) {
  const std::int64_t d_k = task.keys.d_k;
  const matrix_view<const T> log_q = task.log_q.from(begin + first);
  if (own.sub.sums.high) {
    load_decayed_queries(own.sub, log_q, d_k, own.scratch, own.queries);
    query_exponentials<T>(own.queries, count, d_k, own.sub.top, own.query_columns, own.c);
  } else {
    load_queries<T>(log_q, count, d_k, own.queries.high);
    query_exponentials<T>({own.queries.high, nullptr}, count, d_k, own.sub.top, own.query_columns,
                          own.c);
  }
  fill_row<T>(own.query_columns + d_k * kChunk, (run.features - d_k) * kChunk, T(0));
  pack_rows<kChunk, T>({own.grad_rows + first * run.columns, run.columns, 1}, kChunk, task.keys.d_v,
                       own.grad_columns);
  if (task.causal) {
    weigh_keys<T>(own.query_columns, own.key_columns, nullptr, count, d_k,
                  own.weights + first * kChunk, own.total);
  }
  for (std::int64_t t0 = 0; t0 < count; t0 += 2 * lanes<T>) {
    query_step(run, own, d_k, task.keys.d_v, sums, first, t0,
               task.causal ? smaller<std::int64_t>(count, t0 + 2 * lanes<T>) : 0);
  }
  transpose(own.products, kChunk, run.features, kChunk, own.grad_queries + first * run.features,
            run.features);
  transpose(own.query_columns, kChunk, run.features, kChunk, own.query_rows + first * run.features,
            run.features);
  copy_out(own.grad_queries + first * run.features, run.features, count, d_k, task.grad_log_q,
           begin + first);
}

// gradients = factor * gradients + what rows [first, first + count) of the chunk add to E.
template <class T>
void add_queries(const attention_vjp_task<T>& task, const run_memory<T>& run,
                 const chunk_memory<T>& own, std::int64_t first, std::int64_t count,
                 const T* factor, T* gradients) {
  const T* const rows = own.query_rows + first * run.features;
  for (std::int64_t i = 0; i < run.features; i += lanes<T>) {
    vec<T> sum{};
    for (std::int64_t t = 0; t < count; ++t) {
      sum += load(rows + t * run.features + i) * own.delta[first + t];
    }
    const vec<T> by = load(factor + i);
    store<T>(own.scratch + i, (by < T(0) ? vec<T>{} : by * load(gradients + i)) - sum);
  }
  add_keys(rows, own.grad_rows + first * run.columns, count, factor, task.keys.d_k, task.keys.d_v,
           gradients);
  for (std::int64_t i = 0; i < run.features; i += lanes<T>) {
    store<T>(gradients + i, load(own.scratch + i));
  }
}

template <class T>
void queries(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory) {
  const run_memory<T> run(task);
  chunk_memory<T> own(memory, task.keys);
  const std::int64_t d_k = task.keys.d_k;
  const std::int64_t begin = chunk * kChunk;
  T* const drop = own.scratch + kChunk * run.features;
  fill_row<T>(drop, run.features, T(-1));
  if (!task.causal) {
    const std::int64_t count = smaller<std::int64_t>(kChunk, task.n_q - begin);
    own.sub.sums = {nullptr, nullptr};
    copy_scale(run.scale(run.chunks), run.features, own.sub.top);
    fill_row<T>(own.factor, run.features, T(1));
    load_gradients(task, run, begin, count, own);
    query_rows(task, run, own, run.kept, begin, 0, count);
    add_queries(task, run, own, 0, count, drop, own.part);
    return;
  }
  if (chunk > 0) {
    const std::int64_t next = begin - kChunk;
    prefetch_rows(task.keys.log_k, next, kChunk, d_k);
    prefetch_rows(task.keys.v, next, kChunk, run.d_v);
    prefetch_rows(task.log_q, next, kChunk, d_k);
    prefetch_rows(task.grad_y, next, kChunk, run.d_v);
  }
  prefetch_rows(task.grad_log_q, begin, smaller<std::int64_t>(kChunk, task.n - begin), d_k);
  prefetch_rows(task.grad_log_k, begin, smaller<std::int64_t>(kChunk, task.n - begin), d_k);
  prefetch_rows(task.grad_v, begin, smaller<std::int64_t>(kChunk, task.n - begin), run.d_v);
  load_keys(task, run, chunk, own.tokens);
  const std::int64_t count = own.tokens.count;
  for (std::int64_t t = 0; t < count; ++t) own.ends[t] = 0;
  if (task.log_q) load_gradients(task, run, begin, count, own);
  copy_scale(run.scale(chunk), run.features, own.scale);
  const T* sums = run.kept + chunk * run.size;
  std::int64_t subs = 0;
  for (std::int64_t first = 0; first < count; first += own.sub.count) {
    std::int64_t end = first + 1;
    while (end < count && !own.ends[end - 1]) ++end;
    next_sub_chunk(task, run, own, first, end);
    collect_factors(run, own);
    own.starts[subs] = first;
    copy_row<T>(own.factor, 1, run.features, run.features, T(0), own.factors + subs * run.features);
    ++subs;
    key_exponentials(own.sub, d_k, own.key_rows + first * run.features, own.key_columns);
    if (task.log_q) query_rows(task, run, own, sums, begin, first, own.sub.count);
    if (first + own.sub.count == count) break;
    if (first == 0) {
      for (std::int64_t i = 0; i < run.size; i += lanes<T>) {
        store<T>(own.running + i, load(sums + i));
      }
      sums = own.running;
    }
    add_keys(own.key_rows + first * run.features, own.tokens.values + first * run.columns,
             own.sub.count, own.factor, d_k, task.keys.d_v, own.running);
  }
  own.starts[subs] = count;
  *own.subs = subs;
  if (!task.log_q) return;
  for (std::int64_t s = subs; s-- > 0;) {
    fill_row<T>(drop, run.features, T(-1));
    add_queries(task, run, own, own.starts[s], own.starts[s + 1] - own.starts[s],
                s + 1 == subs ? drop : own.factors + (s + 1) * run.features, own.part);
  }
}

// ---- the gradients of keys ----------------------------------------------------------------------

template <class T>
void advance_gradients(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory) {
  const run_memory<T> run(task);
  const chunk_memory<T> own(memory, task.keys);
  if (!task.causal) {
    for (std::int64_t i = 0; i < run.size; ++i) {
      run.gradients[i] += static_cast<double>(own.part[i]);
    }
    return;
  }
  if (task.grad_log_decay) {
    const T* const sums = run.kept + (chunk + 1) * run.size;
    for (std::int64_t r = 0; r < run.features; ++r) own.flow[r] = 0;
    for_sums(run, [&](std::int64_t r, std::int64_t first, std::int64_t count) {
      for (std::int64_t i = first; i < first + count; ++i) {
        own.flow[r] += static_cast<double>(sums[i]) * run.gradients[i];
      }
    });
  }
  for_sums(run, [&](std::int64_t r, std::int64_t first, std::int64_t count) {
    const double into = own.first[r];
    const double rest = own.rest[r];
    for (std::int64_t i = first; i < first + count; ++i) {
      const double after = run.gradients[i];
      const double part = task.log_q ? static_cast<double>(own.part[i]) : 0.0;
      own.part[i] = static_cast<T>(after);
      run.gradients[i] = dropped_or(into, dropped_or(rest, after) + part);
    }
  });
}

// grad_log_k and grad_v of a sub-chunk, whose sums have the gradients `after` at its end.
template <class T>
void key_rows(const attention_vjp_task<T>& task, const run_memory<T>& run,
              const chunk_memory<T>& own, const T* after, std::int64_t begin, std::int64_t first,
              std::int64_t count) {
  const std::int64_t d_k = task.keys.d_k;
  const std::int64_t d_v = task.keys.d_v;
  const T* const values = own.tokens.values + first * run.columns;
  const T* const keys = own.key_rows + first * run.features;
  const T* const weights = own.weights + first * kChunk;
  const T* const grad_weights = own.grad_weights + first * kChunk;
  const bool rows = task.causal && task.log_q;
  if (task.grad_log_k || task.grad_log_decay) {
    transpose(after + run.features, run.columns, run.features, run.columns, own.transposed,
              run.features);
    for_vectors<T>(run.features, [&](auto vectors, std::int64_t r) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::kValue;
      for (std::int64_t j0 = 0; j0 < count; j0 += kBlockRows) {
        block<T, kVectors> acc;
        SUBQUAD_UNROLL_BLOCK
        for (int j = 0; j < kBlockRows; ++j) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kVectors; ++v) acc[j][v] = load(after + r + v * lanes<T>);
        }
        block_product_of_rows<T, kVectors>(d_v, values + j0 * run.columns, run.columns,
                                           own.transposed + r, run.features, acc);
        if (rows) {
          block_product_of_rows<T, kVectors>(count - j0, grad_weights + j0 * kChunk + j0, kChunk,
                                             own.query_rows + (first + j0) * run.features + r,
                                             run.features, acc);
        }
        SUBQUAD_UNROLL_BLOCK
        for (int j = 0; j < kBlockRows; ++j) {
          if (j0 + j >= count) continue;
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kVectors; ++v) {
            const std::int64_t at = (j0 + j) * run.features + r + v * lanes<T>;
            const vec<T> key = load(keys + at);
            store<T>(own.grad_keys + first * run.features + at,
                     key == T(0) ? vec<T>{} : key * acc[j][v]);
          }
        }
      }
    });
  }
  if (!task.grad_v) return;
  const T* const columns = own.key_columns;
  for_vectors<T>(run.columns, [&](auto vectors, std::int64_t i) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::kValue;
    for (std::int64_t j0 = 0; j0 < count; j0 += kBlockRows) {
      block<T, kVectors> acc;
      block_zero<T, kVectors>(acc);
      block_product<T, kVectors>(d_k, columns + j0, kChunk, after + run.features + i, run.columns,
                                 acc);
      if (rows) {
        block_product_of_rows<T, kVectors>(count - j0, weights + j0 * kChunk + j0, kChunk,
                                           own.grad_rows + (first + j0) * run.columns + i,
                                           run.columns, acc);
      }
      SUBQUAD_UNROLL_BLOCK
      for (int j = 0; j < kBlockRows; ++j) {
        if (j0 + j >= count) continue;
        const bool counts = own.counted[first + j0 + j];
        SUBQUAD_UNROLL_VECTORS
        for (int v = 0; v < kVectors; ++v) {
          store<T>(own.out + (j0 + j) * run.columns + i + v * lanes<T>,
                   counts ? acc[j][v] : vec<T>{});
        }
      }
    }
  });
  copy_out(own.out, run.columns, count, d_v, task.grad_v, begin + first);
}

// grad_log_decay_t: the gradient of the logarithms of all weights that reach from before t to t or
// past it. What crosses the chunk's end is known from there; going backwards, rows add theirs and
// keys take away what starts at them. Nothing crosses a token that forgets.
template <class T>
void decay_rows(const attention_vjp_task<T>& task, const run_memory<T>& run,
                const chunk_memory<T>& own, std::int64_t begin) {
  double* const crossing = own.flow;
  double* const total = own.first;  // the factor is not needed any more
  for (std::int64_t r = 0; r < run.features; ++r) {
    total[r] = task.grad_final_key_sums && r < run.d_k ? task.grad_final_key_sums(4, r) : T(0);
  }
  for (std::int64_t t = own.tokens.count; t-- > 0;) {
    const T* const queries = own.grad_queries + t * run.features;
    const T* const keys = own.grad_keys + t * run.features;
    const T* const decays = own.tokens.decays ? own.tokens.decays + t * run.features : nullptr;
    T* const out = own.out + t * run.features;
    const bool first = begin + t == 0 && !task.key_sums;
    for (std::int64_t r = 0; task.log_q && r < run.features; ++r) {
      crossing[r] += static_cast<double>(queries[r]);
    }
    for (std::int64_t r = 0; r < run.features; ++r) {
      const double through = crossing[r] - static_cast<double>(keys[r]);
      crossing[r] = first || (decays && decays[r] == -kInfinity<T>) ? 0 : through;
      out[r] = static_cast<T>(crossing[r] + total[r]);
    }
  }
  copy_out(own.out, run.features, own.tokens.count, run.d_k, task.grad_log_decay, begin);
}

template <class T>
void keys(const attention_vjp_task<T>& task, std::int64_t chunk, void* memory) {
  const run_memory<T> run(task);
  chunk_memory<T> own(memory, task.keys);
  const std::int64_t d_k = task.keys.d_k;
  const std::int64_t begin = chunk * kChunk;
  if (!task.causal) {
    load_keys(task, run, chunk, own.tokens);
    whole_chunk(own.tokens, run.scale(run.chunks), own.sub);
    key_exponentials(own.sub, d_k, own.key_rows, own.key_columns);
    own.starts[0] = 0;
    own.starts[1] = own.tokens.count;
    *own.subs = 1;
  }
  own.tokens.count = smaller<std::int64_t>(kChunk, task.n - begin);
  for (std::int64_t j = 0; j < own.tokens.count; ++j) {
    ivec<T> counts{};
    for (std::int64_t i = 0; i < run.features; i += lanes<T>) {
      counts |= (ivec<T>)(load(own.tokens.keys + j * run.features + i) != -kInfinity<T>);
    }
    own.counted[j] = any<T>(counts);
  }
  const T* after = task.causal ? own.part : run.gradient;
  T* const ones = own.scratch + kChunk * run.features;
  fill_row<T>(ones, run.features, T(1));
  const std::int64_t subs = *own.subs;
  for (std::int64_t s = subs; s-- > 0;) {
    const std::int64_t first = own.starts[s];
    const std::int64_t count = own.starts[s + 1] - first;
    if (s + 1 < subs) {
      pack_rows<kChunk, T>({own.key_rows + first * run.features, run.features, 1}, kChunk, d_k,
                           own.key_columns);
    }
    key_rows(task, run, own, after, begin, first, count);
    if (s == 0) break;
    if (s + 1 == subs) {
      for (std::int64_t i = 0; i < run.size; i += lanes<T>) {
        store<T>(own.running + i, load(after + i));
      }
      after = own.running;
    }
    if (task.log_q) add_queries(task, run, own, first, count, ones, own.running);
    rescale_sums<T>(own.running, own.factors + s * run.features, nullptr, nullptr, d_k,
                    task.keys.d_v, own.running);
  }
  copy_out(own.grad_keys, run.features, own.tokens.count, d_k, task.grad_log_k, begin);
  if (task.grad_log_decay) decay_rows(task, run, own, begin);
}

// E of all queries, before any key is looked at.
template <class T>
void finish_queries(const attention_vjp_task<T>& task) {
  const run_memory<T> run(task);
  for (std::int64_t i = 0; i < run.size; ++i) run.gradient[i] = static_cast<T>(run.gradients[i]);
}

template <class T>
void finish(const attention_vjp_task<T>& task) {
  const run_memory<T> run(task);
  const std::int64_t d_k = task.keys.d_k;
  if (!task.causal) {
    // The memory of the sums is free by now.
    exact_factors(run.scale(0), run.scale(run.chunks), run.features, run.sums);
  }
  for (std::int64_t r = 0; r < d_k; ++r) {
    const double factor = run.scales.high[r] == -kInfinity<T> ? -1 : task.causal ? 1 : run.sums[r];
    double mass = dropped_or(factor, run.gradients[r]);
    for (std::int64_t i = 0; i < task.keys.d_v; ++i) {
      const double value = dropped_or(factor, run.gradients[run.features + r * run.columns + i]);
      mass -= value * static_cast<double>(run.centre[i]);
      if (!task.grad_value_sums) continue;
      task.grad_value_sums[0](r, i) = task.grad_value_sums[1](r, i) = static_cast<T>(value);
    }
    if (!task.grad_key_sums) continue;
    task.grad_key_sums(0, r) = task.grad_key_sums(1, r) = T(0);
    task.grad_key_sums(2, r) = task.grad_key_sums(3, r) = static_cast<T>(mass);
    task.grad_key_sums(4, r) = task.grad_final_key_sums ? task.grad_final_key_sums(4, r) : T(0);
  }
}

template <class T>
constexpr attention_vjp_functions<T> functions = {
    run_bytes<T>,      chunk_bytes<T>, begin<T>,
    scales<T>,         sums<T>,        advance_sums<T>,
    turn<T>,           queries<T>,     advance_gradients<T>,
    finish_queries<T>, keys<T>,        finish<T>};

}  // namespace

extern const attention_vjp_kernels kernels_attention_vjp;
const attention_vjp_kernels kernels_attention_vjp = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad
