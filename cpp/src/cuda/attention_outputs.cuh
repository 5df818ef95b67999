// What the rows of linear attention sum to, from the states at the borders of their chunk and the
// pairs within it.
#ifndef SUBQUAD_CUDA_ATTENTION_OUTPUTS_CUH
#define SUBQUAD_CUDA_ATTENTION_OUTPUTS_CUH

#include <cstdint>

#include "attention_states.cuh"

namespace subquad::cuda {

// A state that rows of a chunk attend.
template <class T>
struct row_source {
  const T* sums;  // (d_k, d_v)
  const T* column;
  const double* scales;
  int begin;  // of the rows that do
  int end;
};

template <class T>
struct row_sources {
  row_source<T> of[2];  // those that there are not have no rows
  int count;

  // By one thread.
  SUBQUAD_DEVICE void locate(const attention_inputs<T>& in, const attention_states<T>& states,
                             const chunk_tokens<T>& tokens) {
    count = 0;
    of[0] = of[1] = {};
    const auto add = [&](const chunk_states<T>& from, std::int64_t slot, int begin, int end) {
      of[count++] = {from.sums_at(tokens.batch, slot), from.row_at(from.column, tokens.batch, slot),
                     from.row_at(from.scales, tokens.batch, slot), begin, end};
    };
    if (in.attended == reach::all) return add(states.earlier, states.earlier.chunks, 0, kTokens);
    if (!tokens.begins && (tokens.chunk > 0 || in.key_sums)) {
      add(states.earlier, tokens.chunk, 0, tokens.head_end);
    }
    if (in.attended == reach::run && !tokens.ends && tokens.chunk + 1 < states.later.chunks) {
      add(states.later, tokens.chunk, tokens.tail_begin, kTokens);
    }
  }
};

// The scales of a chunk's weights, of kFeatures features at a time.
template <class T, int kFeatures>
struct chunk_scales {
  using walk = feature_walk<kFeatures>;
  static constexpr int kSteps = 4;  // tokens that are under way at once

  struct shared_memory {
    typename walk::table totals;
    typename walk::table highest;
    typename walk::table lowest;
  };

  // Of the thread's feature: the largest key, less its decay, of the chunk and what its rows
  // attend; and the decay before the thread's group.
  double top;
  double before;
  // Whether exp(log_q + decay + top - c) exp(log_k - decay - top), c the largest log_q + decay +
  // top of the row, is good for all pairs of the feature.
  bool is_good;

  // All threads call it, with log_k of the features from `first` on in rows of `stride` elements.
  SUBQUAD_DEVICE void find(const attention_inputs<T>& in, const chunk_tokens<T>& tokens,
                           const row_sources<T>& sources, int first, const T* keys, int stride,
                           shared_memory& shared) {
    const int feature = first + walk::feature();
    before = walk::decay_before(tokens, feature, in.d_k, shared.totals);
    const auto scale_of = [&](int source) {
      return source < sources.count && feature < in.d_k ? sources.of[source].scales[feature]
                                                        : -infinity<double>();
    };
    const double scale = scale_of(0);
    const bool has_earlier = sources.count > 0 && sources.of[0].begin == 0;
    double highest = -infinity<double>();
    double lowest = infinity<double>();
    bool is_small = true;
    if (in.attended != reach::all) {
      double decay = before;
      SUBQUAD_UNROLL_BY(kSteps)
      for (int i = 0; i < walk::kRows; ++i) {
        const int row = walk::row(i);
        if (tokens.is_border(row)) decay = 0;
        decay += walk::decay_at(tokens, row, feature, in.d_k);
        is_small = is_small && fabs(decay) <= kMostDecay<T>;
        const double key = tokens.counts(row) && feature < in.d_k
                               ? static_cast<double>(keys[row * stride + walk::feature()])
                               : -infinity<double>();
        if (key == -infinity<double>() && !tokens.bit(tokens.firsts, row)) continue;
        const double relative = key == -infinity<double>() ? key : key - decay;
        highest = larger(highest, relative);
        if (!tokens.bit(tokens.firsts, row)) continue;
        const double start = row == 0 && has_earlier ? larger(relative, scale) : relative;
        lowest = start < lowest ? start : lowest;
      }
    }
    shared.highest[walk::group()][walk::feature()] = highest;
    shared.lowest[walk::group()][walk::feature()] = lowest;
    __syncthreads();
    top = larger(scale, scale_of(1));
    // Rows before the first key that counts attend the state alone.
    if (has_earlier && !tokens.bit(tokens.firsts, 0)) lowest = scale < lowest ? scale : lowest;
    for (int g = 0; g < walk::kGroups; ++g) {
      top = larger(top, shared.highest[g][walk::feature()]);
      const double low = shared.lowest[g][walk::feature()];
      lowest = low < lowest ? low : lowest;
    }
    is_good =
        is_small && top < infinity<double>() &&
        (top == -infinity<double>() || in.attended == reach::all || top - lowest <= kMostRise<T>);
    __syncthreads();
  }

  // Calls body(i, row, decay) for the rows of the thread's group, in order, kUnroll at once.
  template <int kUnroll = kSteps, class Body>
  SUBQUAD_DEVICE void each_row(const attention_inputs<T>& in, const chunk_tokens<T>& tokens,
                               int first, Body&& body) const {
    double decay = before;
    SUBQUAD_UNROLL_BY(kUnroll)
    for (int i = 0; i < walk::kRows; ++i) {
      const int row = walk::row(i);
      if (tokens.is_border(row)) decay = 0;
      decay += walk::decay_at(tokens, row, first + walk::feature(), in.d_k);
      body(i, row, decay);
    }
  }

  // The weight of a row whose log_q is q: its logarithm, without the scale of the row.
  SUBQUAD_DEVICE double query(const attention_inputs<T>& in, const chunk_tokens<T>& tokens,
                              int first, int row, T q, double decay) const {
    const bool counts = row < tokens.rows && first + walk::feature() < in.d_k &&
                        q != -infinity<T>() && top != -infinity<double>();
    return counts ? static_cast<double>(q) + decay + top : -infinity<double>();
  }
  SUBQUAD_DEVICE T key_weight(const attention_inputs<T>& in, const chunk_tokens<T>& tokens,
                              int first, int key, T k, double decay) const {
    const bool counts =
        tokens.counts(key) && first + walk::feature() < in.d_k && k != -infinity<T>();
    return counts ? weight_of<T>(static_cast<double>(k) - decay - top) : T(0);
  }
};

// Of each row, for the reverse: c_t, sum_j w_tj / exp(c_t), and sum_v grad_y_tv (y_tv - center_v) -
// grad_log_z_t.
template <class T>
struct row_sums {
  double* scales;  // [batch][n_q], null where nothing is kept
  T* sums;
  T* products;
  matrix_view<const T> y;  // optional, with grad_y
  matrix_view<const T> grad_y;
  vector_view<const T> grad_log_z;  // optional
  batches<3> batch;                 // of these three
  const T* center;                  // [batch][d_v]
};
enum { kRowY, kRowGradY, kRowGradLogZ };

template <class T>
struct row_outputs {
  matrix_view<T> y;      // optional
  vector_view<T> log_z;  // optional
  batches<2> batch;
  bool empty_is_nan;
};
enum { kOutY, kOutLogZ };

// y_t = sum_j w_tj v_j / sum_j w_tj and log_z_t = log sum_j w_tj of the rows of a chunk, 64 values
// by a block, from the states that the chunk's rows attend and from its pairs:
//   y = (Q^ S + P V) / (Q^ Z + P 1),  P = Q^ K^^T of the pairs that attend each other,
//   Q^_tr = exp(log_q_tr + decay_tr + top_r - c_t),  K^_jr = exp(log_k_jr - decay_jr - top_r)
// where top_r is the largest key of the chunk and of what its rows attend, and c_t the largest
// log_q_tr + decay_tr + top_r. Where top_r is too far above what some row attends, and where
// anything comes out that is not finite, weights of pairs are exponentials of their own, summed in
// plain arithmetic.
//
// Nothing aliases. Exponents are formed in float64. With u = 2^-24 each weight is within (10 + 3
// kMostRise) u of itself, P and y within the bounds of tile_product on sums of sizes, at depths d_k
// and d_k + 64; in float64 likewise with 2^-53.
template <class T, bool kPlain>
struct attention_outputs_kernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = sizeof(T) == 8 && !kPlain ? 1 : 2;
  static constexpr int kFeatures = sizeof(T) == 8 ? 32 : 64;
  using scales = chunk_scales<T, kFeatures>;
  using walk = typename scales::walk;
  using tile = square_tile<T>;
  using accumulators = typename tile::accumulators;
  static constexpr int kStride = kFeatures + 4;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kLanesOfRow = kThreads / kTokens;

  struct shared_memory {
    alignas(16) T operands[2 * kTokens * kStride];
    alignas(16) T values[kTokens * kColumnStride<T>];
    typename scales::shared_memory scales_memory;
    T factors[kFeatures];  // of the source's sums
    T column[kFeatures];
    double row_scale[kTokens];
    double maxima[kWarps][kTokens];
    T row_parts[2][kTokens];
    T row_sum[kTokens];
    chunk_tokens<T> tokens;
    row_sources<T> sources;

    SUBQUAD_DEVICE T* queries() { return operands; }
    SUBQUAD_DEVICE T* keys() { return operands + kTokens * kStride; }
    SUBQUAD_DEVICE T* weights() { return operands; }  // of pairs
  };
  static_assert(kRowStride <= 2 * kStride);

  attention_inputs<T> in;
  attention_states<T> states;
  row_outputs<T> out;
  row_sums<T> kept;
  std::int64_t chunks;
  int value_blocks;
  int* undone;  // of a block: whether it is left to the second kernel

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    if (kPlain && undone[index] == 0) return;
    const int value = static_cast<int>(index % value_blocks) * kValues;
    index /= value_blocks;
    locate_chunk(in, index / chunks, index % chunks, shared.tokens);
    if (block_thread() == 0) shared.sources.locate(in, states, shared.tokens);
    __syncthreads();
    if constexpr (kPlain) {
      sum_plainly(value, shared);
    } else {
      scales of;
      const bool is_done = find_scales(of, shared) && sum_products(value, of, shared);
      if (block_thread() == 0) undone[blockIdx.x] = !is_done;
    }
  }

  SUBQUAD_DEVICE bool has_values() const { return in.d_v > 0 && out.y; }

  // The scales of rows; returns whether all features are good.
  SUBQUAD_DEVICE bool find_scales(scales& of, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    for (int i = block_thread(); i < kWarps * kTokens; i += kThreads) {
      shared.maxima[i / kTokens][i % kTokens] = -infinity<double>();
    }
    __syncthreads();
    bool all_good = true;
    for (int first = 0; first < in.d_k; first += kFeatures) {
      if (first > 0) __syncthreads();
      stage(first, true, shared);
      of.find(in, tokens, shared.sources, first, shared.keys(), kStride, shared.scales_memory);
      all_good = all_good && of.is_good;
      double queries[walk::kRows];
      of.template each_row<walk::kRows>(in, tokens, first, [&](int i, int row, double decay) {
        queries[i] = of.query(in, tokens, first, row,
                              shared.queries()[row * kStride + walk::feature()], decay);
      });
      const double largest = reduce_rows<walk::kRows>(queries, larger_of{});
      double& of_row = shared.maxima[walk::warp_of_row()][walk::row_of_lane()];
      if (walk::is_writer()) of_row = larger(of_row, largest);
    }
    return !__syncthreads_or(!all_good) && settle_row_scales(walk::kWarpsOfRow, shared);
  }

  // Copies log_q, and log_k where it is asked for, to where their weights come.
  SUBQUAD_DEVICE void stage(int first, bool with_keys, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    stage_features<kFeatures, kStride>(shared.queries(), tokens.log_q, tokens.rows, first, in.d_k);
    if (with_keys && in.attended != reach::all) {
      stage_features<kFeatures, kStride>(shared.keys(), tokens.log_k, tokens.keys, first, in.d_k);
    }
    finish_copies();
  }

  // row_scale = the largest of `count` rows of maxima. Returns true.
  SUBQUAD_DEVICE bool settle_row_scales(int count, shared_memory& shared) const {
    __syncthreads();
    if (block_thread() < kTokens) {
      double scale = -infinity<double>();
      for (int w = 0; w < count; ++w) scale = larger(scale, shared.maxima[w][block_thread()]);
      shared.row_scale[block_thread()] = scale;
    }
    __syncthreads();
    return true;
  }

  // On tensor cores; returns whether all that it wrote is finite.
  SUBQUAD_DEVICE bool sum_products(int value, scales& of, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    const bool has_pairs = in.attended != reach::all;
    accumulators sums;
    accumulators pairs;
    tile::clear(sums);
    tile::clear(pairs);
    T row_sum = 0;  // of row thread / kLanesOfRow, by the lanes that share it
    const int own_row = block_thread() / kLanesOfRow;
    const int passes = shared.sources.count > 1 ? 2 : 1;
    for (int pass = 0; pass < passes; ++pass) {
      const bool has_source = pass < shared.sources.count;
      const row_source<T>& source = shared.sources.of[pass];
      for (int first = 0; first < in.d_k; first += kFeatures) {
        const int depth = product_depth(in.d_k - first, kFeatures);
        // One block of features is there from before.
        if (pass > 0 || in.d_k > kFeatures) {
          stage(first, in.d_k > kFeatures, shared);
          if (in.d_k > kFeatures) {
            of.find(in, tokens, shared.sources, first, shared.keys(), kStride,
                    shared.scales_memory);
          }
        }
        of.each_row(in, tokens, first, [&](int, int row, double decay) {
          T& q = shared.queries()[row * kStride + walk::feature()];
          const double query = of.query(in, tokens, first, row, q, decay);
          const bool is_in = pass == 0 || (row >= source.begin && row < source.end);
          q = query == -infinity<double>() || !is_in
                  ? T(0)
                  : exponential(static_cast<T>(query - shared.row_scale[row]));
          if (pass == 0 && has_pairs) {
            T& k = shared.keys()[row * kStride + walk::feature()];
            k = of.key_weight(in, tokens, first, row, k, decay);
          }
        });
        if (has_source && walk::group() == 0) {
          const int feature = first + walk::feature();
          const double scale = feature < in.d_k ? source.scales[feature] : -infinity<double>();
          const T factor = scale == -infinity<double>() ? T(0) : weight_of<T>(scale - of.top);
          shared.factors[walk::feature()] = factor;
          shared.column[walk::feature()] = factor == T(0) ? T(0) : factor * source.column[feature];
        }
        __syncthreads();
        if (has_source) {
          if (has_values()) stage_source(source, first, value, shared);
          T sum = 0;
          SUBQUAD_UNROLL
          for (int i = 0; i < kFeatures / kLanesOfRow; ++i) {
            const int feature = block_thread() % kLanesOfRow + i * kLanesOfRow;
            sum = fma(shared.queries()[own_row * kStride + feature], shared.column[feature], sum);
          }
          if (own_row >= source.begin && own_row < source.end) row_sum += sum;
          __syncthreads();
        }
        if (pass == 0 && has_pairs) {
          add_product<T>(pairs, {shared.queries(), kStride, 1}, {shared.keys(), kStride, 1}, depth);
        }
        if (has_source && has_values()) {
          add_product<T>(sums, {shared.queries(), kStride, 1}, {shared.values, 1, kColumnStride<T>},
                         depth);
        }
        __syncthreads();
      }
      if (pass > 0 || !has_source) continue;
      each_sum<T>([&](int r, int c, int row, int) {
        if (row < source.begin || row >= source.end) sums(r, c) = 0;
      });
    }
    row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
    row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
    if (block_lane() % kLanesOfRow == 0) shared.row_sum[own_row] = row_sum;
    if (has_pairs) {
      add_pairs(value, pairs, sums, shared);
    } else {
      __syncthreads();
    }
    bool all_finite = true;
    each_sum<T>([&](int r, int c, int row, int) {
      const T sum = shared.row_sum[row];
      if (sum != T(0)) sums(r, c) /= sum;
      all_finite = all_finite && fabs(sums(r, c)) < infinity<T>() && sum < infinity<T>();
    });
    if (__syncthreads_or(!all_finite)) return false;
    each_sum<T>(
        [&](int r, int c, int row, int column) { write(row, value + column, sums(r, c), shared); });
    write_rows(value, shared);
    return true;
  }

  // The source's sums of 64 values, in the scale of the chunk.
  SUBQUAD_DEVICE void stage_source(const row_source<T>& source, int first, int value,
                                   shared_memory& shared) const {
    const int across = block_thread() % kValues;
    for (int f = block_thread() / kValues; f < kFeatures; f += kThreads / kValues) {
      const T factor = shared.factors[f];
      shared.values[f * kColumnStride<T> + across] =
          factor != T(0) && value + across < in.d_v
              ? factor * source.sums[static_cast<std::int64_t>(first + f) * in.d_v + value + across]
              : T(0);
    }
  }

  // Adds what the pairs of the chunk sum to.
  SUBQUAD_DEVICE void add_pairs(int value, accumulators& pairs, accumulators& sums,
                                shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    if (has_values()) stage_values(value, shared);
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      const int row = tile::row(r);
      T sum = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        const int key = tile::column(c);
        if (!attends(tokens, in.attended, row, key)) pairs(r, c) = 0;
        sum += pairs(r, c);
        shared.weights()[row * kRowStride + key] = pairs(r, c);
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (block_lane() % 4 == 0) shared.row_parts[tile::warp_across()][row] = sum;
    }
    __syncthreads();
    if (block_thread() < kTokens) {
      shared.row_sum[block_thread()] +=
          shared.row_parts[0][block_thread()] + shared.row_parts[1][block_thread()];
    }
    if (has_values()) {
      add_product<T>(sums, {shared.weights(), kRowStride, 1}, {shared.values, 1, kColumnStride<T>},
                     product_depth(tokens.keys, kTokens));
    }
    __syncthreads();
  }

  SUBQUAD_DEVICE void stage_values(int value, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    stage_columns<kTokens>(shared.values, kColumnStride<T>, tokens.v, tokens.keys, value, in.d_v,
                           static_cast<const T*>(nullptr),
                           [&](int key) { return tokens.counts(key); });
  }

  SUBQUAD_DEVICE void write(int row, int value, T y, const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    if (!out.y || row >= tokens.rows || value >= in.d_v) return;
    if (shared.row_sum[row] == T(0)) {
      y = out.empty_is_nan ? std::numeric_limits<T>::quiet_NaN() : T(0);
    }
    out.y.data[out.batch.offset(kOutY, tokens.batch) +
               (tokens.chunk * kTokens + row) * out.y.row_stride + value * out.y.column_stride] = y;
  }

  // What else there is of rows, by one of the blocks that compute their values.
  SUBQUAD_DEVICE void write_rows(int value, const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    const std::int64_t first = tokens.chunk * kTokens;
    if (value > 0) return;
    if (block_thread() < tokens.rows) {
      const int row = block_thread();
      const T sum = shared.row_sum[row];
      const double scale = shared.row_scale[row];
      if (out.log_z) {
        const double log_z = sum == T(0)                   ? -infinity<double>()
                             : scale == infinity<double>() ? scale
                                                           : scale + log(static_cast<double>(sum));
        out.log_z
            .data[out.batch.offset(kOutLogZ, tokens.batch) + (first + row) * out.log_z.stride] =
            static_cast<T>(log_z);
      }
      if (kept.scales) {
        kept.scales[tokens.batch * in.n_q + first + row] = scale;
        kept.sums[tokens.batch * in.n_q + first + row] = sum;
      }
    }
    if (kept.scales) keep_products(shared);
  }

  SUBQUAD_DEVICE void keep_products(const shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    const int row = block_thread() / kLanesOfRow;
    const std::int64_t token = tokens.chunk * kTokens + row;
    const bool counts = row < tokens.rows && shared.row_sum[row] != T(0);
    T product = 0;
    if (counts && kept.y) {
      const T* y = kept.y.data + kept.batch.offset(kRowY, tokens.batch) + token * kept.y.row_stride;
      const T* grad = kept.grad_y.data + kept.batch.offset(kRowGradY, tokens.batch) +
                      token * kept.grad_y.row_stride;
      const T* center = kept.center + tokens.batch * in.d_v;
      for (int v = block_thread() % kLanesOfRow; v < in.d_v; v += kLanesOfRow) {
        product = fma(grad[v * kept.grad_y.column_stride], y[v * kept.y.column_stride] - center[v],
                      product);
      }
    }
    product += __shfl_xor_sync(0xffffffffu, product, 1);
    product += __shfl_xor_sync(0xffffffffu, product, 2);
    if (row >= tokens.rows || block_lane() % kLanesOfRow > 0) return;
    if (counts && kept.grad_log_z) {
      product -=
          kept.grad_log_z
              .data[kept.batch.offset(kRowGradLogZ, tokens.batch) + token * kept.grad_log_z.stride];
    }
    kept.products[tokens.batch * in.n_q + token] = product;
  }

  // log_q of a row and the scale of a source, decayed to it, -inf where it does not attend it.
  // Calls body(i, row, logarithm) for the rows of the thread's group.
  template <class Body>
  SUBQUAD_DEVICE void each_source_row(const row_source<T>& source, int first, shared_memory& shared,
                                      Body&& body) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    const int feature = first + walk::feature();
    double decay = walk::decay_before(tokens, feature, in.d_k, shared.scales_memory.totals);
    const double scale = feature < in.d_k ? source.scales[feature] : -infinity<double>();
    SUBQUAD_UNROLL
    for (int i = 0; i < walk::kRows; ++i) {
      const int row = walk::row(i);
      decay = decayed(decay, walk::decay_at(tokens, row, feature, in.d_k));
      const bool is_in = row >= source.begin && row < source.end;
      const double query = query_at(tokens, row, feature, in.d_k);
      body(i, row, is_in ? decayed(query, decayed(scale, decay)) : -infinity<double>());
    }
    __syncthreads();
  }

  // For states, pairs and values of any kind.
  SUBQUAD_DEVICE void sum_plainly(int value, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    for (int i = block_thread(); i < kWarps * kTokens; i += kThreads) {
      shared.maxima[i / kTokens][i % kTokens] = -infinity<double>();
    }
    __syncthreads();
    for (int s = 0; s < shared.sources.count; ++s) {
      for (int first = 0; first < in.d_k; first += kFeatures) {
        double queries[walk::kRows];
        each_source_row(shared.sources.of[s], first, shared,
                        [&](int i, int, double logarithm) { queries[i] = logarithm; });
        const double largest = reduce_rows<walk::kRows>(queries, larger_of{});
        double& of_row = shared.maxima[walk::warp_of_row()][walk::row_of_lane()];
        if (walk::is_writer()) of_row = larger(of_row, largest);
      }
    }
    __syncthreads();
    const int pair_features = in.attended == reach::all ? 0 : in.d_k;
    for (int first = 0; first < pair_features; first += kPairFeatures) {
      add_pair_maxima(tokens, in.attended, in.d_k, first, shared.maxima);
    }
    settle_row_scales(kWarps, shared);
    T sums[kPlainRows] = {};
    T row_sum = 0;
    const int own_row = block_thread() / kLanesOfRow;
    for (int s = 0; s < shared.sources.count; ++s) {
      const row_source<T>& source = shared.sources.of[s];
      for (int first = 0; first < in.d_k; first += kFeatures) {
        each_source_row(source, first, shared, [&](int, int row, double logarithm) {
          shared.queries()[row * kStride + walk::feature()] =
              logarithm == -infinity<double>() ? T(0)
                                               : weight_of<T>(logarithm - shared.row_scale[row]);
        });
        const int features = in.d_k - first < kFeatures ? in.d_k - first : kFeatures;
        for (int f = block_thread() % kLanesOfRow; f < features; f += kLanesOfRow) {
          const T weight = shared.queries()[own_row * kStride + f];
          if (weight != T(0)) row_sum = fma(weight, source.column[first + f], row_sum);
        }
        if (has_values()) {
          add_plain(
              sums, features, [&](int row, int f) { return shared.queries()[row * kStride + f]; },
              [&](int f, int column) {
                return value + column < in.d_v
                           ? source.sums[static_cast<std::int64_t>(first + f) * in.d_v + value +
                                         column]
                           : T(0);
              });
        }
        __syncthreads();
      }
    }
    for (int i = block_thread(); i < kTokens * kRowStride; i += kThreads) shared.weights()[i] = 0;
    __syncthreads();
    for (int first = 0; first < pair_features; first += kPairFeatures) {
      add_pair_weights(tokens, in.attended, in.d_k, first, shared.row_scale, shared.weights());
    }
    __syncthreads();
    for (int key = block_thread() % kLanesOfRow; key < kTokens; key += kLanesOfRow) {
      row_sum += shared.weights()[own_row * kRowStride + key];
    }
    row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
    row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
    if (block_lane() % kLanesOfRow == 0) shared.row_sum[own_row] = row_sum;
    if (has_values()) {
      add_plain(
          sums, in.attended == reach::all ? 0 : tokens.keys,
          [&](int row, int key) { return shared.weights()[row * kRowStride + key]; },
          [&](int key, int column) {
            return tokens.counts(key) && value + column < in.d_v ? tokens.v(key, value + column)
                                                                 : T(0);
          });
    }
    __syncthreads();
    SUBQUAD_UNROLL
    for (int i = 0; i < kPlainRows; ++i) {
      const int row = block_thread() / kTokens * kPlainRows + i;
      write(row, value + block_thread() % kTokens, sums[i] / shared.row_sum[row], shared);
    }
    write_rows(value, shared);
  }
};

inline std::int64_t output_blocks(std::int64_t batch, std::int64_t n_q, std::int64_t d_v) {
  return batch * divide_up(n_q, kTokens) * std::max<std::int64_t>(1, divide_up(d_v, kValues));
}

// `undone` has room for output_blocks.
template <class T>
void find_outputs(const attention_inputs<T>& in, const attention_states<T>& states,
                  const row_outputs<T>& out, const row_sums<T>& kept, int* undone) {
  const std::int64_t chunks = in.query_chunks();
  const auto value_blocks = static_cast<int>(output_blocks(1, kTokens, out.y ? in.d_v : 0));
  const std::int64_t blocks = in.size * chunks * value_blocks;
  launch(blocks,
         attention_outputs_kernel<T, false>{in, states, out, kept, chunks, value_blocks, undone});
  launch(blocks,
         attention_outputs_kernel<T, true>{in, states, out, kept, chunks, value_blocks, undone});
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_ATTENTION_OUTPUTS_CUH
