#include "arguments.hpp"
#include "clusters_checks.hpp"
#include "isa.hpp"
#include "kernels/clusters_kernels.hpp"
#include "normalizers_core.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(clusters)

namespace subquad::core {
namespace {

template <class T>
const clusters_functions<T>& functions();
template <>
const clusters_functions<float>& functions() {
  return clusters_table().f32;
}
template <>
const clusters_functions<double>& functions() {
  return clusters_table().f64;
}

constexpr std::int64_t kParts = 16;  // partial sums kept, at most, whatever the number of threads

double work_of(std::int64_t n, std::int64_t k, std::int64_t d) {
  return static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(d);
}

void check_label_values(const array_view& labels, std::int64_t k) {
  const auto values = vector_at<const std::int64_t>(labels, 0);
  for (std::int64_t j = 0; j < labels.shape[0]; ++j) {
    if (values[j] < 0 || values[j] >= k) {
      throw invalid_argument("labels: expected values in [0, " + std::to_string(k) + "), got " +
                             std::to_string(values[j]) + " at " + std::to_string(j));
    }
  }
}

// Rows of a task: enough for the packing of a centroid to take 1 % of its products.
constexpr std::int64_t kNearestRows = 1024;

template <class T>
workspace_layout::slots nearest_slots(workspace_layout& workspace, std::int64_t n, std::int64_t k,
                                      std::int64_t d) {
  return workspace.take_slots(
      functions<T>().nearest_centroids_scratch(std::min(n, kNearestRows), k, d),
      divide_up(n, kNearestRows));
}

template <class T>
void nearest_centroids_as(const array_view& x, const array_view& centroids,
                          const array_view& offsets, const array_view& labels,
                          const array_view& score, const array_view& workspace) {
  const std::int64_t n = x.shape[0];
  const std::int64_t k = centroids.shape[0];
  const std::int64_t d = x.shape[1];
  workspace_layout pieces(workspace);
  const auto slots = nearest_slots<T>(pieces, n, k, d);
  const auto& kernels = functions<T>();
  parallel_for(divide_up(n, kNearestRows), threads_for(work_of(n, k, d), slots.count),
               [&](std::int64_t index, int slot) {
                 const std::int64_t first = index * kNearestRows;
                 kernels.nearest_centroids(
                     {matrix_at<const T>(x, 0).from(first), std::min(kNearestRows, n - first),
                      matrix_at<const T>(centroids, 0), k, d, vector_at<const T>(offsets, 0),
                      vector_at<std::int64_t>(labels, 0).from(first),
                      vector_at<T>(score, 0).from(first), slots[slot]});
               });
}

struct sums_layout {
  std::int64_t rows;
  std::int64_t parts;
  double* counts;  // [part][k]
  double* sums;    // [part][k][d]

  sums_layout(workspace_layout& workspace, std::int64_t n, std::int64_t k, std::int64_t d) {
    rows = std::max<std::int64_t>(4096, divide_up(n, kParts));
    parts = std::max<std::int64_t>(1, divide_up(n, rows));
    counts = workspace.take<double>(parts * k);
    sums = workspace.take<double>(parts * k * d);
  }
};

template <class T>
void component_sums_as(const array_view& y, const array_view& labels, const array_view* weights,
                       const array_view& counts, const array_view& sums,
                       const array_view& workspace) {
  const std::int64_t n = y.shape[0];
  const std::int64_t d = y.shape[1];
  const std::int64_t k = counts.shape[0];
  workspace_layout pieces(workspace);
  const sums_layout layout(pieces, n, k, d);
  const auto& kernels = functions<T>();
  const int threads = threads_for(4 * work_of(n, 1, d), available_threads());
  parallel_for(layout.parts, threads, [&](std::int64_t part, int) {
    const std::int64_t first = part * layout.rows;
    double* part_counts = layout.counts + part * k;
    double* part_sums = layout.sums + part * k * d;
    std::fill_n(part_counts, k, 0.0);
    std::fill_n(part_sums, k * d, 0.0);
    kernels.component_sums(
        {matrix_at<const T>(y, 0).from(first), std::min(layout.rows, n - first), d,
         vector_at<const std::int64_t>(labels, 0).from(first),
         weights ? vector_at<const T>(*weights, 0).from(first) : vector_view<const T>{},
         part_counts, part_sums});
  });
  const auto add_parts = [&](const double* from, std::int64_t size, double* to) {
    for (std::int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (std::int64_t part = 0; part < layout.parts; ++part) total += from[part * size + i];
      to[i] = total;
    }
  };
  add_parts(layout.counts, k, static_cast<double*>(counts.data));
  add_parts(layout.sums, k * d, static_cast<double*>(sums.data));
}

// Tasks of component_scatter: a component's rows, at least 2048 and n / 16 of them, so that no more
// than k + 16 tasks exist and 16 of them need memory beyond the output.
struct scatter_task {
  std::int64_t component;
  std::int64_t first;  // into the rows sorted by component
  std::int64_t count;
  std::int64_t part;  // index of the partial result, -1: the output itself
};

template <class T>
struct scatter_layout {
  std::int64_t* rows;    // row indices sorted by component
  std::int64_t* starts;  // k + 1
  scatter_task* tasks;   // k + kParts
  double* radii;         // k + kParts
  double* scatters;      // [part][d][d] or [part][d]
  workspace_layout::slots slots;

  scatter_layout(workspace_layout& workspace, std::int64_t n, std::int64_t k, std::int64_t d,
                 bool diagonal) {
    rows = workspace.take<std::int64_t>(n);
    starts = workspace.take<std::int64_t>(k + 1);
    tasks = workspace.take<scatter_task>(k + kParts);
    radii = workspace.take<double>(k + kParts);
    scatters = workspace.take<double>(kParts * d * (diagonal ? 1 : d));
    slots = workspace.take_slots(functions<T>().component_scatter_scratch(d), k + kParts);
  }
};

template <class T>
void component_scatter_as(const array_view& y, const array_view& labels, const array_view* weights,
                          const array_view& means, const array_view& scatter,
                          const array_view& radii, const array_view& workspace) {
  const std::int64_t n = y.shape[0];
  const std::int64_t d = y.shape[1];
  const std::int64_t k = means.shape[0];
  const bool diagonal = scatter.ndim == 2;
  const std::int64_t size = diagonal ? d : d * d;
  workspace_layout pieces(workspace);
  const scatter_layout<T> layout(pieces, n, k, d, diagonal);
  const auto of = vector_at<const std::int64_t>(labels, 0);
  std::fill_n(layout.starts, k + 1, std::int64_t{0});
  for (std::int64_t j = 0; j < n; ++j) ++layout.starts[of[j] + 1];
  for (std::int64_t a = 0; a < k; ++a) layout.starts[a + 1] += layout.starts[a];
  for (std::int64_t j = 0; j < n; ++j) layout.rows[layout.starts[of[j]]++] = j;
  for (std::int64_t a = k; a > 0; --a) layout.starts[a] = layout.starts[a - 1];
  layout.starts[0] = 0;

  const std::int64_t most = std::max<std::int64_t>(2048, divide_up(n, kParts));
  std::int64_t n_tasks = 0;
  std::int64_t n_parts = 0;
  for (std::int64_t a = 0; a < k; ++a) {
    std::int64_t first = layout.starts[a];
    const std::int64_t end = layout.starts[a + 1];
    std::int64_t part = -1;
    do {
      const std::int64_t count = std::min(most, end - first);
      layout.tasks[n_tasks++] = {a, first, count, part};
      first += count;
      part = n_parts;
      if (first < end) ++n_parts;
    } while (first < end);
  }
  auto* output = static_cast<double*>(scatter.data);
  auto* output_radii = static_cast<double*>(radii.data);
  const auto* centers = static_cast<const double*>(means.data);
  const auto kernel =
      diagonal ? functions<T>().component_diagonal_scatter : functions<T>().component_scatter;
  const int threads = threads_for(work_of(n, diagonal ? 4 : d, d), layout.slots.count);
  parallel_for(n_tasks, threads, [&](std::int64_t index, int slot) {
    const scatter_task& task = layout.tasks[index];
    kernel({matrix_at<const T>(y, 0), layout.rows + task.first, task.count, d,
            weights ? vector_at<const T>(*weights, 0) : vector_view<const T>{},
            centers + task.component * d,
            task.part < 0 ? output + task.component * size : layout.scatters + task.part * size,
            layout.radii + index, layout.slots[slot]});
  });
  for (std::int64_t index = 0; index < n_tasks; ++index) {
    const scatter_task& task = layout.tasks[index];
    double* to = output + task.component * size;
    double& radius = output_radii[task.component];
    if (task.part < 0) {
      radius = layout.radii[index];
      continue;
    }
    radius = larger_or_nan(radius, layout.radii[index]);
    const double* from = layout.scatters + task.part * size;
    for (std::int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
  if (diagonal) return;
  for (std::int64_t a = 0; a < k; ++a) {
    double* matrix = output + a * size;
    for (std::int64_t i = 0; i < d; ++i) {
      for (std::int64_t j = 0; j < i; ++j) matrix[j * d + i] = matrix[i * d + j];
    }
  }
}

}  // namespace

std::size_t nearest_centroids_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                        std::int64_t itemsize) {
  workspace_layout workspace;
  (itemsize == 4 ? nearest_slots<float> : nearest_slots<double>)(workspace, n, k, d);
  return workspace.size();
}

void nearest_centroids(const array_view& x, const array_view& centroids, const array_view& offsets,
                       const array_view& labels, const array_view& score,
                       const array_view& workspace) {
  check_nearest_centroids(x, centroids, offsets, labels, score);
  if (x.shape[0] == 0) return;
  (x.type == dtype::float32
       ? nearest_centroids_as<float>
       : nearest_centroids_as<double>)(x, centroids, offsets, labels, score, workspace);
}

std::size_t component_sums_workspace(std::int64_t n, std::int64_t k, std::int64_t d, std::int64_t) {
  workspace_layout workspace;
  sums_layout(workspace, n, k, d);
  return workspace.size();
}

void component_sums(const array_view& y, const array_view& labels, const array_view* weights,
                    const array_view& counts, const array_view& sums, const array_view& workspace) {
  check_component_sums(y, labels, weights, counts, sums);
  check_label_values(labels, counts.shape[0]);
  (y.type == dtype::float32
       ? component_sums_as<float>
       : component_sums_as<double>)(y, labels, weights, counts, sums, workspace);
}

std::size_t component_scatter_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                        std::int64_t itemsize, bool diagonal) {
  workspace_layout workspace;
  if (itemsize == 4) {
    scatter_layout<float>(workspace, n, k, d, diagonal);
  } else {
    scatter_layout<double>(workspace, n, k, d, diagonal);
  }
  return workspace.size();
}

void component_scatter(const array_view& y, const array_view& labels, const array_view* weights,
                       const array_view& means, const array_view& scatter, const array_view& radii,
                       const array_view& workspace) {
  check_component_scatter(y, labels, weights, means, scatter, radii);
  check_label_values(labels, means.shape[0]);
  (y.type == dtype::float32
       ? component_scatter_as<float>
       : component_scatter_as<double>)(y, labels, weights, means, scatter, radii, workspace);
}

}  // namespace subquad::core
