// The log-normaliser of Gaussian mixtures.
#include "gaussian_moments.cuh"
#include "launch.cuh"
#include "log_sum_exp.cuh"
#include "normalizers_core.hpp"

namespace subquad::cuda {
namespace {

// out_i = log sum_a exp(log_counts_a + m_ia + v_ia / 2) from the moments of a slab, own rows as in
// c_api.h. Threads of a block share rows: thread t takes row t % (kThreads / parts) and every
// parts-th component.
//
// Nothing aliases. A score has three roundings beside those of its moments, an exponent one more, a
// power of two 2 ulp; a thread's sum is compensated.
template <class T>
struct combine_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 3;
  static constexpr std::int64_t kMostParts = 8;
  using arrays = mixture_arrays<T>;
  struct shared_memory {
    log_sum<T> states[kThreads];
    vector_view<const T> log_counts;
    const T* x;  // of the block's first row, and so on
    const T* means;
    const T* mean;
    const T* variance;
    const std::int64_t* own_component;
    const T* own_log_weight;
    T* out;
    int rows;
  };

  arrays mixture;
  mixture_slab slab;
  moment_planes<T> planes;
  vector_view<const std::int64_t> own_component;  // optional
  vector_view<const T> own_log_weight;
  bool include_own;
  vector_view<T> out;
  batches<1> batch_of_out;
  int parts;  // a power of two
  std::int64_t row_tiles;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    __syncthreads();
    const int rows = kThreads / parts;
    const int row = static_cast<int>(threadIdx.x) % rows;
    const int part = static_cast<int>(threadIdx.x) / rows;
    const bool counts = row < shared.rows;
    std::int64_t own = -1;
    T square = 0;
    if (counts && own_component) {
      own = shared.own_component[row * own_component.stride];
      if (own >= 0) square = square_of(row, shared);
    }
    log_sum<T> state = log_sum<T>::nothing();
    for (std::int64_t a = part; counts && a < mixture.k; a += parts) {
      const T log_count = shared.log_counts[a];
      if (log_count == -infinity<T>()) continue;
      const T mean = shared.mean[row * planes.mean.row_stride + a * planes.mean.column_stride];
      const T variance =
          shared.variance[row * planes.variance.row_stride + a * planes.variance.column_stride];
      T score = fma(T(0.5), variance, log_count + mean);
      if (a == own) {
        score = leave_one_out(log_count, shared.own_log_weight[row * own_log_weight.stride], square,
                              spread_of(row, a, square, mean, shared), mean, variance);
      }
      push(state, score);
    }
    shared.states[threadIdx.x] = state;
    __syncthreads();
    if (part > 0 || !counts) return;
    for (int other = 1; other < parts; ++other) state.merge(shared.states[other * rows + row]);
    if (include_own && own >= 0) {
      push(state, shared.own_log_weight[row * own_log_weight.stride] + square);
    }
    shared.out[row * out.stride] = state.value();
  }

  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const std::int64_t rows = kThreads / parts;
    const std::int64_t first = blockIdx.x % row_tiles * rows;
    const std::int64_t entry = blockIdx.x / row_tiles;
    const std::int64_t b = slab.first_batch + entry;
    const std::int64_t i = slab.first_row + first;
    shared.rows = static_cast<int>(slab.rows - first < rows ? slab.rows - first : rows);
    shared.log_counts = mixture.log_counts;
    shared.log_counts.data += mixture.batch.offset(arrays::kLogCounts, b);
    shared.x = &mixture.x(i, 0) + mixture.batch.offset(arrays::kX, b);
    shared.means = mixture.means.data + mixture.batch.offset(arrays::kMeans, b);
    shared.mean = &planes.mean(first, 0) + entry * planes.mean_stride;
    shared.variance = &planes.variance(first, 0) + entry * planes.variance_stride;
    if (own_component) {
      shared.own_component = &own_component[i];
      shared.own_log_weight = &own_log_weight[i];
    }
    shared.out = &out[i] + batch_of_out.offset(0, b);
  }

  static SUBQUAD_DEVICE void push(log_sum<T>& state, T score) {
    const T exponent = score * kLog2E<T>;
    state.raise(exponent);
    state.add(power_of_2(exponent - state.shift));
  }

  SUBQUAD_DEVICE const T* row_of(int row, const shared_memory& shared) const {
    return shared.x + row * mixture.x.row_stride;
  }

  SUBQUAD_DEVICE T square_of(int row, const shared_memory& shared) const {
    const T* x = row_of(row, shared);
    T square = 0;
    for (std::int64_t t = 0; t < mixture.depth; ++t) {
      const T each = x[t * mixture.x.column_stride];
      square = fma(each, each, square);
    }
    return square;
  }

  // What the row added to weight * variance: (|x|^2 - mean)^2, or the same by dimension where the
  // variance is that of a diagonal alone.
  SUBQUAD_DEVICE T spread_of(int row, std::int64_t a, T square, T mean,
                             const shared_memory& shared) const {
    if (mixture.rank > 0 || !mixture.diagonal) return (square - mean) * (square - mean);
    const T* x = row_of(row, shared);
    const T* means = shared.means + a * mixture.means.row_stride;
    T spread = 0;
    for (std::int64_t t = 0; t < mixture.depth; ++t) {
      const T each = x[t * mixture.x.column_stride];
      const T part = each * (each - means[t * mixture.means.column_stride]);
      spread = fma(part, part, spread);
    }
    return spread;
  }

  // The term of a component without the row itself.
  static SUBQUAD_DEVICE T leave_one_out(T log_count, T log_weight, T square, T spread, T mean,
                                        T variance) {
    const double weight = exp(static_cast<double>(log_weight) - static_cast<double>(log_count));
    const double rest = 1 - weight;
    if (rest <= 4 * static_cast<double>(std::numeric_limits<T>::epsilon())) return -infinity<T>();
    const double deviation = static_cast<double>(square) - static_cast<double>(mean);
    const double own_mean = static_cast<double>(mean) - weight * deviation / rest;
    double own_variance =
        (static_cast<double>(variance) - weight * static_cast<double>(spread) / rest) / rest;
    own_variance = own_variance < 0 ? 0 : own_variance;
    return static_cast<T>(static_cast<double>(log_count) + log(rest) + own_mean + own_variance / 2);
  }
};

// The moments of a slab: [entry][component][row].
constexpr std::int64_t kPlanes = 2;

template <class T>
struct evaluation_layout {
  slab_cut cut;
  T* mean;
  T* variance;
  T* packed;

  evaluation_layout(workspace_layout& workspace, const mixture_sizes& size)
      : cut(size, sizeof(T), kPlanes),
        mean(workspace.take<T>(cut.size * cut.rows * size.k)),
        variance(workspace.take<T>(cut.size * cut.rows * size.k)),
        packed(workspace.take<T>(cut.packed)) {}
};

template <class T>
void gaussian_log_normalizer_as(const mixture& m, const array_view* own_component,
                                const array_view* own_log_weight, bool include_own,
                                const array_view& out, const array_view& workspace) {
  using combine = combine_kernel<T>;
  workspace_layout pieces(workspace);
  const evaluation_layout<T> layout(pieces, m.size);
  const mixture_arrays<T> arrays(m);
  std::int64_t parts = 1;
  while (parts < m.size.k && parts < combine::kMostParts) parts *= 2;
  const batches<1> batch_of_out = batches_of<1>(m.shape, {{&out, 1}});
  layout.cut.for_each(m.size, [&](const mixture_slab& slab) {
    const std::int64_t of_entry = slab.rows * m.size.k;
    const moment_planes<T> planes{
        {layout.mean, 1, slab.rows}, of_entry, {layout.variance, 1, slab.rows}, of_entry};
    score_moments<T>(arrays, layout.cut, slab, layout.packed, planes);
    const std::int64_t row_tiles = divide_up(slab.rows, combine::kThreads / parts);
    combine kernel{arrays,
                   slab,
                   planes,
                   {},
                   {},
                   include_own,
                   vector_at<T>(out, 0),
                   batch_of_out,
                   static_cast<int>(parts),
                   row_tiles};
    if (own_component) {
      kernel.own_component = vector_at<const std::int64_t>(*own_component, 0);
      kernel.own_log_weight = vector_at<const T>(*own_log_weight, 0);
    }
    launch(slab.size * row_tiles, kernel);
  });
}

template <class T>
std::size_t workspace_as(const mixture_sizes& size) {
  workspace_layout workspace;
  evaluation_layout<T>(workspace, size);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

// At most kSlabBytes for moments, unless those of one row take more, and as much for packed
// factors.
std::size_t gaussian_log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t k,
                                              std::int64_t d, std::int64_t r,
                                              std::int64_t itemsize) {
  return (itemsize == 4 ? cuda::workspace_as<float>
                        : cuda::workspace_as<double>)({batch, n, k, d, r});
}

void gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                             const array_view& means, const array_view& factors,
                             const array_view* diagonal, const array_view* own_component,
                             const array_view* own_log_weight, bool include_own,
                             const array_view& out, const array_view& workspace) {
  const mixture m = check_gaussian_log_normalizer(x, log_counts, means, factors, diagonal,
                                                  own_component, own_log_weight, out);
  if (m.size.batch * m.size.n == 0) return;
  (x.type == dtype::float32 ? cuda::gaussian_log_normalizer_as<float>
                            : cuda::gaussian_log_normalizer_as<double>)(m, own_component,
                                                                        own_log_weight, include_own,
                                                                        out, workspace);
}

}  // namespace subquad::core
