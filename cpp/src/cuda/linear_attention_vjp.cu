// The reverse of linear attention.
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "attention_outputs.cuh"

namespace subquad::cuda {
namespace {

enum gradient_member {
  kGradY,
  kGradFinalKeySums,
  kGradFinalValueSums,
  kGradLogK,
  kGradV,
  kGradLogQ,
  kGradLogDecay,
  kGradKeySums,
  kGradValueSums,
  kGradients
};

// The gradients of a call, each optional.
template <class T>
struct attention_gradients {
  matrix_view<const T> y;
  matrix_view<const T> final_key_sums;
  stack_view<const T> final_value_sums;
  matrix_view<T> log_k;
  matrix_view<T> v;
  matrix_view<T> log_q;
  matrix_view<T> log_decay;
  matrix_view<T> key_sums;
  stack_view<T> value_sums;
  batches<kGradients> batch;

  SUBQUAD_DEVICE bool has_final() const { return final_key_sums || final_value_sums; }
  SUBQUAD_DEVICE T final_key_sum(std::int64_t index, int row, int feature) const {
    if (!final_key_sums) return 0;
    return final_key_sums
        .data[batch.offset(kGradFinalKeySums, index) + row * final_key_sums.row_stride +
              feature * final_key_sums.column_stride];
  }
  SUBQUAD_DEVICE T final_value_sum(std::int64_t index, int feature, int value) const {
    if (!final_value_sums) return 0;
    return final_value_sums
        .data[batch.offset(kGradFinalValueSums, index) + feature * final_value_sums.row_stride +
              value * final_value_sums.column_stride];
  }
  // A matrix from the row `first` of a member of the batch on.
  template <class U>
  SUBQUAD_DEVICE matrix_view<U> at(const matrix_view<U>& matrix, int which, std::int64_t index,
                                   std::int64_t first) const {
    return {matrix.data + batch.offset(which, index) + first * matrix.row_stride, matrix.row_stride,
            matrix.column_stride};
  }
};

// Sums over rows, by chunk: with q~_tr = exp(log_q_tr - log_z_t),
//   sums = sum_t q~_t grad_y_t^T;  column = sum_t q~_t p_t,  p_t the product that row_sums keeps
// in the units exp(-scale) of the states that the rows attend. `after` holds for each chunk those
// of the rows that come after it, with what the final state adds, in the scale of the state after
// the chunk; `before`, where keys are attended from before, those of rows that come before it.
// Where all rows attend all keys, slot `chunks` of `after` holds them all.
template <class T>
struct reverse_states {
  chunk_states<T> after;
  chunk_states<T> before;
};

// What a call keeps between its kernels.
template <class T>
struct reverse_workspace {
  attention_states<T> states;
  reverse_states<T> reverse;
  row_sums<T> rows;
  T* center;    // [batch][d_v]
  int* undone;  // of the blocks of a kernel

  reverse_workspace(workspace_layout workspace, std::int64_t batch, std::int64_t n_q,
                    std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool causal, bool has_later,
                    bool attends_all)
      : reverse{}, rows{} {
    states.take(workspace, batch, n, d_k, d_v, causal, has_later);
    reverse.after.take_beside(states.earlier, workspace, batch,
                              divide_up(attends_all ? n_q : n, kTokens));
    if (has_later) {
      reverse.before.take_beside(states.later, workspace, batch, divide_up(n, kTokens));
    }
    rows.scales = workspace.take<double>(batch * n_q);
    rows.sums = workspace.take<T>(batch * n_q);
    rows.products = workspace.take<T>(batch * n_q);
    center = workspace.take<T>(batch * d_v);
    rows.center = center;
    const std::int64_t tokens = std::max(n_q, n);
    undone = workspace.take<int>(
        std::max(output_blocks(batch, tokens, d_v), output_blocks(batch, tokens, d_k)));
    bytes = workspace.size();
  }
  std::size_t bytes;
};

// A row of values that values are taken relative to, which changes nothing but rounding: the first
// that counts, 0 where there is none in the first chunk, or where it is not finite.
template <class T>
struct center_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  struct shared_memory {};
  attention_inputs<T> in;
  T* center;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= in.size * in.d_v) return;
    const std::int64_t batch = index / in.d_v;
    const std::int64_t keys = in.n < kTokens ? in.n : kTokens;
    std::int64_t key = 0;
    if (in.key_mask) {
      const std::uint8_t* mask = in.key_mask.data + in.batch.offset(kKeyMask, batch);
      while (key < keys && mask[key * in.key_mask.stride] == 0) ++key;
    }
    T value = 0;
    if (key < keys) {
      value = in.v.data[in.batch.offset(kV, batch) + key * in.v.row_stride +
                        index % in.d_v * in.v.column_stride];
    }
    center[index] = fabs(value) < infinity<T>() ? value : T(0);
  }
};

// The sums of each chunk's rows that attend what comes before the chunk (or after it): see
// reverse_states.
//
// Nothing aliases. With u = 2^-24 a weight is within 7 u (+ u of its logarithm) of itself; sums as
// those of key_sums_kernel.
template <class T>
struct query_sums_kernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = 2;
  using walk = feature_walk<64>;
  static constexpr int kStride = kColumnStride<T>;

  struct shared_memory {
    alignas(16) T weights[kTokens * kStride];  // [row][feature]
    T values[kTokens * kStride];
    walk::table table;
    T totals[walk::kGroups][walk::kFeatures];
    chunk_tokens<T> tokens;
  };

  attention_inputs<T> in;
  chunk_states<T> to;
  attention_states<T> states;
  row_sums<T> rows;
  attention_gradients<T> grads;
  bool of_later;  // rows that attend what comes after the chunk
  int feature_blocks;
  int value_blocks;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    const int value = static_cast<int>(index % value_blocks) * kValues;
    index /= value_blocks;
    const int first = static_cast<int>(index % feature_blocks) * walk::kFeatures;
    index /= feature_blocks;
    const std::int64_t chunk = index % to.chunks;
    const std::int64_t batch = index / to.chunks;
    locate_chunk(in, batch, chunk, shared.tokens);
    const chunk_tokens<T>& tokens = shared.tokens;
    const std::int64_t first_row = batch * in.n_q + chunk * kTokens;
    const auto counts = [&](int row) { return rows.sums[first_row + row] != T(0); };
    if (grads.y) {
      stage_columns<kTokens>(shared.values, kStride,
                             grads.at(grads.y, kGradY, batch, chunk * kTokens), tokens.rows, value,
                             in.d_v, static_cast<const T*>(nullptr), counts);
    } else {
      for (int i = block_thread(); i < kTokens * kStride; i += kThreads) shared.values[i] = 0;
    }
    const int feature = first + walk::feature();
    const bool exists = feature < in.d_k;
    const bool attends_all = in.attended == reach::all;
    const chunk_states<T>& attended = of_later ? states.later : states.earlier;
    const double scale = exists
                             ? attended.row_at(attended.scales, batch,
                                               attends_all ? states.earlier.chunks : chunk)[feature]
                             : -infinity<double>();
    double decay = walk::decay_before(tokens, feature, in.d_k, shared.table);
    const int begin = of_later ? tokens.tail_begin : 0;
    const int end = attends_all || of_later ? kTokens : tokens.head_end;
    T total = 0;
    SUBQUAD_UNROLL
    for (int i = 0; i < walk::kRows; ++i) {
      const int row = walk::row(i);
      decay = decayed(decay, walk::decay_at(tokens, row, feature, in.d_k));
      const double logarithm =
          row >= begin && row < end
              ? decayed(query_at(tokens, row, feature, in.d_k), decayed(scale, decay))
              : -infinity<double>();
      T weight = 0;
      if (logarithm != -infinity<double>() && counts(row)) {
        weight =
            weight_of<T>(logarithm - rows.scales[first_row + row]) / rows.sums[first_row + row];
        total = fma(weight, rows.products[first_row + row], total);
      }
      shared.weights[row * kStride + walk::feature()] = weight;
    }
    shared.totals[walk::group()][walk::feature()] = total;
    __syncthreads();
    if (value == 0 && walk::group() == 0 && exists) {
      for (int g = 1; g < walk::kGroups; ++g) total += shared.totals[g][walk::feature()];
      to.row_at(to.column, batch, chunk)[feature] = total;
    }
    if (in.d_v == 0) return;
    write_chunk_product(shared.weights, shared.values, tokens.rows, to.sums_at(batch, chunk), first,
                        value, in.d_k, in.d_v);
  }
};

// From the gradients of the final state.
template <class T>
struct gradient_ends {
  attention_gradients<T> grads;
  const T* center;
  bool is_seeded;

  SUBQUAD_DEVICE pair_of<T> first(const chunk_states<T>& states, std::int64_t batch, int feature,
                                  int value) const {
    if (!is_seeded) return {0, 0};
    if (value < states.d_v) return {grads.final_value_sum(batch, feature, value), T(0)};
    // Values relative to the centre make sums of weights what they are added to.
    T sum = -grads.final_key_sum(batch, 2, feature);
    for (int v = 0; v < states.d_v; ++v) {
      sum = fma(-grads.final_value_sum(batch, feature, v), center[batch * states.d_v + v], sum);
    }
    return {sum, T(0)};
  }
  SUBQUAD_DEVICE void last(const chunk_states<T>&, std::int64_t, int, int,
                           const pair_of<T>&) const {}
};

// Rows' sums that keys of a chunk have their gradients from.
template <class T>
struct key_sources : row_sources<T> {
  SUBQUAD_DEVICE void locate(const attention_inputs<T>& in, const attention_states<T>& states,
                             const reverse_states<T>& reverse, const chunk_tokens<T>& tokens,
                             bool has_final) {
    this->count = 0;
    this->of[0] = this->of[1] = {};
    const auto add = [&](const chunk_states<T>& from, std::int64_t slot,
                         const chunk_states<T>& scaled, std::int64_t scaled_slot, int begin,
                         int end) {
      this->of[this->count++] = {
          from.sums_at(tokens.batch, slot), from.row_at(from.column, tokens.batch, slot),
          scaled.row_at(scaled.scales, tokens.batch, scaled_slot), begin, end};
    };
    const std::int64_t chunks = states.earlier.chunks;
    if (in.attended == reach::all) {
      return add(reverse.after, reverse.after.chunks, states.earlier, chunks, 0, kTokens);
    }
    if (!tokens.ends && (tokens.chunk + 1 < chunks || has_final)) {
      add(reverse.after, tokens.chunk, states.earlier, tokens.chunk + 1, tokens.tail_begin,
          kTokens);
    }
    if (in.attended == reach::run && in.log_q && !tokens.begins && tokens.chunk > 0) {
      add(reverse.before, tokens.chunk, states.later, tokens.chunk - 1, 0, tokens.head_end);
    }
  }
};

// What the kernels of gradients share: the tokens of a chunk, and the sums of their rows.
template <class T>
struct gradient_arguments {
  attention_inputs<T> in;
  attention_states<T> states;
  reverse_states<T> reverse;
  row_sums<T> rows;
  attention_gradients<T> grads;
  std::int64_t chunks;
};

template <class T>
struct gradient_shared {
  chunk_tokens<T> tokens;
  row_sources<T> rows;
  key_sources<T> keys;
  matrix_view<const T> grad_y;  // from the first row of the chunk
  double scale[kTokens];        // of rows
  T inverse[kTokens];           // 1 / the sum of the row, 0 where it is empty
  T product[kTokens];

  // All threads call it.
  SUBQUAD_DEVICE void locate(const gradient_arguments<T>& of, std::int64_t batch,
                             std::int64_t chunk) {
    locate_chunk(of.in, batch, chunk, tokens);
    if (block_thread() == 0) {
      rows.locate(of.in, of.states, tokens);
      keys.locate(of.in, of.states, of.reverse, tokens, of.grads.has_final());
      grad_y = of.grads.y ? of.grads.at(of.grads.y, kGradY, batch, chunk * kTokens)
                          : matrix_view<const T>{};
    }
    if (block_thread() < kTokens) {
      const int row = block_thread();
      const std::int64_t index = batch * of.in.n_q + chunk * kTokens + row;
      const T sum = row < tokens.rows ? of.rows.sums[index] : T(0);
      scale[row] = row < tokens.rows ? of.rows.scales[index] : -infinity<double>();
      inverse[row] = sum == T(0) ? T(0) : T(1) / sum;
      product[row] = sum == T(0) ? T(0) : of.rows.products[index];
    }
    __syncthreads();
  }

  // What gradients of a row there are: none of an empty one.
  SUBQUAD_DEVICE T grad_at(int row, int value, int d_v) const {
    return grad_y && inverse[row] != T(0) && value < d_v ? grad_y(row, value) : T(0);
  }
  SUBQUAD_DEVICE T value_at(int key, int value, int d_v, const T* center) const {
    return tokens.counts(key) && value < d_v
               ? tokens.v(key, value) - center[tokens.batch * d_v + value]
               : T(0);
  }
};

// The factor of a source of keys: exp(key - decay - top) of a key, in the scale of the chunk, times
// this is exp(key - scale) decayed to the end. Where that is beyond what a good chunk has, there
// are no keys.
template <class T>
SUBQUAD_DEVICE T key_source_factor(double scale, double decay, double top) {
  const double exponent = decay + top - scale;
  if (scale == -infinity<double>() || top == -infinity<double>()) return 0;
  return exponent > kMostRise<T> + 1 ? T(0) : exponential(static_cast<T>(exponent));
}

// log_k of a key and its decay to the end of the chunk's last run, -inf where the source does not
// count it. Calls body(i, row, logarithm) for the rows of the thread's group, from the last on.
template <class Walk, class T, class Body>
SUBQUAD_DEVICE void each_source_key(const attention_inputs<T>& in, const chunk_tokens<T>& tokens,
                                    const row_source<T>& source, int first,
                                    typename Walk::table& table, Body&& body) {
  const int feature = first + Walk::feature();
  double after = 0;
  if (tokens.log_decay) {
    double sum = 0;
    for (int i = 0; i < Walk::kRows; ++i) {
      sum = decayed(sum, Walk::decay_at(tokens, Walk::row(i), feature, in.d_k));
    }
    __syncthreads();
    table[Walk::group()][Walk::feature()] = sum;
    __syncthreads();
    for (int g = Walk::kGroups - 1; g > Walk::group(); --g) {
      after = decayed(after, table[g][Walk::feature()]);
    }
  }
  SUBQUAD_UNROLL
  for (int i = Walk::kRows - 1; i >= 0; --i) {
    const int row = Walk::row(i);
    const bool is_in = row >= source.begin && row < source.end;
    body(i, row,
         is_in ? decayed(key_at(tokens, row, feature, in.d_k), after) : -infinity<double>());
    after = decayed(after, Walk::decay_at(tokens, row, feature, in.d_k));
  }
}

// Gradients of log_q, log_k and log_decay, of 64 features of a chunk. With q~ and k^ the weights of
// rows and keys in the scale of the chunk, p_t the kept product of the row and S, Z, R, U the sums
// that come from other chunks,
//   dW_tj = grad_y_t . v_j - p_t  where t attends j
//   grad_log_q = q~ (grad_y S^T - p Z^T + dW k^);  grad_log_k = k^ (v R^T - 1 U^T + dW^T q~)
//   grad_log_decay_t = sum_{s >= t} (grad_log_q_s - grad_log_k_s), in float64 and from
//     <S, R> - Z U at the end of the chunk on, to the next border or decay of -inf.
// Values are relative to the centre. As with the rows' sums, chunks that are out of range and sums
// that are not finite are left to a second kernel (kPlain), which computes them from weights of
// pairs, in plain arithmetic.
//
// Nothing aliases. Each product is within the bounds of tile_product on sums of sizes.
template <class T, bool kPlain>
struct feature_gradients_kernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // sums in float64 take their registers
  static constexpr int kFeatures = 64;
  static constexpr int kDepth = 32;  // values at once
  static constexpr int kStride = kDepth + 4;
  using scales = chunk_scales<T, kFeatures>;
  using walk = typename scales::walk;
  using tile = square_tile<T>;
  using accumulators = typename tile::accumulators;

  struct operands {
    T grad_y[kTokens * kStride];  // [row][value]
    T v[kTokens * kStride];       // [key][value]
    T row_sums[kFeatures * kStride];
    T key_sums[kFeatures * kStride];
  };
  struct products {
    T pairs[kTokens * kRowStride];          // dW, then grad_log_q - grad_log_k
    T weights[kTokens * kColumnStride<T>];  // of keys, then of rows
  };
  struct shared_memory {
    union alignas(16) {
      operands first;
      products second;
    } tiles;
    typename scales::shared_memory scales_memory;
    int resets[walk::kGroups][kFeatures];
    T row_factor[kFeatures];
    T row_column[kFeatures];
    T key_factor[kFeatures];
    T key_column[kFeatures];
    double flow[kFeatures];
    gradient_shared<T> of;
  };

  gradient_arguments<T> of;
  int feature_blocks;
  int* undone;  // of a block: whether it is left to the second kernel

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (kPlain && undone[blockIdx.x] == 0) return;
    const int first = static_cast<int>(block_index() % feature_blocks) * kFeatures;
    const std::int64_t index = block_index() / feature_blocks;
    shared.of.locate(of, index / of.chunks, index % of.chunks);
    if constexpr (kPlain) {
      sum_plainly(first, shared);
    } else {
      scales found;
      stage_tokens(shared.of.tokens.log_k, shared.of.tokens.keys, first, shared);
      found.find(of.in, shared.of.tokens, shared.of.rows, first, shared.tiles.second.weights,
                 kColumnStride<T>, shared.scales_memory);
      const bool is_done = !__syncthreads_or(!found.is_good) && multiply(first, found, shared);
      if (block_thread() == 0) undone[blockIdx.x] = !is_done;
      if (!is_done) return;
    }
    if (of.grads.log_decay) write_decay(first, shared);
  }

  SUBQUAD_DEVICE bool multiply(int first, const scales& found, shared_memory& shared) const {
    const attention_inputs<T>& in = of.in;
    const gradient_shared<T>& here = shared.of;
    const chunk_tokens<T>& tokens = here.tokens;
    const bool has_pairs = in.attended != reach::all;
    accumulators pairs;
    accumulators rows;
    accumulators keys;
    tile::clear(pairs);
    tile::clear(rows);
    tile::clear(keys);
    const int passes = here.rows.count > 1 || here.keys.count > 1 ? 2 : 1;
    for (int pass = 0; pass < passes; ++pass) {
      const bool has_rows = pass < here.rows.count;
      const bool has_keys = pass < here.keys.count;
      const row_source<T>& of_rows = here.rows.of[pass];
      const row_source<T>& of_keys = here.keys.of[pass];
      find_factors(first, found, has_rows, of_rows, has_keys, of_keys, shared);
      __syncthreads();
      operands& to = shared.tiles.first;
      for (int value = 0; value < in.d_v; value += kDepth) {
        stage(to.grad_y, value, [&](int row, int v) {
          const bool is_in = pass == 0 || (row >= of_rows.begin && row < of_rows.end);
          return is_in ? here.grad_at(row, v, in.d_v) : T(0);
        });
        stage(to.v, value, [&](int key, int v) {
          const bool is_in = pass == 0 || (key >= of_keys.begin && key < of_keys.end);
          return is_in ? here.value_at(key, v, in.d_v, of.rows.center) : T(0);
        });
        stage(to.row_sums, value, [&](int f, int v) {
          return source_sum(of_rows, shared.row_factor[f], first + f, v);
        });
        stage(to.key_sums, value, [&](int f, int v) {
          return source_sum(of_keys, shared.key_factor[f], first + f, v);
        });
        __syncthreads();
        const int depth = product_depth(in.d_v - value, kDepth);
        const tile_operand<T> grad_y{to.grad_y, kStride, 1};
        const tile_operand<T> v{to.v, kStride, 1};
        if (pass == 0 && has_pairs) add_product<T>(pairs, grad_y, v, depth);
        if (has_rows) add_product<T>(rows, grad_y, {to.row_sums, kStride, 1}, depth);
        if (has_keys) add_product<T>(keys, v, {to.key_sums, kStride, 1}, depth);
        __syncthreads();
      }
      each_sum<T>([&](int r, int c, int token, int feature) {
        if (token >= of_rows.begin && token < of_rows.end) {
          rows(r, c) = fma(-here.product[token], shared.row_column[feature], rows(r, c));
        } else if (pass == 0) {
          rows(r, c) = 0;
        }
        if (token >= of_keys.begin && token < of_keys.end) {
          keys(r, c) -= shared.key_column[feature];
        } else if (pass == 0) {
          keys(r, c) = 0;
        }
      });
      __syncthreads();
    }
    products& to = shared.tiles.second;
    if (has_pairs) {
      each_sum<T>([&](int r, int c, int row, int key) {
        const bool counts = here.inverse[row] != T(0) && tokens.counts(key) &&
                            attends(tokens, in.attended, row, key);
        to.pairs[row * kRowStride + key] = counts ? pairs(r, c) - here.product[row] : T(0);
      });
    }
    stage_tokens(tokens.log_k, tokens.keys, first, shared);
    found.each_row(in, tokens, first, [&](int, int key, double decay) {
      T& k = to.weights[key * kColumnStride<T> + walk::feature()];
      k = found.key_weight(in, tokens, first, key, k, decay);
    });
    __syncthreads();
    const tile_operand<T> weights{to.weights, 1, kColumnStride<T>};
    if (has_pairs)
      add_product<T>(rows, {to.pairs, kRowStride, 1}, weights, product_depth(tokens.keys, kTokens));
    accumulators key_weights;
    each_sum<T>([&](int r, int c, int key, int feature) {
      key_weights(r, c) = to.weights[key * kColumnStride<T> + feature];
    });
    __syncthreads();
    stage_tokens(tokens.log_q, tokens.rows, first, shared);
    found.each_row(in, tokens, first, [&](int, int row, double decay) {
      T& q = to.weights[row * kColumnStride<T> + walk::feature()];
      const double query = found.query(in, tokens, first, row, q, decay);
      q = query == -infinity<double>() || here.inverse[row] == T(0)
              ? T(0)
              : exponential(static_cast<T>(query - here.scale[row])) * here.inverse[row];
    });
    __syncthreads();
    if (has_pairs)
      add_product<T>(keys, {to.pairs, 1, kRowStride}, weights, product_depth(tokens.rows, kTokens));
    __syncthreads();
    bool all_finite = true;
    each_sum<T>([&](int r, int c, int token, int feature) {
      const T row_weight = to.weights[token * kColumnStride<T> + feature];
      rows(r, c) = row_weight == T(0) ? T(0) : rows(r, c) * row_weight;
      keys(r, c) = key_weights(r, c) == T(0) ? T(0) : keys(r, c) * key_weights(r, c);
      all_finite =
          all_finite && fabs(rows(r, c)) < infinity<T>() && fabs(keys(r, c)) < infinity<T>();
    });
    if (__syncthreads_or(!all_finite)) return false;
    each_sum<T>([&](int r, int c, int token, int feature) {
      write(token, first, feature, rows(r, c), keys(r, c), shared);
    });
    __syncthreads();
    return true;
  }

  // Copies log_k or log_q to where its weights come.
  SUBQUAD_DEVICE void stage_tokens(const matrix_view<const T>& from, int tokens, int first,
                                   shared_memory& shared) const {
    stage_features<kFeatures, kColumnStride<T>>(shared.tiles.second.weights, from, tokens, first,
                                                of.in.d_k);
    finish_copies();
  }

  // Rows of 32 elements from (0, value) on.
  template <class Elements>
  static SUBQUAD_DEVICE void stage(T* to, int value, Elements&& elements) {
    // Loads that are under way at once: more would push the sums out of registers.
    [[maybe_unused]] constexpr int kStaged = 4;
    const int across = block_thread() % kDepth;
    SUBQUAD_UNROLL_BY(kStaged)
    for (int each = 0; each < kTokens * kDepth / kThreads; ++each) {
      const int row = block_thread() / kDepth + each * (kThreads / kDepth);
      to[row * kStride + across] = elements(row, value + across);
    }
  }

  SUBQUAD_DEVICE T source_sum(const row_source<T>& source, T factor, int feature, int value) const {
    return factor == T(0) || value >= of.in.d_v
               ? T(0)
               : factor * source.sums[static_cast<std::int64_t>(feature) * of.in.d_v + value];
  }

  // What the sums of a pass's sources are multiplied by, in the scale of the chunk.
  SUBQUAD_DEVICE void find_factors(int first, const scales& found, bool has_rows,
                                   const row_source<T>& of_rows, bool has_keys,
                                   const row_source<T>& of_keys, shared_memory& shared) const {
    const int feature = first + walk::feature();
    const bool exists = feature < of.in.d_k;
    if (walk::group() == 0) {
      const double scale = has_rows && exists ? of_rows.scales[feature] : -infinity<double>();
      const T factor = scale == -infinity<double>() ? T(0) : weight_of<T>(scale - found.top);
      shared.row_factor[walk::feature()] = factor;
      shared.row_column[walk::feature()] = factor == T(0) ? T(0) : factor * of_rows.column[feature];
    }
    if (walk::group() == walk::kGroups - 1) {
      const double scale = has_keys && exists ? of_keys.scales[feature] : -infinity<double>();
      double decay = 0;
      found.each_row(of.in, shared.of.tokens, first,
                     [&](int, int, double of_row) { decay = of_row; });
      const T factor = key_source_factor<T>(scale, decay, found.top);
      shared.key_factor[walk::feature()] = factor;
      shared.key_column[walk::feature()] = factor == T(0) ? T(0) : factor * of_keys.column[feature];
    }
  }

  // Of one token and feature; keeps their difference for the decay.
  SUBQUAD_DEVICE void write(int token, int first, int feature, T row, T key,
                            shared_memory& shared) const {
    const attention_gradients<T>& grads = of.grads;
    const chunk_tokens<T>& tokens = shared.of.tokens;
    const std::int64_t place = tokens.chunk * kTokens + token;
    const int across = first + feature;
    if (grads.log_decay) shared.tiles.second.pairs[token * kRowStride + feature] = row - key;
    if (across >= of.in.d_k) return;
    if (grads.log_q && token < tokens.rows) {
      grads.at(grads.log_q, kGradLogQ, tokens.batch, place)(0, across) = row;
    }
    if (grads.log_k && token < tokens.keys) {
      grads.at(grads.log_k, kGradLogK, tokens.batch, place)(0, across) = key;
    }
  }

  SUBQUAD_DEVICE void sum_plainly(int first, shared_memory& shared) const {
    const attention_inputs<T>& in = of.in;
    const gradient_shared<T>& here = shared.of;
    const chunk_tokens<T>& tokens = here.tokens;
    const int feature = first + walk::feature();
    T* pairs = shared.tiles.second.pairs;
    const bool has_pairs = in.attended != reach::all;
    __syncthreads();
    if (has_pairs) {
      T sums[kPlainRows] = {};
      add_plain(
          sums, in.d_v, [&](int row, int v) { return here.grad_at(row, v, in.d_v); },
          [&](int v, int key) { return here.value_at(key, v, in.d_v, of.rows.center); });
      SUBQUAD_UNROLL
      for (int i = 0; i < kPlainRows; ++i) {
        const int row = block_thread() / kTokens * kPlainRows + i;
        pairs[row * kRowStride + block_thread() % kTokens] = sums[i] - here.product[row];
      }
    }
    __syncthreads();
    T rows[walk::kRows] = {};
    T keys[walk::kRows] = {};
    for (int s = 0; s < here.rows.count; ++s) {
      const row_source<T>& source = here.rows.of[s];
      T sums[walk::kRows] = {};
      add_plain(
          sums, in.d_v, [&](int row, int v) { return here.grad_at(row, v, in.d_v); },
          [&](int v, int f) { return source_sum(source, first + f < in.d_k, first + f, v); });
      const double scale = feature < in.d_k ? source.scales[feature] : -infinity<double>();
      double decay = walk::decay_before(tokens, feature, in.d_k, shared.scales_memory.totals);
      SUBQUAD_UNROLL
      for (int i = 0; i < walk::kRows; ++i) {
        const int row = walk::row(i);
        decay = decayed(decay, walk::decay_at(tokens, row, feature, in.d_k));
        const T weight = row >= source.begin && row < source.end
                             ? pair_weight(row, feature, decayed(scale, decay), shared)
                             : T(0);
        if (weight != T(0)) {
          rows[i] = fma(weight, sums[i] - here.product[row] * source.column[feature], rows[i]);
        }
      }
      __syncthreads();
    }
    for (int s = 0; s < here.keys.count; ++s) {
      const row_source<T>& source = here.keys.of[s];
      T sums[walk::kRows] = {};
      add_plain(
          sums, in.d_v,
          [&](int key, int v) { return here.value_at(key, v, in.d_v, of.rows.center); },
          [&](int v, int f) { return source_sum(source, first + f < in.d_k, first + f, v); });
      const double scale = feature < in.d_k ? source.scales[feature] : -infinity<double>();
      each_source_key<walk>(in, tokens, source, first, shared.scales_memory.totals,
                            [&](int i, int, double logarithm) {
                              if (decayed(logarithm, scale) == -infinity<double>()) return;
                              keys[i] = fma(weight_of<T>(logarithm - scale),
                                            sums[i] - source.column[feature], keys[i]);
                            });
      __syncthreads();
    }
    SUBQUAD_NO_UNROLL
    for (int i = 0; has_pairs && i < walk::kRows; ++i) {
      const T of_row = add_row_pairs(walk::row(i), feature, shared);
      const T of_key = add_key_pairs(walk::row(i), feature, shared);
      SUBQUAD_UNROLL
      for (int at = 0; at < walk::kRows; ++at) {
        if (at == i) {
          rows[at] += of_row;
          keys[at] += of_key;
        }
      }
    }
    __syncthreads();
    SUBQUAD_UNROLL
    for (int i = 0; i < walk::kRows; ++i) {
      write(walk::row(i), first, walk::feature(), rows[i], keys[i], shared);
    }
    __syncthreads();
  }

  // exp(log_q + key - log_z), 0 where there is nothing.
  SUBQUAD_DEVICE T pair_weight(int row, int feature, double key,
                               const shared_memory& shared) const {
    const gradient_shared<T>& here = shared.of;
    const double logarithm = decayed(query_at(here.tokens, row, feature, of.in.d_k), key);
    if (logarithm == -infinity<double>() || here.inverse[row] == T(0)) return 0;
    return weight_of<T>(logarithm - here.scale[row]) * here.inverse[row];
  }

  // What the pairs of a row, or of a key, add to its gradient.
  SUBQUAD_DEVICE T add_row_pairs(int row, int feature, const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.of.tokens;
    T sum = 0;
    double decay = 0;
    const int last = of.in.attended == reach::run ? tokens.keys - 1 : row;
    for (int key = last; key >= 0 && row < tokens.rows; --key) {
      if (tokens.run[key] != tokens.run[row]) continue;
      const double logarithm = decayed(key_at(tokens, key, feature, of.in.d_k), decay);
      const T weight = pair_weight(row, feature, logarithm, shared);
      if (weight != T(0)) {
        sum = fma(weight, shared.tiles.second.pairs[row * kRowStride + key], sum);
      }
      decay = decayed(decay, walk::decay_at(tokens, key, feature, of.in.d_k));
    }
    return sum;
  }
  SUBQUAD_DEVICE T add_key_pairs(int key, int feature, const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.of.tokens;
    T sum = 0;
    double logarithm = key_at(tokens, key, feature, of.in.d_k);
    const int first = of.in.attended == reach::run ? 0 : key;
    for (int row = first; row < tokens.rows && key < tokens.keys; ++row) {
      if (tokens.run[key] != tokens.run[row]) continue;
      if (row > key) {
        logarithm = decayed(logarithm, walk::decay_at(tokens, row, feature, of.in.d_k));
      }
      const T weight = pair_weight(row, feature, logarithm, shared);
      if (weight != T(0)) {
        sum = fma(weight, shared.tiles.second.pairs[row * kRowStride + key], sum);
      }
    }
    return sum;
  }

  SUBQUAD_DEVICE void write_decay(int first, shared_memory& shared) const {
    const attention_inputs<T>& in = of.in;
    const chunk_tokens<T>& tokens = shared.of.tokens;
    find_flow(first, shared);
    bool has_border = false;
    if (in.segments) {
      for (std::int64_t chunk = tokens.chunk + 1 + block_thread(); chunk < of.states.earlier.chunks;
           chunk += kThreads) {
        has_border = has_border || of.states.earlier.borders[chunk] != 0;
      }
    }
    // Also what makes the flow there for all threads.
    const bool ends_here = !__syncthreads_or(has_border);
    const int feature = first + walk::feature();
    const bool is_start = tokens.begins || (tokens.chunk == 0 && !in.key_sums);
    const auto forgets = [&](int row) {
      return tokens.is_border(row) ||
             walk::decay_at(tokens, row, feature, in.d_k) == -infinity<double>() ||
             (row == 0 && is_start);
    };
    double sum = 0;
    bool resets = false;
    for (int i = walk::kRows - 1; i >= 0; --i) {
      sum += static_cast<double>(
          shared.tiles.second.pairs[walk::row(i) * kRowStride + walk::feature()]);
      if (forgets(walk::row(i))) {
        sum = 0;
        resets = true;
      }
    }
    shared.scales_memory.totals[walk::group()][walk::feature()] = sum;
    shared.resets[walk::group()][walk::feature()] = resets;
    __syncthreads();
    sum = shared.flow[walk::feature()];
    for (int g = walk::kGroups - 1; g > walk::group(); --g) {
      const double of_group = shared.scales_memory.totals[g][walk::feature()];
      sum = shared.resets[g][walk::feature()] ? of_group : sum + of_group;
    }
    if (feature >= in.d_k) return;
    const double of_sum = static_cast<double>(of.grads.final_key_sum(tokens.batch, 4, feature));
    for (int i = walk::kRows - 1; i >= 0; --i) {
      const int row = walk::row(i);
      sum += static_cast<double>(shared.tiles.second.pairs[row * kRowStride + walk::feature()]);
      if (forgets(row)) sum = 0;
      if (row >= tokens.keys) continue;
      const bool is_last_run = ends_here && row >= tokens.tail_begin;
      of.grads.at(of.grads.log_decay, kGradLogDecay, tokens.batch, tokens.chunk * kTokens + row)(
          0, feature) = static_cast<T>(is_last_run ? sum + of_sum : sum);
    }
  }

  // What crosses the end of the chunk, of each feature.
  SUBQUAD_DEVICE void find_flow(int first, shared_memory& shared) const {
    constexpr int kLanes = kThreads / kFeatures;
    const chunk_tokens<T>& tokens = shared.of.tokens;
    const chunk_states<T>& state = of.states.earlier;
    const int feature = first + block_thread() / kLanes;
    const std::int64_t after = tokens.chunk + 1;
    double flow = 0;
    if (feature < of.in.d_k && shared.of.keys.count > 0 &&
        state.row_at(state.scales, tokens.batch, after)[feature] != -infinity<double>()) {
      const row_source<T>& source = shared.of.keys.of[0];
      const T* values =
          state.sums_at(tokens.batch, after) + static_cast<std::int64_t>(feature) * of.in.d_v;
      const T* grads = source.sums + static_cast<std::int64_t>(feature) * of.in.d_v;
      for (int v = block_thread() % kLanes; v < of.in.d_v; v += kLanes) {
        if (grads[v] != T(0)) {
          flow += static_cast<double>(grads[v]) * static_cast<double>(values[v]);
        }
      }
      if (block_thread() % kLanes == 0 && source.column[feature] != T(0)) {
        flow -= static_cast<double>(source.column[feature]) *
                static_cast<double>(state.row_at(state.column, tokens.batch, after)[feature]);
      }
    }
    flow += __shfl_xor_sync(0xffffffffu, flow, 1);
    flow += __shfl_xor_sync(0xffffffffu, flow, 2);
    if (block_thread() % kLanes == 0) shared.flow[block_thread() / kLanes] = flow;
  }
};

// grad_v of a chunk, 64 values by a block: k^ R + P^T grad_y, P = q~ k^^T of the pairs that attend
// each other, with the weights, chunks and bounds of feature_gradients_kernel.
template <class T, bool kPlain>
struct value_gradients_kernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = sizeof(T) == 8 && !kPlain ? 1 : 2;
  static constexpr int kFeatures = sizeof(T) == 8 ? 32 : 64;
  using scales = chunk_scales<T, kFeatures>;
  using walk = typename scales::walk;
  using tile = square_tile<T>;
  using accumulators = typename tile::accumulators;
  static constexpr int kStride = kFeatures + 4;

  struct shared_memory {
    alignas(16) T operands[2 * kTokens * kStride];
    alignas(16) T values[kTokens * kColumnStride<T>];
    typename scales::shared_memory scales_memory;
    T factors[kFeatures];
    gradient_shared<T> of;

    SUBQUAD_DEVICE T* queries() { return operands; }
    SUBQUAD_DEVICE T* keys() { return operands + kTokens * kStride; }
    SUBQUAD_DEVICE T* weights() { return operands; }  // of pairs
  };
  static_assert(kRowStride <= 2 * kStride);

  gradient_arguments<T> of;
  int value_blocks;
  int* undone;  // of a block: whether it is left to the second kernel

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (kPlain && undone[blockIdx.x] == 0) return;
    const int value = static_cast<int>(block_index() % value_blocks) * kValues;
    const std::int64_t index = block_index() / value_blocks;
    shared.of.locate(of, index / of.chunks, index % of.chunks);
    if constexpr (kPlain) {
      sum_plainly(value, shared);
    } else {
      const bool is_done = multiply(value, shared);
      if (block_thread() == 0) undone[blockIdx.x] = !is_done;
    }
  }

  SUBQUAD_DEVICE bool multiply(int value, shared_memory& shared) const {
    const attention_inputs<T>& in = of.in;
    const gradient_shared<T>& here = shared.of;
    const chunk_tokens<T>& tokens = here.tokens;
    const bool has_pairs = in.attended != reach::all;
    accumulators sums;
    accumulators pairs;
    tile::clear(sums);
    tile::clear(pairs);
    bool all_good = true;
    const int passes = here.keys.count > 1 ? 2 : 1;
    for (int pass = 0; pass < passes; ++pass) {
      const bool has_source = pass < here.keys.count;
      const row_source<T>& source = here.keys.of[pass];
      for (int first = 0; first < in.d_k; first += kFeatures) {
        const int depth = product_depth(in.d_k - first, kFeatures);
        stage_features<kFeatures, kStride>(shared.keys(), tokens.log_k, tokens.keys, first, in.d_k);
        if (pass == 0 && has_pairs) {
          stage_features<kFeatures, kStride>(shared.queries(), tokens.log_q, tokens.rows, first,
                                             in.d_k);
        }
        finish_copies();
        scales found;
        found.find(in, tokens, here.rows, first, shared.keys(), kStride, shared.scales_memory);
        all_good = all_good && found.is_good;
        double last_decay = 0;
        found.each_row(in, tokens, first, [&](int, int row, double decay) {
          const int at = row * kStride + walk::feature();
          const bool is_in = pass == 0 || (row >= source.begin && row < source.end);
          T& k = shared.keys()[at];
          k = is_in ? found.key_weight(in, tokens, first, row, k, decay) : T(0);
          last_decay = decay;
          if (pass > 0 || !has_pairs) return;
          T& q = shared.queries()[at];
          const double query = found.query(in, tokens, first, row, q, decay);
          q = query == -infinity<double>() || here.inverse[row] == T(0)
                  ? T(0)
                  : exponential(static_cast<T>(query - here.scale[row])) * here.inverse[row];
        });
        if (walk::group() == walk::kGroups - 1) {
          const int feature = first + walk::feature();
          const double scale =
              has_source && feature < in.d_k ? source.scales[feature] : -infinity<double>();
          shared.factors[walk::feature()] = key_source_factor<T>(scale, last_decay, found.top);
        }
        __syncthreads();
        if (has_source) {
          const int across = block_thread() % kValues;
          for (int f = block_thread() / kValues; f < kFeatures; f += kThreads / kValues) {
            const T factor = shared.factors[f];
            shared.values[f * kColumnStride<T> + across] =
                factor != T(0) && value + across < in.d_v
                    ? factor *
                          source
                              .sums[static_cast<std::int64_t>(first + f) * in.d_v + value + across]
                    : T(0);
          }
          __syncthreads();
          add_product<T>(sums, {shared.keys(), kStride, 1}, {shared.values, 1, kColumnStride<T>},
                         depth);
        }
        if (pass == 0 && has_pairs) {
          add_product<T>(pairs, {shared.queries(), kStride, 1}, {shared.keys(), kStride, 1}, depth);
        }
        __syncthreads();
      }
      if (pass > 0) continue;
      each_sum<T>([&](int r, int c, int key, int) {
        if (key < source.begin || key >= source.end) sums(r, c) = 0;
      });
    }
    if (__syncthreads_or(!all_good)) return false;
    if (has_pairs) {
      stage_gradients(value, shared);
      each_sum<T>([&](int r, int c, int row, int key) {
        shared.weights()[row * kRowStride + key] =
            attends(tokens, in.attended, row, key) ? pairs(r, c) : T(0);
      });
      __syncthreads();
      add_product<T>(sums, {shared.weights(), 1, kRowStride}, {shared.values, 1, kColumnStride<T>},
                     product_depth(tokens.rows, kTokens));
    }
    bool all_finite = true;
    each_sum<T>([&](int r, int c, int, int) {
      all_finite = all_finite && fabs(sums(r, c)) < infinity<T>();
    });
    if (__syncthreads_or(!all_finite)) return false;
    each_sum<T>(
        [&](int r, int c, int key, int column) { write(key, value + column, sums(r, c), shared); });
    return true;
  }

  SUBQUAD_DEVICE void stage_gradients(int value, shared_memory& shared) const {
    const gradient_shared<T>& here = shared.of;
    const int across = block_thread() % kValues;
    SUBQUAD_UNROLL
    for (int each = 0; each < kTokens * kValues / kThreads; ++each) {
      const int row = block_thread() / kValues + each * (kThreads / kValues);
      shared.values[row * kColumnStride<T> + across] = here.grad_at(row, value + across, of.in.d_v);
    }
  }

  SUBQUAD_DEVICE void write(int key, int value, T gradient, const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.of.tokens;
    if (key >= tokens.keys || value >= of.in.d_v) return;
    of.grads.at(of.grads.v, kGradV, tokens.batch, tokens.chunk * kTokens + key)(0, value) =
        tokens.counts(key) ? gradient : T(0);
  }

  SUBQUAD_DEVICE void sum_plainly(int value, shared_memory& shared) const {
    const attention_inputs<T>& in = of.in;
    const gradient_shared<T>& here = shared.of;
    const chunk_tokens<T>& tokens = here.tokens;
    T sums[kPlainRows] = {};
    __syncthreads();
    for (int s = 0; s < here.keys.count; ++s) {
      const row_source<T>& source = here.keys.of[s];
      for (int first = 0; first < in.d_k; first += kFeatures) {
        const int feature = first + walk::feature();
        const double scale = feature < in.d_k ? source.scales[feature] : -infinity<double>();
        each_source_key<walk>(in, tokens, source, first, shared.scales_memory.totals,
                              [&](int, int key, double logarithm) {
                                shared.keys()[key * kStride + walk::feature()] =
                                    decayed(logarithm, scale) == -infinity<double>()
                                        ? T(0)
                                        : weight_of<T>(logarithm - scale);
                              });
        __syncthreads();
        const int features = in.d_k - first < kFeatures ? in.d_k - first : kFeatures;
        add_plain(
            sums, features, [&](int key, int f) { return shared.keys()[key * kStride + f]; },
            [&](int f, int column) {
              return value + column < in.d_v
                         ? source
                               .sums[static_cast<std::int64_t>(first + f) * in.d_v + value + column]
                         : T(0);
            });
        __syncthreads();
      }
    }
    if (in.attended != reach::all) {
      for (int i = block_thread(); i < kTokens * kRowStride; i += kThreads) shared.weights()[i] = 0;
      __syncthreads();
      for (int first = 0; first < in.d_k; first += kPairFeatures) {
        add_pair_weights(tokens, in.attended, in.d_k, first, here.scale, shared.weights());
      }
      __syncthreads();
      add_plain(
          sums, tokens.rows,
          [&](int key, int row) {
            const T inverse = here.inverse[row];
            const T weight = shared.weights()[row * kRowStride + key];
            return inverse == T(0) || weight == T(0) ? T(0) : weight * inverse;
          },
          [&](int row, int column) { return here.grad_at(row, value + column, in.d_v); });
    }
    SUBQUAD_UNROLL
    for (int i = 0; i < kPlainRows; ++i) {
      write(block_thread() / kTokens * kPlainRows + i, value + block_thread() % kTokens, sums[i],
            shared);
    }
  }
};

// The gradients of the state that went in: a warp for each feature.
template <class T>
struct state_gradients_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  gradient_arguments<T> of;
  int feature_blocks;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t batch = block_index() / feature_blocks;
    const int feature = static_cast<int>(block_index() % feature_blocks) * (kThreads / kWarp) +
                        block_thread() / kWarp;
    const attention_inputs<T>& in = of.in;
    if (feature >= in.d_k) return;
    const chunk_states<T>& from = of.reverse.after;
    const T* keys =
        in.key_sums.data + in.batch.offset(kKeySums, batch) + feature * in.key_sums.column_stride;
    const double scale =
        static_cast<double>(keys[0]) + static_cast<double>(keys[in.key_sums.row_stride]);
    T factor = keys[0] == -infinity<T>() ? T(0) : T(1);
    if (in.attended == reach::all && factor != T(0)) {
      const chunk_states<T>& state = of.states.earlier;
      factor = weight_of<T>(scale - state.row_at(state.scales, batch, state.chunks)[feature]);
    }
    const T* sums = from.sums_at(batch, from.chunks) + static_cast<std::int64_t>(feature) * in.d_v;
    T of_center = 0;
    for (int v = block_lane(); v < in.d_v; v += kWarp) {
      const T gradient = factor == T(0) ? T(0) : factor * sums[v];
      of_center = fma(gradient, of.rows.center[batch * in.d_v + v], of_center);
      if (!of.grads.value_sums) continue;
      T* at = of.grads.value_sums.data + of.grads.batch.offset(kGradValueSums, batch) +
              feature * of.grads.value_sums.row_stride + v * of.grads.value_sums.column_stride;
      at[0] = gradient;
      at[of.grads.value_sums.stride] = gradient;
    }
    SUBQUAD_UNROLL
    for (int flip = kWarp / 2; flip > 0; flip /= 2) {
      of_center += __shfl_xor_sync(0xffffffffu, of_center, flip);
    }
    bool has_border = false;
    for (std::int64_t chunk = block_lane(); in.segments && chunk < of.states.earlier.chunks;
         chunk += kWarp) {
      has_border = has_border || of.states.earlier.borders[chunk] != 0;
    }
    has_border = __any_sync(0xffffffffu, has_border);
    if (!of.grads.key_sums || block_lane() > 0) return;
    const T column = from.row_at(from.column, batch, from.chunks)[feature];
    const T gradient = factor == T(0) ? T(0) : -(factor * column) - of_center;
    const T of_decay = has_border ? T(0) : of.grads.final_key_sum(batch, 4, feature);
    T* at = of.grads.key_sums.data + of.grads.batch.offset(kGradKeySums, batch) +
            feature * of.grads.key_sums.column_stride;
    const T values[5] = {0, 0, gradient, gradient, of_decay};
    SUBQUAD_UNROLL
    for (int row = 0; row < 5; ++row) at[row * of.grads.key_sums.row_stride] = values[row];
  }
};

template <class T>
void scan_gradients(const attention_inputs<T>& in, const reverse_workspace<T>& kept,
                    const attention_gradients<T>& grads, bool of_later) {
  const chunk_states<T>& to = of_later ? kept.reverse.before : kept.reverse.after;
  const auto feature_blocks = static_cast<int>(divide_up(in.d_k, kTokens));
  const auto value_blocks = std::max(1, static_cast<int>(divide_up(in.d_v, kValues)));
  launch(in.size * to.chunks * feature_blocks * value_blocks,
         query_sums_kernel<T>{in, to, kept.states, kept.rows, grads, of_later, feature_blocks,
                              value_blocks});
  const bool keeps_all = in.attended != reach::all;
  const scan_sums_kernel<T, gradient_ends<T>> scan{
      to,
      of_later,
      keeps_all,
      false,
      keeps_all,
      in.size,
      {grads, kept.center, !of_later && (grads.final_key_sums || grads.final_value_sums)}};
  launch(scan.blocks(), scan);
}

template <class T>
void linear_attention_vjp_as(const attention_inputs<T>& in, const attention_gradients<T>& grads,
                             reverse_workspace<T> kept, const array_view* y,
                             const array_view* grad_log_z, const batch_shape& batch,
                             const array_view* grad_y) {
  if (in.size == 0) return;
  launch(divide_up(in.size * in.d_v, center_kernel<T>::kThreads),
         center_kernel<T>{in, kept.center});
  kept.states.find(in, kept.center, state_outputs<T>{});
  if (y) {
    kept.rows.y = matrix_at<const T>(*y, 0);
    kept.rows.grad_y = matrix_at<const T>(*grad_y, 0);
  }
  if (grad_log_z) kept.rows.grad_log_z = vector_at<const T>(*grad_log_z, 0);
  kept.rows.batch = batches_of<3>(batch, {{y, 2}, {grad_y, 2}, {grad_log_z, 1}});
  find_outputs(in, kept.states, row_outputs<T>{}, kept.rows, kept.undone);
  scan_gradients(in, kept, grads, false);
  if (in.attended == reach::run && in.log_q) scan_gradients(in, kept, grads, true);
  const std::int64_t chunks = std::max(in.key_chunks(), in.query_chunks());
  const gradient_arguments<T> arguments{in, kept.states, kept.reverse, kept.rows, grads, chunks};
  const auto feature_blocks = static_cast<int>(divide_up(in.d_k, kTokens));
  const auto value_blocks = static_cast<int>(divide_up(in.d_v, kValues));
  if (grads.log_k || grads.log_q || grads.log_decay) {
    const std::int64_t blocks = in.size * chunks * feature_blocks;
    launch(blocks, feature_gradients_kernel<T, false>{arguments, feature_blocks, kept.undone});
    launch(blocks, feature_gradients_kernel<T, true>{arguments, feature_blocks, kept.undone});
  }
  if (grads.v) {
    gradient_arguments<T> of_keys = arguments;
    of_keys.chunks = in.key_chunks();
    const std::int64_t blocks = in.size * of_keys.chunks * value_blocks;
    launch(blocks, value_gradients_kernel<T, false>{of_keys, value_blocks, kept.undone});
    launch(blocks, value_gradients_kernel<T, true>{of_keys, value_blocks, kept.undone});
  }
  if (in.key_sums && (grads.key_sums || grads.value_sums)) {
    const auto blocks = static_cast<int>(divide_up(in.d_k, 4));
    launch(in.size * blocks, state_gradients_kernel<T>{arguments, blocks});
  }
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v,
                                           std::int64_t itemsize, bool causal) {
  const auto bytes = [&](auto element) {
    // With segments or without, whichever takes more.
    const auto of = [&](bool has_later) {
      return cuda::reverse_workspace<decltype(element)>(workspace_layout(), batch, n_q, n, d_k, d_v,
                                                        causal, has_later, !causal && !has_later)
          .bytes;
    };
    return !causal && n_q == n ? std::max(of(true), of(false)) : of(false);
  };
  return itemsize == 8 ? bytes(double{}) : bytes(float{});
}

void linear_attention_vjp(const array_view& log_k, const array_view& v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* key_sums,
                          const array_view* value_sums, bool causal, const array_view* y,
                          const array_view* grad_y, const array_view* grad_log_z,
                          const array_view* grad_final_key_sums,
                          const array_view* grad_final_value_sums, const array_view* grad_log_k,
                          const array_view* grad_v, const array_view* grad_log_q,
                          const array_view* grad_log_decay, const array_view* grad_key_sums,
                          const array_view* grad_value_sums, const array_view& workspace) {
  const attention_shape shape = check_linear_attention_vjp(
      log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal, y, grad_y,
      grad_log_z, grad_final_key_sums, grad_final_value_sums, grad_log_k, grad_v, grad_log_q,
      grad_log_decay, grad_key_sums, grad_value_sums);
  cuda::for_real_type(shape.type, [&](auto element) {
    using T = decltype(element);
    const cuda::attention_inputs<T> in(shape, log_k, v, log_q, log_decay, key_mask, segments,
                                       key_sums, value_sums, causal);
    cuda::attention_gradients<T> grads{};
    if (grad_y && log_q) grads.y = matrix_at<const T>(*grad_y, 0);
    if (grad_final_key_sums) grads.final_key_sums = matrix_at<const T>(*grad_final_key_sums, 0);
    if (grad_final_value_sums) {
      grads.final_value_sums = stack_at<const T>(*grad_final_value_sums, 0);
    }
    if (grad_log_k) grads.log_k = matrix_at<T>(*grad_log_k, 0);
    if (grad_v) grads.v = matrix_at<T>(*grad_v, 0);
    if (grad_log_q && log_q) grads.log_q = matrix_at<T>(*grad_log_q, 0);
    if (grad_log_decay && log_decay) grads.log_decay = matrix_at<T>(*grad_log_decay, 0);
    if (grad_key_sums && key_sums) grads.key_sums = matrix_at<T>(*grad_key_sums, 0);
    if (grad_value_sums && key_sums) grads.value_sums = stack_at<T>(*grad_value_sums, 0);
    grads.batch = cuda::batches_of<cuda::kGradients>(shape.batch, {{grad_y, 2},
                                                                   {grad_final_key_sums, 2},
                                                                   {grad_final_value_sums, 3},
                                                                   {grad_log_k, 2},
                                                                   {grad_v, 2},
                                                                   {grad_log_q, 2},
                                                                   {grad_log_decay, 2},
                                                                   {grad_key_sums, 2},
                                                                   {grad_value_sums, 3}});
    const bool has_later = in.attended == cuda::reach::run && log_q;
    cuda::linear_attention_vjp_as<T>(
        in, grads,
        cuda::reverse_workspace<T>(workspace_layout(workspace), in.size, in.n_q, in.n, in.d_k,
                                   in.d_v, causal, has_later, in.attended == cuda::reach::all),
        y, grad_log_z, shape.batch, grad_y);
  });
}

}  // namespace subquad::core
