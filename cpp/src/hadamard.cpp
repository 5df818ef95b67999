#include "arguments.hpp"
#include "features_checks.hpp"
#include "features_core.hpp"
#include "isa.hpp"
#include "kernels/hadamard_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(hadamard)

namespace subquad::core {
namespace {

template <class T>
const hadamard_functions<T>& functions();
template <>
const hadamard_functions<float>& functions() {
  return hadamard_table().f32;
}
template <>
const hadamard_functions<double>& functions() {
  return hadamard_table().f64;
}

// Bytes that a task transforms at once: they stay in the second-level cache.
constexpr std::int64_t kTaskBytes = 64 << 10;
// Longer rows are transformed in parts of kTaskBytes, then across up to this many of those: each is
// one pass over memory.
constexpr std::int64_t kParts = 64;
constexpr std::int64_t kColumns = 512;  // of a task across parts
constexpr std::int64_t kManyRows = 8;   // long rows from which on each is one task

template <class T>
struct hadamard_layout {
  std::int64_t part;           // of a row
  std::int64_t rows_per_task;  // where a row is one part
  T* whole;                    // one row, where it is longer than a part
  workspace_layout::slots slots;

  hadamard_layout(workspace_layout& workspace, std::int64_t batch, std::int64_t d) {
    const std::int64_t most = kTaskBytes / static_cast<std::int64_t>(sizeof(T));
    part = std::min(d, most);
    rows_per_task = most / part;
    whole = workspace.take<T>(part < d ? d : 0);
    std::size_t bytes = functions<T>().rows_scratch(part);
    if (part < d) bytes = std::max(bytes, functions<T>().columns_scratch(kParts, kColumns));
    slots = workspace.take_slots(
        bytes, part < d ? std::max<std::int64_t>(1, batch) * (d / std::min(part, kColumns))
                        : divide_up(batch, rows_per_task));
  }
};

// A row that is longer than a part, in contiguous memory: for_each(count, body) calls body(index,
// slot) for every index in [0, count), in any order.
template <class T, class F>
void transform_long(vector_view<const T> x, T* out, std::int64_t d,
                    const hadamard_layout<T>& layout, F&& for_each) {
  const auto& kernels = functions<T>();
  const std::int64_t part = layout.part;
  for_each(d / part, [&](std::int64_t index, int slot) {
    const vector_view<const T> from = x.from(index * part);
    kernels.rows({{from.data, part * from.stride, from.stride},
                  {out + index * part, part, 1},
                  1,
                  part,
                  layout.slots[slot]});
  });
  for (std::int64_t size = part; size < d;) {
    const std::int64_t parts = std::min(kParts, d / size);
    const std::int64_t strips = size / kColumns;
    for_each(d / (size * parts) * strips, [&](std::int64_t index, int slot) {
      T* data = out + index / strips * size * parts + index % strips * kColumns;
      kernels.columns({data, parts, size, kColumns, layout.slots[slot]});
    });
    size *= parts;
  }
}

// Whether the rows of the whole batch follow each other at one distance.
bool is_even(const batch_shape& shape, const array_view& array) {
  std::int64_t expected = shape.rank() > 0 ? shape.stride(array, 1, 0) : 0;
  for (std::int32_t i = 1; i < shape.rank(); ++i) {
    expected *= shape.length(i - 1);
    if (shape.length(i) != 1 && shape.stride(array, 1, i) != expected) return false;
  }
  return true;
}

template <class T>
void transform_as(const array_view& x, const array_view& out, const batch_shape& shape,
                  const array_view& workspace) {
  const std::int64_t d = length_from_end(x, 1);
  const std::int64_t batch = shape.count();
  workspace_layout pieces(workspace);
  const hadamard_layout<T> layout(pieces, batch, d);
  // Memory is what it costs: 8 multiply-adds for an element moved.
  const int threads =
      threads_for(8 * static_cast<double>(batch) * static_cast<double>(d), layout.slots.count);
  const auto x_at = [&](std::int64_t b) { return vector_at<const T>(x, shape.offset(x, 1, b)); };
  const auto out_at = [&](std::int64_t b) { return vector_at<T>(out, shape.offset(out, 1, b)); };

  if (layout.part < d && batch >= kManyRows && out_at(0).stride == 1) {
    parallel_for(batch, threads, [&](std::int64_t b, int slot) {
      transform_long<T>(x_at(b), out_at(b).data, d, layout, [&](std::int64_t count, auto&& body) {
        for (std::int64_t index = 0; index < count; ++index) body(index, slot);
      });
    });
    return;
  }
  if (layout.part < d) {
    const auto for_each = [&](std::int64_t count, auto&& body) {
      parallel_for(count, threads, body);
    };
    for (std::int64_t b = 0; b < batch; ++b) {
      const vector_view<T> to = out_at(b);
      T* row = to.stride == 1 ? to.data : layout.whole;
      transform_long<T>(x_at(b), row, d, layout, for_each);
      if (row == to.data) continue;
      for_each(d / layout.part, [&](std::int64_t index, int) {
        for (std::int64_t i = index * layout.part; i < (index + 1) * layout.part; ++i) {
          to[i] = row[i];
        }
      });
    }
    return;
  }
  // Rows of which the kernel takes many at once.
  const std::int64_t run = shape.rank() == 0                          ? 1
                           : is_even(shape, x) && is_even(shape, out) ? batch
                                                                      : shape.length(0);
  const std::int64_t x_step = shape.rank() > 0 ? shape.stride(x, 1, 0) : 0;
  const std::int64_t out_step = shape.rank() > 0 ? shape.stride(out, 1, 0) : 0;
  parallel_for(divide_up(batch, layout.rows_per_task), threads, [&](std::int64_t index, int slot) {
    const std::int64_t end = std::min(batch, (index + 1) * layout.rows_per_task);
    for (std::int64_t b = index * layout.rows_per_task; b < end;) {
      const std::int64_t n = std::min(run - b % run, end - b);
      const vector_view<const T> from = x_at(b);
      const vector_view<T> to = out_at(b);
      functions<T>().rows({{from.data, x_step, from.stride},
                           {to.data, out_step, to.stride},
                           n,
                           d,
                           layout.slots[slot]});
      b += n;
    }
  });
}

template <class T>
std::size_t workspace_of(std::int64_t batch, std::int64_t d) {
  workspace_layout workspace;
  const hadamard_layout<T> layout(workspace, batch, d);
  return workspace.size();
}

}  // namespace

std::size_t hadamard_transform_workspace(std::int64_t batch, std::int64_t d,
                                         std::int64_t itemsize) {
  d = std::max<std::int64_t>(1, d);
  return itemsize == 4 ? workspace_of<float>(batch, d) : workspace_of<double>(batch, d);
}

void hadamard_transform(const array_view& x, const array_view& out, const array_view& workspace) {
  const batch_shape shape = check_hadamard_transform(x, out);
  if (shape.count() == 0) return;
  (x.type == dtype::float32 ? transform_as<float> : transform_as<double>)(x, out, shape, workspace);
}

}  // namespace subquad::core
