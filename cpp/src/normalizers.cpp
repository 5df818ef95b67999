#include "normalizers_core.hpp"

#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "isa.hpp"
#include "kernels/normalizers_kernels.hpp"
#include "normalizers_checks.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(normalizers)

namespace subquad::core {
namespace {

template <class T>
const normalizers_functions<T>& functions();
template <>
const normalizers_functions<float>& functions() {
  return normalizers_table().f32;
}
template <>
const normalizers_functions<double>& functions() {
  return normalizers_table().f64;
}

// How rows (whose sums are wanted) and columns (what is summed) are cut. A function of the shapes
// alone, so that results do not depend on the number of threads. 640 rows make the packing of a
// column cheap (2 % of its products); columns are cut where too few rows make too few tasks.
struct split {
  std::int64_t rows;
  std::int64_t row_tasks;
  std::int64_t columns;
  std::int64_t column_tasks;

  split(std::int64_t batch, std::int64_t n, std::int64_t m) {
    constexpr std::int64_t kTasks = 64;
    row_tasks = std::max<std::int64_t>(1, divide_up(n, 640));
    rows = std::max<std::int64_t>(1, divide_up(divide_up(n, row_tasks), 32) * 32);
    row_tasks = std::max<std::int64_t>(1, divide_up(n, rows));
    column_tasks = divide_up(kTasks, std::max<std::int64_t>(1, batch * row_tasks));
    column_tasks = std::max<std::int64_t>(1, std::min(column_tasks, m / 256));
    columns = std::max<std::int64_t>(1, divide_up(divide_up(m, column_tasks), 12) * 12);
    column_tasks = std::max<std::int64_t>(1, divide_up(m, columns));
  }
  std::int64_t tasks(std::int64_t batch) const { return batch * row_tasks * column_tasks; }
};

struct task_index {
  std::int64_t batch;
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;
  std::int64_t columns;
  std::int64_t part;  // which of the column tasks

  task_index(const split& cut, std::int64_t n, std::int64_t m, std::int64_t task) {
    part = task % cut.column_tasks;
    task /= cut.column_tasks;
    row = task % cut.row_tasks * cut.rows;
    batch = task / cut.row_tasks;
    rows = std::min(cut.rows, n - row);
    column = part * cut.columns;
    columns = std::min(cut.columns, m - column);
  }
};

double work_of(std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t d) {
  return static_cast<double>(batch) * static_cast<double>(n) * static_cast<double>(m) *
         static_cast<double>(d + 8);
}

template <class T>
struct log_normalizer_layout {
  double* shift;  // [column task][batch][n]
  double* sum;
  workspace_layout::slots slots;

  log_normalizer_layout(workspace_layout& workspace, const split& cut, std::int64_t batch,
                        std::int64_t n, std::int64_t d) {
    shift = workspace.take<double>(cut.column_tasks * batch * n);
    sum = workspace.take<double>(cut.column_tasks * batch * n);
    slots = workspace.take_slots(functions<T>().log_normalizer_scratch(cut.rows, cut.columns, d),
                                 cut.tasks(batch));
  }
};

// A row whose largest score is +inf: NaN if any of its scores is NaN. Rare, hence plain.
template <class T>
T infinite_row(const log_normalizer_task<T>& task) {
  for (std::int64_t j = 0; j < task.m; ++j) {
    T score = task.log_weights ? task.log_weights[j] : T(0);
    if (score == -std::numeric_limits<T>::infinity()) continue;
    if (task.excluded && task.excluded[0] == j) continue;
    for (std::int64_t k = 0; k < task.depth; ++k) score += task.x(0, k) * task.y(j, k);
    if (std::isnan(score)) return score;
  }
  return std::numeric_limits<T>::infinity();
}

template <class T>
void log_normalizer_as(const batch_shape& shape, const array_view& x, const array_view& y,
                       const array_view* log_weights, const array_view* excluded,
                       const array_view& out, const array_view& workspace) {
  const std::int64_t batch = shape.count();
  const std::int64_t n = length_from_end(x, 2);
  const std::int64_t m = length_from_end(y, 2);
  const std::int64_t d = length_from_end(x, 1);
  if (batch * n == 0) return;
  const split cut(batch, n, m);
  workspace_layout pieces(workspace);
  const log_normalizer_layout<T> layout(pieces, cut, batch, n, d);
  const auto task_of = [&](std::int64_t b) {
    log_normalizer_task<T> task{};
    task.x = matrix_at<const T>(x, shape.offset(x, 2, b));
    task.y = matrix_at<const T>(y, shape.offset(y, 2, b));
    task.n = n;
    task.m = m;
    task.depth = d;
    if (log_weights) {
      task.log_weights = vector_at<const T>(*log_weights, shape.offset(*log_weights, 1, b));
    }
    if (excluded) task.excluded = vector_at<const std::int64_t>(*excluded, 0);
    return task;
  };
  const auto& kernels = functions<T>();
  const int threads = threads_for(work_of(batch, n, m, d), layout.slots.count);
  parallel_for(cut.tasks(batch), threads, [&](std::int64_t index, int slot) {
    const task_index at(cut, n, m, index);
    log_normalizer_task<T> task = task_of(at.batch);
    task.x = task.x.from(at.row);
    task.n = at.rows;
    task.y = task.y.from(at.column);
    task.m = at.columns;
    task.log_weights = task.log_weights.from(at.column);
    task.excluded = task.excluded.from(at.row);
    task.first_key = at.column;
    const std::int64_t first = (at.part * batch + at.batch) * n + at.row;
    task.shift = layout.shift + first;
    task.sum = layout.sum + first;
    task.scratch = layout.slots[slot];
    kernels.log_normalizer(task);
  });
  constexpr std::int64_t kRows = 2048;
  const std::int64_t row_tasks = divide_up(n, kRows);
  parallel_for(batch * row_tasks, threads, [&](std::int64_t index, int) {
    const std::int64_t b = index / row_tasks;
    const std::int64_t begin = index % row_tasks * kRows;
    const vector_view<T> to = vector_at<T>(out, shape.offset(out, 1, b));
    for (std::int64_t i = begin; i < std::min(n, begin + kRows); ++i) {
      double shift = layout.shift[b * n + i];
      for (std::int64_t part = 1; part < cut.column_tasks; ++part) {
        shift = std::max(shift, layout.shift[(part * batch + b) * n + i]);
      }
      double sum = 0;
      for (std::int64_t part = 0; part < cut.column_tasks; ++part) {
        const std::int64_t at = (part * batch + b) * n + i;
        // Equal shifts first: the lowest finite one minus itself, and inf minus inf, need no power.
        const double scale = layout.shift[at] == shift ? 1 : std::exp2(layout.shift[at] - shift);
        sum += layout.sum[at] * scale;
      }
      if (std::isinf(shift)) {
        log_normalizer_task<T> row = task_of(b);
        row.x = row.x.from(i);
        row.excluded = row.excluded.from(i);
        to[i] = infinite_row(row);
      } else {
        to[i] = static_cast<T>(sum == 0 ? -std::numeric_limits<double>::infinity()
                                        : (shift + std::log2(sum)) * 0.69314718055994530942);
      }
    }
  });
}

// Parts of the output that column tasks write before they are added, kept below 2^22 elements.
split reverse_split(std::int64_t batch, std::int64_t n, std::int64_t m, std::int64_t d) {
  split cut(batch, n, m);
  const std::int64_t most =
      (std::int64_t{1} << 22) / std::max<std::int64_t>(1, batch * n * (d + 1));
  if (cut.column_tasks > std::max<std::int64_t>(1, most)) {
    cut.column_tasks = std::max<std::int64_t>(1, most);
    cut.columns = divide_up(divide_up(m, cut.column_tasks), 12) * 12;
    cut.column_tasks =
        std::max<std::int64_t>(1, divide_up(m, std::max<std::int64_t>(1, cut.columns)));
  }
  return cut;
}

template <class T>
struct weighted_sums_layout {
  T* parts;   // [column task][batch][n][d], only where columns are cut
  T* totals;  // [column task][batch][n]
  workspace_layout::slots slots;

  weighted_sums_layout(workspace_layout& workspace, const split& cut, std::int64_t batch,
                       std::int64_t n, std::int64_t d) {
    const std::int64_t parts_count = cut.column_tasks > 1 ? cut.column_tasks * batch * n : 0;
    parts = workspace.take<T>(parts_count * d);
    totals = workspace.take<T>(parts_count);
    slots = workspace.take_slots(functions<T>().weighted_sum_scratch(cut.rows, cut.columns, d),
                                 cut.tasks(batch));
  }
};

// Runs weighted_sum over all rows and columns. of_batch(b) gives the task of a whole batch member.
template <class T, class F>
void weighted_sums(const split& cut, const weighted_sums_layout<T>& layout, std::int64_t batch,
                   F&& of_batch) {
  const weighted_sum_task<T> example = of_batch(0);
  const std::int64_t n = example.n;
  const std::int64_t m = example.m;
  const std::int64_t d = example.depth;
  const auto& kernels = functions<T>();
  const int threads = threads_for(2 * work_of(batch, n, m, d), layout.slots.count);
  parallel_for(cut.tasks(batch), threads, [&](std::int64_t index, int slot) {
    const task_index at(cut, n, m, index);
    weighted_sum_task<T> task = of_batch(at.batch);
    task.x = task.x.from(at.row);
    task.n = at.rows;
    task.y = task.y.from(at.column);
    task.m = at.columns;
    task.row_offset += at.row;
    task.column_offset += at.column;
    if (task.gamma) task.gamma += at.column;
    if (task.scale) task.scale += at.row;
    task.excluded = task.excluded.from(task.excluded_by_row ? at.row : at.column);
    task.first_row = at.row;
    task.first_column = at.column;
    if (cut.column_tasks > 1) {
      const std::int64_t first = (at.part * batch + at.batch) * n + at.row;
      if (task.out) task.out = {layout.parts + first * d, d, 1};
      if (task.total) task.total = {layout.totals + first, 1};
    } else {
      if (task.out) task.out = task.out.from(at.row);
      task.total = task.total.from(at.row);
    }
    task.scratch = layout.slots[slot];
    kernels.weighted_sum(task);
  });
  if (cut.column_tasks == 1) return;
  parallel_for(batch, threads, [&](std::int64_t b, int) {
    const weighted_sum_task<T> task = of_batch(b);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t k = 0; task.out && k < d; ++k) {
        T sum = 0;
        for (std::int64_t part = 0; part < cut.column_tasks; ++part) {
          sum += layout.parts[((part * batch + b) * n + i) * d + k];
        }
        task.out(i, k) = sum;
      }
      if (!task.total) continue;
      T sum = 0;
      for (std::int64_t part = 0; part < cut.column_tasks; ++part) {
        sum += layout.totals[(part * batch + b) * n + i];
      }
      task.total[i] = sum;
    }
  });
}

template <class T>
struct log_normalizer_vjp_layout {
  split by_query;
  split by_key;
  T* minus_log_z;  // [batch][n]
  T* grad;         // [batch][n]
  T* log_weights;  // [batch][m]
  workspace_layout keys_pieces;
  workspace_layout queries_pieces;

  log_normalizer_vjp_layout(workspace_layout& workspace, std::int64_t batch, std::int64_t n,
                            std::int64_t m, std::int64_t d)
      : by_query(reverse_split(batch, n, m, d)), by_key(reverse_split(batch, m, n, d)) {
    minus_log_z = workspace.take<T>(batch * n);
    grad = workspace.take<T>(batch * n);
    log_weights = workspace.take<T>(batch * m);
    // The two passes run one after the other on the same memory.
    queries_pieces = workspace;
    keys_pieces = workspace;
  }
};

// Rows of log_z = +inf count for nothing in the sums; what their pairs of infinite score make of
// the gradients is inf - inf. Rare, hence plain.
template <class T>
void mark_infinite_rows(const batch_shape& shape, const array_view& x, const array_view& y,
                        const array_view* log_weights, const array_view* excluded,
                        const array_view& log_z, const array_view* grad_x, const array_view* grad_y,
                        const array_view* grad_log_weights) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
  const std::int64_t d = length_from_end(x, 1);
  for (std::int64_t b = 0; b < shape.count(); ++b) {
    const auto z = vector_at<const T>(log_z, shape.offset(log_z, 1, b));
    for (std::int64_t i = 0; i < length_from_end(x, 2); ++i) {
      if (z[i] != kInfinity) continue;
      const auto row = matrix_at<const T>(x, shape.offset(x, 2, b)).from(i);
      const auto keys = matrix_at<const T>(y, shape.offset(y, 2, b));
      for (std::int64_t j = 0; j < length_from_end(y, 2); ++j) {
        T score = log_weights
                      ? vector_at<const T>(*log_weights, shape.offset(*log_weights, 1, b))[j]
                      : T(0);
        if (score == -kInfinity) continue;
        if (excluded && vector_at<const std::int64_t>(*excluded, 0)[i] == j) continue;
        for (std::int64_t k = 0; k < d; ++k) score += row(0, k) * keys(j, k);
        if (score < kInfinity) continue;
        for (std::int64_t k = 0; k < d; ++k) {
          if (grad_x) matrix_at<T>(*grad_x, shape.offset(*grad_x, 2, b))(i, k) = kNaN;
          if (grad_y) matrix_at<T>(*grad_y, shape.offset(*grad_y, 2, b))(j, k) = kNaN;
        }
        if (grad_log_weights) {
          vector_at<T>(*grad_log_weights, shape.offset(*grad_log_weights, 1, b))[j] = kNaN;
        }
      }
    }
  }
}

template <class T>
void log_normalizer_vjp_as(const batch_shape& shape, const array_view& grad, const array_view& x,
                           const array_view& y, const array_view* log_weights,
                           const array_view* excluded, const array_view& log_z,
                           const array_view* grad_x, const array_view* grad_y,
                           const array_view* grad_log_weights, const array_view& workspace) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  const std::int64_t batch = shape.count();
  const std::int64_t n = length_from_end(x, 2);
  const std::int64_t m = length_from_end(y, 2);
  const std::int64_t d = length_from_end(x, 1);
  if (batch == 0) return;
  workspace_layout pieces(workspace);
  log_normalizer_vjp_layout<T> layout(pieces, batch, n, m, d);
  for (std::int64_t b = 0; b < batch; ++b) {
    const auto z = vector_at<const T>(log_z, shape.offset(log_z, 1, b));
    const auto g = vector_at<const T>(grad, shape.offset(grad, 1, b));
    for (std::int64_t i = 0; i < n; ++i) {
      layout.minus_log_z[b * n + i] = z[i] == -kInfinity ? z[i] : -z[i];
      layout.grad[b * n + i] = g[i];
    }
    const auto weights = log_weights
                             ? vector_at<const T>(*log_weights, shape.offset(*log_weights, 1, b))
                             : vector_view<const T>{};
    for (std::int64_t j = 0; j < m; ++j)
      layout.log_weights[b * m + j] = weights ? weights[j] : T(0);
  }
  const auto exclusions =
      excluded ? vector_at<const std::int64_t>(*excluded, 0) : vector_view<const std::int64_t>{};
  if (grad_x) {
    const weighted_sums_layout<T> sums(layout.queries_pieces, layout.by_query, batch, n, d);
    weighted_sums<T>(layout.by_query, sums, batch, [&](std::int64_t b) {
      weighted_sum_task<T> task{};
      task.x = matrix_at<const T>(x, shape.offset(x, 2, b));
      task.n = n;
      task.y = matrix_at<const T>(y, shape.offset(y, 2, b));
      task.m = m;
      task.depth = d;
      task.row_offset = layout.minus_log_z + b * n;
      task.column_offset = layout.log_weights + b * m;
      task.scale = layout.grad + b * n;
      task.excluded = exclusions;
      task.excluded_by_row = true;
      task.out = matrix_at<T>(*grad_x, shape.offset(*grad_x, 2, b));
      return task;
    });
  }
  if (grad_y || grad_log_weights) {
    const weighted_sums_layout<T> sums(layout.keys_pieces, layout.by_key, batch, m, d);
    weighted_sums<T>(layout.by_key, sums, batch, [&](std::int64_t b) {
      weighted_sum_task<T> task{};
      task.x = matrix_at<const T>(y, shape.offset(y, 2, b));
      task.n = m;
      task.y = matrix_at<const T>(x, shape.offset(x, 2, b));
      task.m = n;
      task.depth = d;
      task.row_offset = layout.log_weights + b * m;
      task.column_offset = layout.minus_log_z + b * n;
      task.gamma = layout.grad + b * n;
      task.excluded = exclusions;
      if (grad_y) task.out = matrix_at<T>(*grad_y, shape.offset(*grad_y, 2, b));
      if (grad_log_weights) {
        task.total = vector_at<T>(*grad_log_weights, shape.offset(*grad_log_weights, 1, b));
      }
      return task;
    });
  }
  mark_infinite_rows<T>(shape, x, y, log_weights, excluded, log_z, grad_x, grad_y,
                        grad_log_weights);
}

}  // namespace

std::size_t log_normalizer_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                     std::int64_t d, std::int64_t itemsize) {
  workspace_layout workspace;
  const split cut(batch, n, m);
  if (itemsize == 4) {
    log_normalizer_layout<float>(workspace, cut, batch, n, d);
  } else {
    log_normalizer_layout<double>(workspace, cut, batch, n, d);
  }
  return workspace.size();
}

void log_normalizer(const array_view& x, const array_view& y, const array_view* log_weights,
                    const array_view* excluded, const array_view& out,
                    const array_view& workspace) {
  const batch_shape shape = check_log_normalizer(x, y, log_weights, excluded, out);
  (x.type == dtype::float32
       ? log_normalizer_as<float>
       : log_normalizer_as<double>)(shape, x, y, log_weights, excluded, out, workspace);
}

namespace {

template <class T>
std::size_t log_normalizer_vjp_size(std::int64_t batch, std::int64_t n, std::int64_t m,
                                    std::int64_t d) {
  workspace_layout workspace;
  log_normalizer_vjp_layout<T> layout(workspace, batch, n, m, d);
  weighted_sums_layout<T>(layout.queries_pieces, layout.by_query, batch, n, d);
  weighted_sums_layout<T>(layout.keys_pieces, layout.by_key, batch, m, d);
  return std::max(layout.queries_pieces.size(), layout.keys_pieces.size());
}

}  // namespace

std::size_t log_normalizer_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                         std::int64_t d, std::int64_t itemsize) {
  return (itemsize == 4 ? log_normalizer_vjp_size<float>
                        : log_normalizer_vjp_size<double>)(batch, n, m, d);
}

void log_normalizer_vjp(const array_view& grad, const array_view& x, const array_view& y,
                        const array_view* log_weights, const array_view* excluded,
                        const array_view& log_z, const array_view* grad_x, const array_view* grad_y,
                        const array_view* grad_log_weights, const array_view& workspace) {
  const batch_shape shape = check_log_normalizer_vjp(grad, x, y, log_weights, excluded, log_z,
                                                     grad_x, grad_y, grad_log_weights);
  (x.type == dtype::float32 ? log_normalizer_vjp_as<float>
                            : log_normalizer_vjp_as<double>)(shape, grad, x, y, log_weights,
                                                             excluded, log_z, grad_x, grad_y,
                                                             grad_log_weights, workspace);
}

}  // namespace subquad::core
