#include <limits>

#include "arguments.hpp"
#include "isa.hpp"
#include "kernels/clusters_kernels.hpp"
#include "kernels/gaussian_normalizers_kernels.hpp"
#include "normalizers_core.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(gaussian_normalizers)
SUBQUAD_DEFINE_KERNEL_TABLE(clusters)

namespace subquad::core {
namespace {

template <class T>
const gaussian_normalizers_functions<T>& functions();
template <>
const gaussian_normalizers_functions<float>& functions() {
  return gaussian_normalizers_table().f32;
}
template <>
const gaussian_normalizers_functions<double>& functions() {
  return gaussian_normalizers_table().f64;
}

template <class T>
const clusters_functions<T>& cluster_functions();
template <>
const clusters_functions<float>& cluster_functions() {
  return clusters_table().f32;
}
template <>
const clusters_functions<double>& cluster_functions() {
  return clusters_table().f64;
}

// Rows of a task, from the shapes alone: up to 1024, which make the packing of a factor 3 % of its
// products, and fewer where that would leave less than 32 tasks.
struct row_split {
  std::int64_t rows;
  std::int64_t row_tasks;

  row_split(std::int64_t batch, std::int64_t n) {
    const std::int64_t wanted = divide_up(32, std::max<std::int64_t>(1, batch));
    rows = std::clamp<std::int64_t>(divide_up(divide_up(n, wanted), 32) * 32, 128, 1024);
    rows = std::max<std::int64_t>(1, std::min(rows, n));
    row_tasks = std::max<std::int64_t>(1, divide_up(n, rows));
  }
};

struct sizes {
  std::int64_t batch;
  std::int64_t n;
  std::int64_t k;
  std::int64_t d;
  std::int64_t r;

  double work() const {
    return static_cast<double>(batch) * static_cast<double>(n) * static_cast<double>(k) *
           static_cast<double>(d) * static_cast<double>(r + 2);
  }
};

struct mixture {
  const array_view& x;
  const array_view* log_counts;
  const array_view& means;
  const array_view& factors;
  const array_view* diagonal;
  batch_shape shape{};
  sizes size{};
};

// Checks the arrays that every function takes.
mixture check_mixture(const array_view& x, const array_view* log_counts, const array_view& means,
                      const array_view& factors, const array_view* diagonal) {
  mixture found{x, log_counts, means, factors, diagonal};
  require_real(x, "x");
  require_rank(x, 2, "x", "(..., n, d)");
  require_dtype(means, x.type, "means");
  require_rank(means, 2, "means", "(..., k, d)");
  require_dtype(factors, x.type, "factors");
  require_rank(factors, 3, "factors", "(..., k, d, r)");
  const std::int64_t d = length_from_end(x, 1);
  const std::int64_t k = length_from_end(means, 2);
  require_length(means, 1, d, "means", "(..., k, d)");
  require_length(factors, 3, k, "factors", "(..., k, d, r)");
  require_length(factors, 2, d, "factors", "(..., k, d, r)");
  found.shape.include(x, 2, "x");
  found.shape.include(means, 2, "means");
  found.shape.include(factors, 3, "factors");
  if (log_counts) {
    require_dtype(*log_counts, x.type, "log_counts");
    require_rank(*log_counts, 1, "log_counts", "(..., k)");
    require_length(*log_counts, 1, k, "log_counts", "(..., k)");
    found.shape.include(*log_counts, 1, "log_counts");
  }
  if (diagonal) {
    require_dtype(*diagonal, x.type, "diagonal");
    require_rank(*diagonal, 2, "diagonal", "(..., k, d)");
    require_length(*diagonal, 2, k, "diagonal", "(..., k, d)");
    require_length(*diagonal, 1, d, "diagonal", "(..., k, d)");
    found.shape.include(*diagonal, 2, "diagonal");
  }
  found.size = {found.shape.count(), length_from_end(x, 2), k, d, length_from_end(factors, 1)};
  return found;
}

void check_output(const mixture& m, const array_view& array, std::int32_t core, const char* name,
                  const char* expected, std::initializer_list<std::int64_t> lengths) {
  require_dtype(array, m.x.type, name);
  require_rank(array, core, name, expected);
  std::int32_t position = core;
  for (const std::int64_t length : lengths)
    require_length(array, position--, length, name, expected);
  m.shape.require(array, core, name);
}

template <class T>
gaussian_scores<T> scores_of(const mixture& m, std::int64_t b) {
  gaussian_scores<T> scores{};
  scores.x = matrix_at<const T>(m.x, m.shape.offset(m.x, 2, b));
  scores.n = m.size.n;
  scores.depth = m.size.d;
  scores.k = m.size.k;
  scores.means = matrix_at<const T>(m.means, m.shape.offset(m.means, 2, b));
  scores.factors = stack_at<const T>(m.factors, m.shape.offset(m.factors, 3, b));
  scores.rank = m.size.r;
  if (m.diagonal) {
    scores.diagonal = matrix_at<const T>(*m.diagonal, m.shape.offset(*m.diagonal, 2, b));
  }
  return scores;
}

template <class T>
vector_view<const T> log_counts_of(const mixture& m, std::int64_t b) {
  return vector_at<const T>(*m.log_counts, m.shape.offset(*m.log_counts, 1, b));
}

template <class T>
workspace_layout::slots scores_slots(workspace_layout& workspace, const sizes& size) {
  const row_split cut(size.batch, size.n);
  return workspace.take_slots(functions<T>().scores_scratch(cut.rows, size.d, size.r),
                              size.batch * cut.row_tasks);
}

// Calls body(batch, first row, scores of the task's rows) for all rows.
template <class T, class F>
void for_each_rows(const mixture& m, const workspace_layout::slots& slots, F&& body) {
  const row_split cut(m.size.batch, m.size.n);
  parallel_for(m.size.batch * cut.row_tasks, threads_for(m.size.work(), slots.count),
               [&](std::int64_t index, int slot) {
                 const std::int64_t b = index / cut.row_tasks;
                 const std::int64_t first = index % cut.row_tasks * cut.rows;
                 gaussian_scores<T> scores = scores_of<T>(m, b);
                 scores.x = scores.x.from(first);
                 scores.n = std::min(cut.rows, m.size.n - first);
                 scores.scratch = slots[slot];
                 body(b, first, scores);
               });
}

template <class T>
void log_normalizer_as(const mixture& m, const array_view* own_component,
                       const array_view* own_log_weight, bool include_own, const array_view& out,
                       const array_view& workspace) {
  workspace_layout pieces(workspace);
  const workspace_layout::slots slots = scores_slots<T>(pieces, m.size);
  const auto& kernels = functions<T>();
  for_each_rows<T>(m, slots, [&](std::int64_t b, std::int64_t first, const gaussian_scores<T>& s) {
    gaussian_log_normalizer_task<T> task{};
    task.scores = s;
    task.log_counts = log_counts_of<T>(m, b);
    if (own_component) {
      task.own_component = vector_at<const std::int64_t>(*own_component, 0).from(first);
      task.own_log_weight = vector_at<const T>(*own_log_weight, 0).from(first);
    }
    task.include_own = include_own;
    task.out = vector_at<T>(out, m.shape.offset(out, 1, b)).from(first);
    kernels.log_normalizer(task);
  });
}

template <class T>
void score_moments_as(const mixture& m, const array_view& mean, const array_view& variance,
                      const array_view& workspace) {
  workspace_layout pieces(workspace);
  const workspace_layout::slots slots = scores_slots<T>(pieces, m.size);
  const auto& kernels = functions<T>();
  for_each_rows<T>(m, slots, [&](std::int64_t b, std::int64_t first, const gaussian_scores<T>& s) {
    kernels.score_moments({s, matrix_at<T>(mean, m.shape.offset(mean, 2, b)).from(first),
                           matrix_at<T>(variance, m.shape.offset(variance, 2, b)).from(first)});
  });
}

// The reverse. Parameters need, for each component, the weighted sums of 1, x and x x^T over all
// rows: tasks are (batch, component, part of the rows), parts added in order.
struct parts_split {
  std::int64_t rows;
  std::int64_t count;

  explicit parts_split(const sizes& size) {
    count = divide_up(16, std::max<std::int64_t>(1, size.batch * size.k));
    count = std::max<std::int64_t>(1, std::min(count, size.n / 2048));
    rows = std::max<std::int64_t>(1, divide_up(size.n, count));
  }
};

template <class T>
struct vjp_layout {
  T* responsibilities;            // [batch][k][n]
  T* covariances;                 // [batch][k][d][d]
  double* counts;                 // [batch][k][part]
  double* sums;                   // [batch][k][part][d]
  double* scatters;               // [batch][k][part][d][d]
  double* radii;                  // [batch][k][part]
  workspace_layout::slots slots;  // of every pass, one after the other

  vjp_layout(workspace_layout& workspace, const sizes& size) {
    const parts_split parts(size);
    const row_split cut(size.batch, size.n);
    const std::int64_t components = size.batch * size.k;
    responsibilities = workspace.take<T>(components * size.n);
    covariances = workspace.take<T>(components * size.d * size.d);
    counts = workspace.take<double>(components * parts.count);
    sums = workspace.take<double>(components * parts.count * size.d);
    scatters = workspace.take<double>(components * parts.count * size.d * size.d);
    radii = workspace.take<double>(components * parts.count);
    const std::size_t bytes = std::max({functions<T>().scores_scratch(cut.rows, size.d, size.r),
                                        functions<T>().gradient_scratch(cut.rows, size.d),
                                        cluster_functions<T>().component_scatter_scratch(size.d)});
    slots =
        workspace.take_slots(bytes, std::max(size.batch * cut.row_tasks, components * parts.count));
  }
};

template <class T>
void vjp_as(const mixture& m, const array_view& grad, const array_view& log_z,
            const array_view* grad_x, const array_view* grad_log_counts,
            const array_view* grad_means, const array_view* grad_factors,
            const array_view* grad_diagonal, const array_view& workspace) {
  const sizes& size = m.size;
  const std::int64_t n = size.n;
  const std::int64_t k = size.k;
  const std::int64_t d = size.d;
  workspace_layout pieces(workspace);
  const vjp_layout<T> layout(pieces, size);
  const auto& kernels = functions<T>();
  const int threads = threads_for(2 * size.work(), layout.slots.count);

  for_each_rows<T>(
      m, layout.slots, [&](std::int64_t b, std::int64_t first, const gaussian_scores<T>& s) {
        gaussian_responsibilities_task<T> task{};
        task.scores = s;
        task.log_counts = log_counts_of<T>(m, b);
        task.grad = vector_at<const T>(grad, m.shape.offset(grad, 1, b)).from(first);
        task.log_z = vector_at<const T>(log_z, m.shape.offset(log_z, 1, b)).from(first);
        task.out = {layout.responsibilities + b * k * n + first, n, 1};
        kernels.responsibilities(task);
      });

  if (grad_x) {
    parallel_for(size.batch * k, threads, [&](std::int64_t index, int) {
      const gaussian_scores<T> s = scores_of<T>(m, index / k);
      const std::int64_t a = index % k;
      kernels.covariance(s.factors[a], d, size.r,
                         s.diagonal
                             ? vector_view<const T>{&s.diagonal(a, 0), s.diagonal.column_stride}
                             : vector_view<const T>{},
                         layout.covariances + index * d * d);
    });
    const row_split cut(size.batch, n);
    parallel_for(size.batch * cut.row_tasks, threads, [&](std::int64_t index, int slot) {
      const std::int64_t b = index / cut.row_tasks;
      const std::int64_t first = index % cut.row_tasks * cut.rows;
      const gaussian_scores<T> s = scores_of<T>(m, b);
      gaussian_gradient_task<T> task{};
      task.x = s.x.from(first);
      task.n = std::min(cut.rows, n - first);
      task.depth = d;
      task.k = k;
      task.means = s.means;
      task.covariances = layout.covariances + b * k * d * d;
      task.responsibilities = {layout.responsibilities + b * k * n + first, n, 1};
      task.out = matrix_at<T>(*grad_x, m.shape.offset(*grad_x, 2, b)).from(first);
      task.scratch = layout.slots[slot];
      kernels.gradient(task);
    });
  }

  const bool second = grad_factors || grad_diagonal;
  if (!second && !grad_log_counts && !grad_means) return;
  const parts_split parts(size);
  static constexpr std::int64_t kOneLabel = 0;
  parallel_for(size.batch * k * parts.count, threads, [&](std::int64_t index, int slot) {
    const std::int64_t component = index / parts.count;
    const std::int64_t first = index % parts.count * parts.rows;
    const std::int64_t count = std::min(parts.rows, n - first);
    const matrix_view<const T> x = scores_of<T>(m, component / k).x.from(first);
    const vector_view<const T> weights{layout.responsibilities + component * n + first, 1};
    layout.counts[index] = 0;
    for (std::int64_t i = 0; i < d; ++i) layout.sums[index * d + i] = 0;
    cluster_functions<T>().component_sums(
        {x, count, d, {&kOneLabel, 0}, weights, layout.counts + index, layout.sums + index * d});
    if (!second) return;
    const component_scatter_task<T> task{x,
                                         nullptr,
                                         count,
                                         d,
                                         weights,
                                         nullptr,
                                         layout.scatters + index * d * d,
                                         layout.radii + index,
                                         layout.slots[slot]};
    if (grad_factors) {
      cluster_functions<T>().component_scatter(task);
    } else {
      cluster_functions<T>().component_diagonal_scatter(task);
    }
  });
  parallel_for(size.batch * k, threads, [&](std::int64_t component, int) {
    const std::int64_t b = component / k;
    const std::int64_t a = component % k;
    double* count = layout.counts + component * parts.count;
    double* sum = layout.sums + component * parts.count * d;
    double* scatter = layout.scatters + component * parts.count * d * d;
    for (std::int64_t part = 1; part < parts.count; ++part) {
      count[0] += count[part];
      for (std::int64_t i = 0; i < d; ++i) sum[i] += sum[part * d + i];
      // Of the diagonal alone, a part fills the first d places of its d * d.
      const std::int64_t filled = grad_factors ? d * d : grad_diagonal ? d : 0;
      for (std::int64_t i = 0; i < filled; ++i) scatter[i] += scatter[part * d * d + i];
    }
    if (grad_log_counts) {
      vector_at<T>(*grad_log_counts, m.shape.offset(*grad_log_counts, 1, b))[a] =
          static_cast<T>(count[0]);
    }
    if (grad_means) {
      const auto to = matrix_at<T>(*grad_means, m.shape.offset(*grad_means, 2, b));
      for (std::int64_t i = 0; i < d; ++i) to(a, i) = static_cast<T>(sum[i]);
    }
    if (grad_diagonal) {
      const auto to = matrix_at<T>(*grad_diagonal, m.shape.offset(*grad_diagonal, 2, b));
      for (std::int64_t i = 0; i < d; ++i) {
        to(a, i) = static_cast<T>(scatter[grad_factors ? i * d + i : i] / 2);
      }
    }
    if (!grad_factors) return;
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t j = 0; j < i; ++j) scatter[j * d + i] = scatter[i * d + j];
    }
    // An absent component has no gradient, whatever its factor is.
    const bool absent = log_counts_of<T>(m, b)[a] == -std::numeric_limits<T>::infinity();
    const auto factor = scores_of<T>(m, b).factors[a];
    const auto to = stack_at<T>(*grad_factors, m.shape.offset(*grad_factors, 3, b))[a];
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t c = 0; c < size.r; ++c) {
        double total = 0;
        for (std::int64_t j = 0; j < d && !absent; ++j) {
          total += scatter[i * d + j] * static_cast<double>(factor(j, c));
        }
        to(i, c) = static_cast<T>(total);
      }
    }
  });
}

}  // namespace

std::size_t gaussian_log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t k,
                                              std::int64_t d, std::int64_t r,
                                              std::int64_t itemsize) {
  workspace_layout workspace;
  const sizes size{batch, n, k, d, r};
  (itemsize == 4 ? scores_slots<float> : scores_slots<double>)(workspace, size);
  return workspace.size();
}

void gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                             const array_view& means, const array_view& factors,
                             const array_view* diagonal, const array_view* own_component,
                             const array_view* own_log_weight, bool include_own,
                             const array_view& out, const array_view& workspace) {
  const mixture m = check_mixture(x, &log_counts, means, factors, diagonal);
  check_output(m, out, 1, "out", "(..., n)", {m.size.n});
  if ((own_component == nullptr) != (own_log_weight == nullptr)) {
    throw invalid_argument("own_log_weight: expected with own_component and only then");
  }
  if (own_component) {
    require_dtype(*own_component, dtype::int64, "own_component");
    require_rank(*own_component, 1, "own_component", "(n,)");
    require_length(*own_component, 1, m.size.n, "own_component", "(n,)");
    require_dtype(*own_log_weight, x.type, "own_log_weight");
    require_rank(*own_log_weight, 1, "own_log_weight", "(n,)");
    require_length(*own_log_weight, 1, m.size.n, "own_log_weight", "(n,)");
  }
  if (m.size.batch * m.size.n == 0) return;
  (x.type == dtype::float32
       ? log_normalizer_as<float>
       : log_normalizer_as<double>)(m, own_component, own_log_weight, include_own, out, workspace);
}

std::size_t gaussian_score_moments_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                             std::int64_t r, std::int64_t itemsize) {
  return gaussian_log_normalizer_workspace(1, n, k, d, r, itemsize);
}

void gaussian_score_moments(const array_view& x, const array_view& means, const array_view& factors,
                            const array_view* diagonal, const array_view& mean,
                            const array_view& variance, const array_view& workspace) {
  const mixture m = check_mixture(x, nullptr, means, factors, diagonal);
  check_output(m, mean, 2, "mean", "(..., n, k)", {m.size.n, m.size.k});
  check_output(m, variance, 2, "variance", "(..., n, k)", {m.size.n, m.size.k});
  if (m.size.batch * m.size.n == 0) return;
  (x.type == dtype::float32 ? score_moments_as<float> : score_moments_as<double>)(m, mean, variance,
                                                                                  workspace);
}

std::size_t gaussian_log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n,
                                                  std::int64_t k, std::int64_t d, std::int64_t r,
                                                  std::int64_t itemsize) {
  workspace_layout workspace;
  const sizes size{batch, n, k, d, r};
  if (itemsize == 4) {
    vjp_layout<float>(workspace, size);
  } else {
    vjp_layout<double>(workspace, size);
  }
  return workspace.size();
}

void gaussian_log_normalizer_vjp(const array_view& grad, const array_view& x,
                                 const array_view& log_counts, const array_view& means,
                                 const array_view& factors, const array_view* diagonal,
                                 const array_view& log_z, const array_view* grad_x,
                                 const array_view* grad_log_counts, const array_view* grad_means,
                                 const array_view* grad_factors, const array_view* grad_diagonal,
                                 const array_view& workspace) {
  const mixture m = check_mixture(x, &log_counts, means, factors, diagonal);
  const sizes& size = m.size;
  const auto check_rows = [&](const array_view& array, const char* name) {
    check_output(m, array, 1, name, "(..., n)", {size.n});
  };
  check_rows(grad, "grad");
  check_rows(log_z, "log_z");
  if (grad_x) check_output(m, *grad_x, 2, "grad_x", "(..., n, d)", {size.n, size.d});
  if (grad_log_counts) {
    check_output(m, *grad_log_counts, 1, "grad_log_counts", "(..., k)", {size.k});
  }
  if (grad_means) check_output(m, *grad_means, 2, "grad_means", "(..., k, d)", {size.k, size.d});
  if (grad_factors) {
    check_output(m, *grad_factors, 3, "grad_factors", "(..., k, d, r)", {size.k, size.d, size.r});
  }
  if (grad_diagonal) {
    check_output(m, *grad_diagonal, 2, "grad_diagonal", "(..., k, d)", {size.k, size.d});
  }
  if (size.batch == 0) return;
  (x.type == dtype::float32 ? vjp_as<float>
                            : vjp_as<double>)(m, grad, log_z, grad_x, grad_log_counts, grad_means,
                                              grad_factors, grad_diagonal, workspace);
}

namespace {

constexpr std::int64_t kResidualRows = 256;

template <class T>
workspace_layout::slots residual_slots(workspace_layout& workspace, std::int64_t n, std::int64_t d,
                                       std::int64_t largest) {
  return workspace.take_slots(
      functions<T>().residuals_scratch(std::min(n, kResidualRows), d, largest),
      divide_up(n, kResidualRows));
}

template <class T>
void sample_residuals_as(sample_residuals_task<T> whole, const array_view& workspace) {
  workspace_layout pieces(workspace);
  const auto slots = residual_slots<T>(pieces, whole.n, whole.depth, whole.largest);
  const auto& kernels = functions<T>();
  const double work = static_cast<double>(whole.n) * static_cast<double>(whole.k) *
                      static_cast<double>(whole.largest) * static_cast<double>(whole.depth + 16);
  parallel_for(divide_up(whole.n, kResidualRows), threads_for(work, slots.count),
               [&](std::int64_t index, int slot) {
                 const std::int64_t first = index * kResidualRows;
                 sample_residuals_task<T> task = whole;
                 task.x = task.x.from(first);
                 task.n = std::min(kResidualRows, whole.n - first);
                 task.variance = task.variance.from(first);
                 task.scale = task.scale.from(first);
                 if (task.shift) task.shift = task.shift.from(first);
                 task.excluded = task.excluded.from(first);
                 task.log_factor = task.log_factor.from(first);
                 task.log_error = task.log_error.from(first);
                 task.third = task.third.from(first);
                 task.scratch = slots[slot];
                 kernels.sample_residuals(task);
               });
}

}  // namespace

std::size_t sample_residuals_workspace(std::int64_t n, std::int64_t d, std::int64_t largest,
                                       std::int64_t itemsize) {
  workspace_layout workspace;
  (itemsize == 4 ? residual_slots<float> : residual_slots<double>)(workspace, n, d, largest);
  return workspace.size();
}

void sample_residuals(const array_view& x, const array_view& deviations, const array_view& weights,
                      const array_view& offsets, const array_view& variance,
                      const array_view& scale, const array_view* shift, const array_view* excluded,
                      bool quadratic, const array_view& log_factor, const array_view& log_error,
                      const array_view& third, const array_view& workspace) {
  require_real(x, "x");
  const auto check = [&](const array_view& array, const char* name, const char* expected,
                         std::initializer_list<std::int64_t> lengths) {
    require_dtype(array, x.type, name);
    require_shape(array, name, expected, lengths);
  };
  if (x.ndim != 2) {
    throw invalid_argument("x: expected shape (n, d), got " + shape_text(x.shape, x.ndim));
  }
  if (deviations.ndim != 2) {
    throw invalid_argument("deviations: expected shape (s, d), got " +
                           shape_text(deviations.shape, deviations.ndim));
  }
  const std::int64_t n = x.shape[0];
  const std::int64_t d = x.shape[1];
  const std::int64_t s = deviations.shape[0];
  check(deviations, "deviations", "(s, d)", {s, d});
  check(weights, "weights", "(s,)", {s});
  require_dtype(offsets, dtype::int64, "offsets");
  if (offsets.ndim != 1 || offsets.shape[0] < 1) {
    throw invalid_argument("offsets: expected shape (k + 1,), got " +
                           shape_text(offsets.shape, offsets.ndim));
  }
  const std::int64_t k = offsets.shape[0] - 1;
  const auto starts = vector_at<const std::int64_t>(offsets, 0);
  std::int64_t largest = 0;
  for (std::int64_t a = 0; a < k; ++a) {
    if (starts[a] < 0 || starts[a + 1] < starts[a] || starts[a + 1] > s) {
      throw invalid_argument("offsets: expected ascending values in [0, " + std::to_string(s) +
                             "], got " + std::to_string(starts[a]) + " before " +
                             std::to_string(starts[a + 1]));
    }
    largest = std::max(largest, starts[a + 1] - starts[a]);
  }
  check(variance, "variance", "(n, k)", {n, k});
  check(scale, "scale", "(n, k)", {n, k});
  if (shift) check(*shift, "shift", "(n, k)", {n, k});
  if (excluded) {
    require_dtype(*excluded, dtype::int64, "excluded");
    require_shape(*excluded, "excluded", "(n,)", {n});
  }
  check(log_factor, "log_factor", "(n, k)", {n, k});
  check(log_error, "log_error", "(n, k)", {n, k});
  check(third, "third", "(n, k)", {n, k});
  if (n == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    sample_residuals_task<T> task{};
    task.x = matrix_at<const T>(x, 0);
    task.n = n;
    task.depth = d;
    task.k = k;
    task.deviations = matrix_at<const T>(deviations, 0);
    task.weights = vector_at<const T>(weights, 0);
    task.offsets = starts;
    task.largest = largest;
    task.variance = matrix_at<const T>(variance, 0);
    task.scale = matrix_at<const T>(scale, 0);
    if (shift) task.shift = matrix_at<const T>(*shift, 0);
    if (excluded) task.excluded = vector_at<const std::int64_t>(*excluded, 0);
    task.quadratic = quadratic;
    task.log_factor = matrix_at<T>(log_factor, 0);
    task.log_error = matrix_at<T>(log_error, 0);
    task.third = matrix_at<T>(third, 0);
    sample_residuals_as<T>(task, workspace);
  };
  if (x.type == dtype::float32) {
    run(float{});
  } else {
    run(double{});
  }
}

}  // namespace subquad::core
