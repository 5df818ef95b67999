#include "arguments.hpp"
#include "features_checks.hpp"
#include "features_core.hpp"
#include "isa.hpp"
#include "kernels/features_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(features)

namespace subquad::core {
namespace {

template <class T>
const features_functions<T>& functions();
template <>
const features_functions<float>& functions() {
  return features_table().f32;
}
template <>
const features_functions<double>& functions() {
  return features_table().f64;
}

// Rows of a task, from the shapes alone: what a task packs of its rows, 12 at a time, takes 64 KiB
// beside a projection in the second-level cache.
struct row_split {
  std::int64_t rows;
  std::int64_t row_tasks;

  row_split(const feature_sizes& size, std::int64_t itemsize) {
    const std::int64_t wide = std::max<std::int64_t>(1, size.d) * itemsize;
    rows = std::clamp<std::int64_t>((64 << 10) / wide / 12 * 12, 48, 384);
    row_tasks = std::max<std::int64_t>(1, divide_up(size.n, rows));
  }
};

// Bytes of output that no cache keeps until it is read.
constexpr double kCaches = 32 << 20;

double work_of(const feature_sizes& size) {
  return static_cast<double>(size.batch) * static_cast<double>(size.n) *
         static_cast<double>(size.m + size.r) * static_cast<double>(size.d + 8);
}

// Where the arrays of a map start for one index of the batch. Each slot keeps the last map that it
// packed: tasks of one map, which the batch may share, pack it once a thread.
struct map_offsets {
  std::int64_t projection;
  std::int64_t bias;
  std::int64_t diagonal;
  std::int64_t factor;
  std::int64_t shift;
  std::int64_t linear;

  map_offsets(const feature_map& map, std::int64_t b) {
    const auto of = [&](const array_view* array, std::int32_t core) {
      return array ? map.shape.offset(*array, core, b) : 0;
    };
    projection = of(&map.projection, 2);
    bias = of(map.bias, 1);
    diagonal = of(map.diagonal, 1);
    factor = of(map.factor, 2);
    shift = of(map.shift, 1);
    linear = of(map.linear, 1);
  }

  friend bool operator==(const map_offsets& a, const map_offsets& b) {
    return a.projection == b.projection && a.bias == b.bias && a.diagonal == b.diagonal &&
           a.factor == b.factor && a.shift == b.shift && a.linear == b.linear;
  }
};

template <class T>
feature_map_task<T> map_task(const feature_map& map, const map_offsets& at, void* packed) {
  feature_map_task<T> task{};
  task.projection = matrix_at<const T>(map.projection, at.projection);
  task.m = map.size.m;
  task.depth = map.size.d;
  if (map.bias) task.bias = vector_at<const T>(*map.bias, at.bias);
  if (map.diagonal) task.diagonal = vector_at<const T>(*map.diagonal, at.diagonal);
  if (map.factor) task.factor = matrix_at<const T>(*map.factor, at.factor);
  task.rank = map.size.r;
  if (map.shift) task.shift = vector_at<const T>(*map.shift, at.shift);
  if (map.linear) task.linear = vector_at<const T>(*map.linear, at.linear);
  task.packed = packed;
  return task;
}

struct held_map {
  map_offsets offsets;
  bool packed;
};

// Memory of the slots: a packed map, then scratch.
template <class T>
struct slots_layout {
  std::size_t packed_bytes;
  workspace_layout::slots slots;

  slots_layout(workspace_layout& workspace, const feature_sizes& size, bool reverse) {
    const auto& kernels = functions<T>();
    const row_split cut(size, sizeof(T));
    const std::int64_t rows = std::min(cut.rows, size.n);
    const auto aligned = [](std::size_t bytes) { return (bytes + 63) / 64 * 64; };
    packed_bytes =
        aligned(sizeof(held_map)) +
        aligned((reverse ? kernels.packed_reverse : kernels.packed_map)(size.m, size.d, size.r));
    const std::size_t scratch = reverse ? kernels.reverse_scratch(rows, size.m, size.d)
                                        : kernels.features_scratch(rows, size.m, size.d);
    slots = workspace.take_slots(packed_bytes + scratch, size.batch * cut.row_tasks);
  }
};

// Calls body(batch index, first row, rows, map, scratch) for all rows, the map packed.
template <class T, class F>
void for_each_rows(const feature_map& map, bool reverse, const array_view& workspace, F&& body) {
  workspace_layout pieces(workspace);
  const slots_layout<T> layout(pieces, map.size, reverse);
  const row_split cut(map.size, sizeof(T));
  const auto header = [&](int slot) { return static_cast<held_map*>(layout.slots[slot]); };
  for (int slot = 0; slot < layout.slots.count; ++slot) header(slot)->packed = false;
  const auto pack = reverse ? functions<T>().pack_reverse : functions<T>().pack;
  parallel_for(map.size.batch * cut.row_tasks, threads_for(work_of(map.size), layout.slots.count),
               [&](std::int64_t index, int slot) {
                 const std::int64_t b = index / cut.row_tasks;
                 const std::int64_t first = index % cut.row_tasks * cut.rows;
                 held_map& held = *header(slot);
                 char* memory = static_cast<char*>(layout.slots[slot]);
                 const map_offsets at(map, b);
                 const feature_map_task<T> task =
                     map_task<T>(map, at, memory + (sizeof(held_map) + 63) / 64 * 64);
                 if (!held.packed || !(held.offsets == at)) {
                   pack(task);
                   held.offsets = at;
                   held.packed = true;
                 }
                 body(b, first, std::min(cut.rows, map.size.n - first), task,
                      memory + layout.packed_bytes);
               });
}

template <class T>
void features_as(const feature_map& map, bool pairs, feature_values values, const array_view& out,
                 const array_view& workspace) {
  const bool beyond_caches = static_cast<double>(map.size.batch) * static_cast<double>(map.size.n) *
                                 static_cast<double>(pairs ? 2 * map.size.m : map.size.m) *
                                 sizeof(T) >
                             kCaches;
  for_each_rows<T>(
      map, false, workspace,
      [&](std::int64_t b, std::int64_t first, std::int64_t rows, const feature_map_task<T>& packed,
          void* scratch) {
        functions<T>().features(
            {packed, matrix_at<const T>(map.x, map.shape.offset(map.x, 2, b)).from(first), rows,
             pairs, values, beyond_caches,
             matrix_at<T>(out, map.shape.offset(out, 2, b)).from(first), scratch});
      });
}

template <class T>
void reverse_as(const feature_map& map, const array_view& grad, bool pairs,
                const array_view& grad_x, const array_view& workspace) {
  for_each_rows<T>(
      map, true, workspace,
      [&](std::int64_t b, std::int64_t first, std::int64_t rows, const feature_map_task<T>& packed,
          void* scratch) {
        functions<T>().reverse(
            {packed, matrix_at<const T>(grad, map.shape.offset(grad, 2, b)).from(first),
             matrix_at<const T>(map.x, map.shape.offset(map.x, 2, b)).from(first), rows, pairs,
             matrix_at<T>(grad_x, map.shape.offset(grad_x, 2, b)).from(first), scratch});
      });
}

std::size_t workspace_of(const feature_sizes& size, std::int64_t itemsize, bool reverse) {
  workspace_layout workspace;
  if (itemsize == 4) {
    slots_layout<float>(workspace, size, reverse);
  } else {
    slots_layout<double>(workspace, size, reverse);
  }
  return workspace.size();
}

void run_features(const feature_map& map, bool pairs, feature_values values, const array_view& out,
                  const array_view& workspace) {
  if (map.size.batch * map.size.n * map.size.m == 0) return;
  (map.x.type == dtype::float32 ? features_as<float> : features_as<double>)(map, pairs, values, out,
                                                                            workspace);
}

}  // namespace

std::size_t log_features_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                   std::int64_t d, std::int64_t r, std::int64_t itemsize) {
  return workspace_of({batch, n, m, d, r}, itemsize, false);
}

void log_features(const array_view& x, const array_view& projection, const array_view& bias,
                  const array_view* diagonal, const array_view* factor, const array_view* shift,
                  const array_view* linear, bool antithetic, bool exponentiate,
                  const array_view& out, const array_view& workspace) {
  const feature_map map =
      check_features(x, projection, &bias, diagonal, factor, shift, linear, antithetic, out, "out");
  run_features(map, antithetic,
               exponentiate ? feature_values::exponentials : feature_values::logarithms, out,
               workspace);
}

std::size_t log_features_vjp_workspace(std::int64_t batch, std::int64_t n, std::int64_t m,
                                       std::int64_t d, std::int64_t r, std::int64_t itemsize) {
  return workspace_of({batch, n, m, d, r}, itemsize, true);
}

void log_features_vjp(const array_view& grad, const array_view& x, const array_view& projection,
                      const array_view* diagonal, const array_view* factor, const array_view* shift,
                      const array_view* linear, bool antithetic, const array_view& grad_x,
                      const array_view& workspace) {
  const feature_map map = check_log_features_vjp(grad, x, projection, diagonal, factor, shift,
                                                 linear, antithetic, grad_x);
  if (map.size.batch * map.size.n * map.size.d == 0) return;
  (x.type == dtype::float32 ? reverse_as<float> : reverse_as<double>)(map, grad, antithetic, grad_x,
                                                                      workspace);
}

void trigonometric_features(const array_view& x, const array_view& projection,
                            const array_view& bias, const array_view* diagonal,
                            const array_view* factor, const array_view* shift,
                            const array_view* linear, const array_view& out,
                            const array_view& workspace) {
  const feature_map map =
      check_features(x, projection, &bias, diagonal, factor, shift, linear, true, out, "out");
  run_features(map, true, feature_values::waves, out, workspace);
}

}  // namespace subquad::core
