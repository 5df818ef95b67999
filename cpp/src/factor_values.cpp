#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "arguments.hpp"
#include "factors_checks.hpp"
#include "factors_core.hpp"
#include "isa.hpp"
#include "kernels/factor_values_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(factor_values)

namespace subquad::core {
namespace {

template <class T>
const factor_values_functions<T>& functions();
template <>
const factor_values_functions<float>& functions() {
  return factor_values_table().f32;
}
template <>
const factor_values_functions<double>& functions() {
  return factor_values_table().f64;
}

constexpr std::int64_t kBlockRows = 128;  // a multiple of what the kernels take at a time

// Multiply-adds a row, a gelu counting as sixteen.
double row_work(const network_sizes& size) {
  return static_cast<double>(size.n_factors) * static_cast<double>(size.h + 1) *
         static_cast<double>(size.d + size.k + 16);
}

factor_network_sizes kernel_sizes(const network_sizes& size) {
  return {size.n_factors, size.d, size.h, size.k};
}

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The networks of one index of the batch.
struct network_arrays {
  const array_view& weight_in;
  const array_view& bias_in;
  const array_view& weight_out;
  const array_view* bias_out;
};

struct network_offsets {
  std::int64_t weight_in;
  std::int64_t bias_in;
  std::int64_t weight_out;
  std::int64_t bias_out;

  network_offsets(const batch_shape& shape, const network_arrays& arrays, std::int64_t b)
      : weight_in(shape.offset(arrays.weight_in, 3, b)),
        bias_in(shape.offset(arrays.bias_in, 2, b)),
        weight_out(shape.offset(arrays.weight_out, 3, b)),
        bias_out(arrays.bias_out ? shape.offset(*arrays.bias_out, 2, b) : 0) {}

  friend bool operator==(const network_offsets& a, const network_offsets& b) {
    return a.weight_in == b.weight_in && a.bias_in == b.bias_in && a.weight_out == b.weight_out &&
           a.bias_out == b.bias_out;
  }
};

struct held_networks {
  network_offsets offsets;
  bool packed;
};

// Memory of the slots: which networks are packed, these, then scratch. Tasks of one set of weights,
// which the batch may share, pack it once a thread.
template <class T>
struct slots_layout {
  std::size_t packed_bytes;
  workspace_layout::slots slots;

  slots_layout(workspace_layout& workspace, const network_sizes& size, bool reverse,
               std::int64_t tasks) {
    const auto& kernels = functions<T>();
    const factor_network_sizes sizes = kernel_sizes(size);
    packed_bytes = aligned(sizeof(held_networks)) +
                   aligned((reverse ? kernels.packed_reverse : kernels.packed)(sizes));
    slots = workspace.take_slots(
        packed_bytes + (reverse ? kernels.reverse_scratch : kernels.scratch)(sizes), tasks);
  }

  void forget() const {
    for (int slot = 0; slot < slots.count; ++slot) {
      static_cast<held_networks*>(slots[slot])->packed = false;
    }
  }

  // The networks of batch index b, packed.
  factor_networks_task<T> networks(const factor_networks& call, const network_arrays& arrays,
                                   bool reverse, std::int64_t b, int slot) const {
    auto& held = *static_cast<held_networks*>(slots[slot]);
    const network_offsets at(call.shape, arrays, b);
    factor_networks_task<T> task{};
    task.size = kernel_sizes(call.size);
    task.weight_in = stack_at<const T>(arrays.weight_in, at.weight_in);
    task.bias_in = matrix_at<const T>(arrays.bias_in, at.bias_in);
    task.weight_out = stack_at<const T>(arrays.weight_out, at.weight_out);
    if (arrays.bias_out) task.bias_out = matrix_at<const T>(*arrays.bias_out, at.bias_out);
    task.packed = static_cast<char*>(slots[slot]) + aligned(sizeof(held_networks));
    if (!held.packed || !(held.offsets == at)) {
      (reverse ? functions<T>().pack_reverse : functions<T>().pack)(task);
      held.offsets = at;
      held.packed = true;
    }
    return task;
  }

  void* scratch(int slot) const { return static_cast<char*>(slots[slot]) + packed_bytes; }
};

// Rows of a task of the forward direction, from the shapes alone.
std::int64_t rows_of_task(const network_sizes& size) {
  const double rows = 4e6 / row_work(size);
  return std::clamp<std::int64_t>(
      static_cast<std::int64_t>(std::min(rows, 4096.0)) / kBlockRows * kBlockRows, kBlockRows,
      4096);
}

template <class T>
void values_as(const factor_networks& call, const array_view& x, const network_arrays& arrays,
               const array_view& out, const array_view& workspace) {
  const std::int64_t rows = rows_of_task(call.size);
  const std::int64_t row_tasks = divide_up(call.size.n, rows);
  const std::int64_t tasks = call.size.batch * row_tasks;
  workspace_layout pieces(workspace);
  const slots_layout<T> layout(pieces, call.size, false, tasks);
  layout.forget();
  const double work =
      row_work(call.size) * static_cast<double>(call.size.batch) * static_cast<double>(call.size.n);
  parallel_for(tasks, threads_for(work, layout.slots.count), [&](std::int64_t index, int slot) {
    const std::int64_t b = index / row_tasks;
    const std::int64_t first = index % row_tasks * rows;
    factor_values_task<T> task{};
    task.networks = layout.networks(call, arrays, false, b, slot);
    task.x = matrix_at<const T>(x, call.shape.offset(x, 2, b)).from(first);
    task.n = std::min(rows, call.size.n - first);
    task.out = stack_at<T>(out, call.shape.offset(out, 3, b));
    task.out.data += first * task.out.row_stride;
    task.scratch = layout.scratch(slot);
    functions<T>().values(task);
  });
}

// How the reverse sums over rows: units of rows, each with partial sums of its own, which are then
// added in the order of the units. All of it follows from the shapes. Units are parts of sequences,
// or whole sequences of a run, in which all weights are shared.
struct unit_split {
  static constexpr std::int64_t kLeastRows = 512;
  static constexpr std::int64_t kPartials = 64;

  std::int64_t rows;       // of a unit that is a part of a sequence
  std::int64_t parts;      // of a sequence
  std::int64_t sequences;  // of a unit of whole ones
  std::int64_t partials;   // in memory

  explicit unit_split(const network_sizes& size) {
    const std::int64_t n = std::max<std::int64_t>(size.n, 1);
    const std::int64_t wanted = std::max(kLeastRows, divide_up(size.batch * n, kPartials));
    parts = n > wanted ? n / wanted : 1;
    rows = divide_up(divide_up(n, parts), kBlockRows) * kBlockRows;
    parts = divide_up(n, rows);
    sequences = std::max<std::int64_t>(wanted / n, 1);
    partials = std::clamp<std::int64_t>(size.batch * parts, 1, kPartials);
  }
};

template <class T>
struct reverse_memory {
  unit_split cut;
  T* partials;
  slots_layout<T> slots;

  reverse_memory(workspace_layout& pieces, const network_sizes& size)
      : cut(size),
        partials(pieces.take<T>(cut.partials *
                                functions<T>().place_sums(kernel_sizes(size), nullptr).size)),
        slots(pieces, size, true, cut.partials) {}
};

// Sequences of the batch that share all weights, one after another.
std::int64_t run_length(const batch_shape& shape, std::initializer_list<const array_view*> weights,
                        std::initializer_list<std::int32_t> cores) {
  std::int64_t length = 1;
  for (std::int32_t i = 0; i < shape.rank(); ++i) {
    auto core = cores.begin();
    for (const array_view* array : weights) {
      const std::int32_t axis = array ? array->ndim - *core - 1 - i : -1;
      if (axis >= 0 && array->shape[axis] != 1) return length;
      ++core;
    }
    length *= shape.length(i);
  }
  return length;
}

struct reverse_outputs {
  const array_view* x;
  const array_view* weight_in;
  const array_view* bias_in;
  const array_view* weight_out;
  const array_view* bias_out;
};

template <class T>
void set_to_zero(const array_view* array) {
  if (array == nullptr) return;
  std::int64_t count = 1;
  for (std::int32_t i = 0; i < array->ndim; ++i) count *= array->shape[i];
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t rest = i;
    std::int64_t offset = 0;
    for (std::int32_t axis = array->ndim - 1; axis >= 0; --axis) {
      offset += rest % array->shape[axis] * array->strides[axis];
      rest /= array->shape[axis];
    }
    static_cast<T*>(array->data)[offset] = T(0);
  }
}

// Adds to row[j] the sum over units, in their order and in double, of from[u * unit_stride + j].
template <class T>
void add_units(const T* from, std::int64_t units, std::int64_t unit_stride, std::int64_t count,
               vector_view<T> row) {
  constexpr std::int64_t kPart = 64;
  for (std::int64_t first = 0; first < count; first += kPart) {
    const std::int64_t part = std::min(kPart, count - first);
    double sums[kPart] = {};
    for (std::int64_t u = 0; u < units; ++u) {
      const T* values = from + u * unit_stride + first;
      for (std::int64_t j = 0; j < part; ++j) sums[j] += static_cast<double>(values[j]);
    }
    for (std::int64_t j = 0; j < part; ++j) {
      T& element = row[first + j];
      element = static_cast<T>(static_cast<double>(element) + sums[j]);
    }
  }
}

// The same for a matrix (h, columns), from the kernels' layout.
template <class T>
void add_unit_matrices(const factor_network_sums<T>& sums, const T* from, std::int64_t units,
                       std::int64_t h, std::int64_t columns, matrix_view<T> to) {
  for (std::int64_t c = 0; c < columns; c += sums.panel) {
    const std::int64_t width =
        std::min(sums.panel, divide_up(columns - c, sums.lanes) * sums.lanes);
    const std::int64_t count = std::min(sums.panel, columns - c);
    for (std::int64_t j = 0; j < h; ++j) {
      add_units<T>(from + c * sums.h_padded + j * width, units, sums.size, count,
                   {&to(j, c), to.column_stride});
    }
  }
}

template <class T>
vector_view<T> row_of(const array_view& array, std::int64_t offset, std::int64_t i) {
  const matrix_view<T> matrix = matrix_at<T>(array, offset);
  return {matrix.data + i * matrix.row_stride, matrix.column_stride};
}

// Adds the partial sums of factor m of units that share their weights to the gradients.
template <class T>
void add_partials(const factor_networks& call, const reverse_outputs& outputs, std::int64_t b,
                  const factor_network_sums<T>& sums, std::int64_t units, std::int64_t m) {
  const network_sizes& size = call.size;
  if (outputs.weight_in) {
    const matrix_view<T> to =
        stack_at<T>(*outputs.weight_in, call.shape.offset(*outputs.weight_in, 3, b))[m];
    add_unit_matrices<T>(sums, sums.weight_in + m * sums.in_size, units, size.h, size.d, to);
  }
  if (outputs.weight_out) {
    const matrix_view<T> to =
        stack_at<T>(*outputs.weight_out, call.shape.offset(*outputs.weight_out, 3, b))[m];
    add_unit_matrices<T>(sums, sums.weight_out + m * sums.out_size, units, size.h, size.k,
                         {to.data, to.column_stride, to.row_stride});
  }
  if (outputs.bias_in) {
    add_units<T>(sums.bias_in + m * size.h, units, sums.size, size.h,
                 row_of<T>(*outputs.bias_in, call.shape.offset(*outputs.bias_in, 2, b), m));
  }
  if (outputs.bias_out) {
    add_units<T>(sums.bias_out + m * size.k, units, sums.size, size.k,
                 row_of<T>(*outputs.bias_out, call.shape.offset(*outputs.bias_out, 2, b), m));
  }
}

template <class T>
void reverse_as(const factor_networks& call, const array_view& grad, const array_view& x,
                const network_arrays& arrays, const reverse_outputs& outputs,
                const array_view& workspace) {
  const network_sizes& size = call.size;
  set_to_zero<T>(outputs.weight_in);
  set_to_zero<T>(outputs.bias_in);
  set_to_zero<T>(outputs.weight_out);
  set_to_zero<T>(outputs.bias_out);
  if (size.batch * size.n == 0) return;
  workspace_layout pieces(workspace);
  const reverse_memory<T> memory(pieces, size);
  const unit_split& cut = memory.cut;
  const factor_network_sizes sizes = kernel_sizes(size);
  const std::int64_t sums_size = functions<T>().place_sums(sizes, nullptr).size;
  const std::int64_t run = run_length(
      call.shape, {&arrays.weight_in, &arrays.bias_in, &arrays.weight_out, outputs.bias_out},
      {3, 2, 3, 2});
  const std::int64_t sequences = cut.parts > 1 ? 1 : std::min(cut.sequences, run);
  const std::int64_t run_units = cut.parts > 1 ? run * cut.parts : divide_up(run, sequences);
  const std::int64_t units = size.batch / run * run_units;
  const factor_values_needs needs{outputs.weight_in != nullptr, outputs.bias_in != nullptr,
                                  outputs.weight_out != nullptr, outputs.bias_out != nullptr};
  const bool sums_needed = needs.weight_in || needs.bias_in || needs.weight_out || needs.bias_out;
  const double work =
      3 * row_work(size) * static_cast<double>(size.batch) * static_cast<double>(size.n);
  memory.slots.forget();
  for (std::int64_t start = 0; start < units; start += cut.partials) {
    const std::int64_t count = std::min(cut.partials, units - start);
    parallel_for(
        count, threads_for(work, memory.slots.slots.count), [&](std::int64_t index, int slot) {
          const std::int64_t unit = start + index;
          const std::int64_t in_run = unit % run_units;
          factor_values_reverse_task<T> task{};
          task.needs = needs;
          task.sums = functions<T>().place_sums(sizes, memory.partials + index * sums_size);
          task.scratch = memory.slots.scratch(slot);
          const std::int64_t first_row = cut.parts > 1 ? in_run % cut.parts * cut.rows : 0;
          task.n = std::min(cut.parts > 1 ? cut.rows : size.n, size.n - first_row);
          const std::int64_t first = cut.parts > 1 ? in_run / cut.parts : in_run * sequences;
          for (std::int64_t s = first; s < std::min(first + sequences, run); ++s) {
            const std::int64_t b = unit / run_units * run + s;
            task.first = s == first;
            task.networks = memory.slots.networks(call, arrays, true, b, slot);
            task.grad = stack_at<const T>(grad, call.shape.offset(grad, 3, b));
            task.grad.data += first_row * task.grad.row_stride;
            task.x = matrix_at<const T>(x, call.shape.offset(x, 2, b)).from(first_row);
            if (outputs.x) {
              task.grad_x =
                  matrix_at<T>(*outputs.x, call.shape.offset(*outputs.x, 2, b)).from(first_row);
            }
            functions<T>().reverse(task);
          }
        });
    if (!sums_needed) continue;
    const double sum_work = static_cast<double>(sums_size) * static_cast<double>(count);
    parallel_for(
        size.n_factors, threads_for(sum_work, memory.slots.slots.count), [&](std::int64_t m, int) {
          for (std::int64_t u = 0; u < count;) {
            const std::int64_t of_run = (start + u) / run_units;
            const std::int64_t alike = std::min(count - u, (of_run + 1) * run_units - (start + u));
            add_partials<T>(call, outputs, of_run * run,
                            functions<T>().place_sums(sizes, memory.partials + u * sums_size),
                            alike, m);
            u += alike;
          }
        });
  }
}

template <class T>
std::size_t workspace_of(const network_sizes& size, bool reverse) {
  workspace_layout pieces;
  if (reverse) {
    reverse_memory<T>(pieces, size);
  } else {
    slots_layout<T>(pieces, size, false, size.batch * divide_up(size.n, rows_of_task(size)));
  }
  return pieces.size();
}

}  // namespace

std::size_t factor_values_workspace(std::int64_t batch, std::int64_t n_factors, std::int64_t n,
                                    std::int64_t d, std::int64_t h, std::int64_t k,
                                    std::int64_t itemsize) {
  const network_sizes size{batch, n_factors, n, d, h, k};
  return itemsize == 4 ? workspace_of<float>(size, false) : workspace_of<double>(size, false);
}

void factor_values(const array_view& x, const array_view& weight_in, const array_view& bias_in,
                   const array_view& weight_out, const array_view& bias_out, const array_view& out,
                   const array_view& workspace) {
  const factor_networks call =
      check_factor_values(x, weight_in, bias_in, weight_out, bias_out, out);
  const network_sizes& size = call.size;
  if (size.batch * size.n_factors * size.n * size.k == 0) return;
  const network_arrays arrays{weight_in, bias_in, weight_out, &bias_out};
  (x.type == dtype::float32 ? values_as<float> : values_as<double>)(call, x, arrays, out,
                                                                    workspace);
}

std::size_t factor_values_vjp_workspace(std::int64_t batch, std::int64_t n_factors, std::int64_t n,
                                        std::int64_t d, std::int64_t h, std::int64_t k,
                                        std::int64_t itemsize) {
  const network_sizes size{batch, n_factors, n, d, h, k};
  return itemsize == 4 ? workspace_of<float>(size, true) : workspace_of<double>(size, true);
}

void factor_values_vjp(const array_view& grad, const array_view& x, const array_view& weight_in,
                       const array_view& bias_in, const array_view& weight_out,
                       const array_view* grad_x, const array_view* grad_weight_in,
                       const array_view* grad_bias_in, const array_view* grad_weight_out,
                       const array_view* grad_bias_out, const array_view& workspace) {
  const factor_networks call =
      check_factor_values_vjp(grad, x, weight_in, bias_in, weight_out, grad_x, grad_weight_in,
                              grad_bias_in, grad_weight_out, grad_bias_out);
  const network_arrays arrays{weight_in, bias_in, weight_out, nullptr};
  const reverse_outputs outputs{grad_x, grad_weight_in, grad_bias_in, grad_weight_out,
                                grad_bias_out};
  (x.type == dtype::float32 ? reverse_as<float> : reverse_as<double>)(call, grad, x, arrays,
                                                                      outputs, workspace);
}

}  // namespace subquad::core
