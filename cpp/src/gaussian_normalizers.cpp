#include <limits>

#include "arguments.hpp"
#include "gaussian_normalizers_checks.hpp"
#include "isa.hpp"
#include "kernels/clusters_kernels.hpp"
#include "kernels/gaussian_normalizers_kernels.hpp"
#include "normalizers_core.hpp"
#include "sample_residuals_checks.hpp"

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

double work_of(const mixture_sizes& size) {
  return static_cast<double>(size.batch) * static_cast<double>(size.n) *
         static_cast<double>(size.k) * static_cast<double>(size.d) *
         static_cast<double>(size.r + 2);
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
workspace_layout::slots scores_slots(workspace_layout& workspace, const mixture_sizes& size) {
  const row_split cut(size.batch, size.n);
  return workspace.take_slots(functions<T>().scores_scratch(cut.rows, size.d, size.r),
                              size.batch * cut.row_tasks);
}

// Calls body(batch, first row, scores of the task's rows) for all rows.
template <class T, class F>
void for_each_rows(const mixture& m, const workspace_layout::slots& slots, F&& body) {
  const row_split cut(m.size.batch, m.size.n);
  parallel_for(m.size.batch * cut.row_tasks, threads_for(work_of(m.size), slots.count),
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

  explicit parts_split(const mixture_sizes& size) {
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

  vjp_layout(workspace_layout& workspace, const mixture_sizes& size) {
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
  const mixture_sizes& size = m.size;
  const std::int64_t n = size.n;
  const std::int64_t k = size.k;
  const std::int64_t d = size.d;
  workspace_layout pieces(workspace);
  const vjp_layout<T> layout(pieces, size);
  const auto& kernels = functions<T>();
  const int threads = threads_for(2 * work_of(size), layout.slots.count);

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
  const mixture_sizes size{batch, n, k, d, r};
  (itemsize == 4 ? scores_slots<float> : scores_slots<double>)(workspace, size);
  return workspace.size();
}

void gaussian_log_normalizer(const array_view& x, const array_view& log_counts,
                             const array_view& means, const array_view& factors,
                             const array_view* diagonal, const array_view* own_component,
                             const array_view* own_log_weight, bool include_own,
                             const array_view& out, const array_view& workspace) {
  const mixture m = check_gaussian_log_normalizer(x, log_counts, means, factors, diagonal,
                                                  own_component, own_log_weight, out);
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
  const mixture m = check_gaussian_score_moments(x, means, factors, diagonal, mean, variance);
  if (m.size.batch * m.size.n == 0) return;
  (x.type == dtype::float32 ? score_moments_as<float> : score_moments_as<double>)(m, mean, variance,
                                                                                  workspace);
}

std::size_t gaussian_log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n,
                                                  std::int64_t k, std::int64_t d, std::int64_t r,
                                                  std::int64_t itemsize) {
  workspace_layout workspace;
  const mixture_sizes size{batch, n, k, d, r};
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
  const mixture m = check_gaussian_log_normalizer_vjp(grad, x, log_counts, means, factors, diagonal,
                                                      log_z, grad_x, grad_log_counts, grad_means,
                                                      grad_factors, grad_diagonal);
  if (m.size.batch == 0) return;
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
  check_sample_residuals(x, deviations, weights, offsets, variance, scale, shift, excluded,
                         log_factor, log_error, third);
  const std::int64_t n = x.shape[0];
  const std::int64_t s = deviations.shape[0];
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
  if (n == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    sample_residuals_task<T> task{};
    task.x = matrix_at<const T>(x, 0);
    task.n = n;
    task.depth = x.shape[1];
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
