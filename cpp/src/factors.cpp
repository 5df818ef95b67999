#include "factors_core.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "arguments.hpp"
#include "factors_checks.hpp"
#include "isa.hpp"
#include "kernels/factors_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(factors)

namespace subquad::core {
namespace {

template <class T>
const factors_functions<T>& functions();
template <>
const factors_functions<float>& functions() {
  return factors_table().f32;
}
template <>
const factors_functions<double>& functions() {
  return factors_table().f64;
}

// Rows in memory of our own start on a line of the cache: they hold whole vectors at every level.
constexpr std::int64_t kLine = 64;

std::int64_t padded_length(std::int64_t d, std::int64_t itemsize) {
  const std::int64_t items = kLine / itemsize;
  return divide_up(d, items) * items;
}

// Channels of a tile: a row fills four lines. Fewer leave more of the rows that are near in the
// first-level cache, more take fewer visits to the values; two and four measure alike, so that few
// tiles are halved for the sake of threads. Tiles of intermediates are not: parts of their rows
// would share sets of the caches. From the shapes alone.
std::int64_t tile_width(std::int64_t batch, std::int64_t d, std::int64_t itemsize, bool keeps) {
  const std::int64_t whole = 4 * kLine / itemsize;
  const bool halves = !keeps && batch * divide_up(d, whole) < 4;
  return std::min(halves ? whole / 2 : whole, padded_length(d, itemsize));
}

// float32, or else float64: the size is the caller's to tell.
std::int64_t known_itemsize(std::int64_t itemsize) { return itemsize == 4 ? 4 : 8; }

// Multiply-adds.
double work_of(std::int64_t n, std::int64_t k, std::int64_t d) {
  return static_cast<double>(n) * static_cast<double>(k + 1) * static_cast<double>(d);
}

// The sequences of a call: where each starts, then n.
struct sequence_starts {
  const std::int64_t* starts;
  std::int64_t count;

  sequence_starts(const array_view* segments, std::int64_t n, std::int64_t* memory)
      : starts(memory), count(0) {
    if (segments == nullptr) {
      memory[count++] = 0;
    } else {
      const auto ids = vector_at<const std::int64_t>(*segments, 0);
      for (std::int64_t i = 0; i < n; ++i) {
        if (i == 0 || ids[i] != ids[i - 1]) memory[count++] = i;
      }
    }
    memory[count] = n;
  }
};

template <class T>
struct call_of {
  const factor_chain& chain;
  sequence_starts sequences;
  const std::int64_t* offsets;
  residual_type residual;
  bool circular;
  bool transpose;
  bool beyond_caches;  // the intermediates at work are far larger than they are

  matrix_view<const T> values_of(const array_view& values, std::int64_t b, std::int64_t m) const {
    return stack_at<const T>(values, chain.shape.offset(values, 3, b))[m];
  }
  factor_pattern pattern(std::int64_t m, std::int64_t first, std::int64_t last,
                         void* scratch) const {
    return {offsets == nullptr ? nullptr : offsets + m * chain.size.k,
            chain.size.k,
            sequences.starts,
            sequences.count,
            circular,
            first,
            last,
            scratch};
  }
};

// Bytes of intermediates that no cache keeps until they are read.
constexpr double kCaches = 32 << 20;

template <class T>
bool are_beyond_caches(const product_sizes& size, std::int64_t elements) {
  return static_cast<double>(elements) * static_cast<double>(size.n_factors - 1) *
             static_cast<double>(size.n) * static_cast<double>(size.d) * sizeof(T) >
         kCaches;
}

// Rows that start on a line of the cache.
template <class T>
bool is_aligned(const matrix_view<T>& rows) {
  return reinterpret_cast<std::uintptr_t>(rows.data) % kLine == 0 &&
         rows.row_stride * static_cast<std::int64_t>(sizeof(T)) % kLine == 0;
}

// Rows that kernels may work on where they lie: `width` columns side by side, and those whole
// vectors.
template <class T>
bool is_direct(const matrix_view<T>& rows, std::int64_t width) {
  return rows.column_stride == 1 && width % functions<std::remove_const_t<T>>().lanes == 0;
}

template <class T>
void copy_rows(matrix_view<const T> from, std::int64_t first, std::int64_t last, std::int64_t width,
               std::int64_t padded, matrix_view<T> to) {
  for (std::int64_t i = first; i < last; ++i) {
    const T* source = &from(i, 0);
    T* target = &to(i, 0);
    if (from.column_stride == 1 && to.column_stride == 1) {
      std::copy(source, source + width, target);
    } else {
      for (std::int64_t c = 0; c < width; ++c) {
        target[c * to.column_stride] = source[c * from.column_stride];
      }
    }
    for (std::int64_t c = width; c < padded; ++c) target[c] = T(0);
  }
}

template <class T>
void add_rows(factor_rows<const T> a, factor_rows<const T> b, std::int64_t first, std::int64_t last,
              std::int64_t columns, factor_rows<T> to) {
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) to[i][c] = a[i][c] + b[i][c];
  }
}

template <class T>
factor_rows<const T> read_only(factor_rows<T> rows) {
  return {rows.data, rows.stride};
}

template <class T>
factor_rows<T> rows_of(const matrix_view<T>& matrix) {
  return {matrix.data, matrix.row_stride};
}

template <class T>
matrix_view<T> matrix_of(const factor_rows<T>& rows) {
  return {rows.data, rows.stride, 1};
}

// Channels [channel, channel + width) of one element of the batch, through all factors.
template <class T>
struct unit {
  matrix_view<const T> x;
  matrix_view<T> out;
  stack_view<T> intermediates;  // optional
  std::int64_t width;
};

constexpr int kUnitBuffers = 3;

// `each` as for_each_unit gives it.
template <class T, class Each>
void run_unit(const call_of<T>& call, const array_view& values, std::int64_t b, const unit<T>& u,
              T* buffers, Each&& each) {
  const product_sizes& size = call.chain.size;
  const std::int64_t lanes = functions<T>().lanes;
  const std::int64_t columns = divide_up(u.width, lanes) * lanes;
  const std::int64_t stride = padded_length(u.width, sizeof(T));
  factor_rows<T> buffer[kUnitBuffers];
  for (int i = 0; i < kUnitBuffers; ++i) buffer[i] = {buffers + i * size.n * stride, stride};
  if (size.n_factors == 0) {
    each([&](std::int64_t first, std::int64_t last, void*) {
      copy_rows<T>(u.x, first, last, u.width, 0, u.out);
    });
    return;
  }
  const bool sums = call.residual == residual_type::input && call.transpose;
  factor_rows<const T> x = rows_of(u.x);
  if (!is_direct(u.x, u.width)) {
    // Where all factors read it, or where the first may while it starts the sum in the last buffer.
    const factor_rows<T> copy = buffer[sums ? 1 : 2];
    x = read_only(copy);
    each([&](std::int64_t first, std::int64_t last, void*) {
      copy_rows<T>(u.x, first, last, u.width, columns, matrix_of(copy));
    });
  }
  factor_rows<const T> from = x;
  for (std::int64_t step = 0; step < size.n_factors; ++step) {
    const std::int64_t m = call.transpose ? size.n_factors - 1 - step : step;
    const bool is_last = step == size.n_factors - 1;
    matrix_view<T> target{};
    if (is_last) {
      target = u.out;
    } else if (u.intermediates) {
      target = u.intermediates[m];
    }
    const bool direct = target && is_direct(target, u.width);
    // What no cache keeps until it is read goes past them, and the next factor reads the buffer.
    const bool streams = direct && !is_last && call.beyond_caches && is_aligned(target);
    const factor_rows<T> to = direct && !streams ? rows_of(target) : buffer[step % 2];
    const factor_rows<T> copy = streams ? rows_of(target) : factor_rows<T>{};
    factor_rows<const T> addend{};
    if (call.residual == residual_type::step) {
      addend = from;
    } else if (call.residual == residual_type::input && !call.transpose) {
      addend = x;
    } else if (sums && is_last) {
      addend = step == 0 ? x : read_only(buffer[2]);
    }
    each([&](std::int64_t first, std::int64_t last, void* scratch) {
      functions<T>().product({call.pattern(m, first, last, scratch), call.transpose,
                              call.values_of(values, b, m), from, addend, to, copy, columns});
      if (target && !direct) {
        copy_rows<T>({to.data, to.stride, 1}, first, last, u.width, 0, target);
      }
      if (sums && !is_last) {
        add_rows<T>(step == 0 ? x : read_only(buffer[2]), read_only(to), first, last, columns,
                    buffer[2]);
      }
    });
    from = read_only(to);
  }
}

// How a product is cut into units, and the memory of one at work.
struct unit_split {
  std::int64_t width;
  std::int64_t tiles;
  std::int64_t units;
  std::size_t bytes;

  unit_split(const product_sizes& size, std::int64_t itemsize, bool keeps)
      : width(tile_width(size.batch, std::max<std::int64_t>(size.d, 1), itemsize, keeps)),
        tiles(divide_up(size.d, width)),
        units(size.batch * tiles),
        bytes(static_cast<std::size_t>(kUnitBuffers * size.n * width * itemsize)) {}
};

// Memory of a call: the sequences, what every thread's tasks write down, and `unit_bytes` for each
// of the units at work.
struct call_memory {
  std::int64_t* starts;
  workspace_layout::slots scratch;
  workspace_layout::slots units;

  call_memory(workspace_layout& pieces, const product_sizes& size, std::size_t unit_bytes,
              std::int64_t count)
      : starts(pieces.take<std::int64_t>(size.n + 1)) {
    const auto bytes = static_cast<std::int64_t>(functions<float>().scratch(size.k));
    const std::int64_t aligned = std::max<std::int64_t>(divide_up(bytes, kLine) * kLine, kLine);
    // From the shapes: the workspace may have been asked for under another number of threads.
    const double work =
        work_of(size.n, size.k, size.d) * static_cast<double>((size.n_factors + 1) * size.batch);
    const auto fitting = static_cast<int>(std::clamp<std::int64_t>((8 << 20) / aligned, 1, 256));
    const int slots = threads_for(work, fitting);
    scratch = {pieces.take<char>(slots * aligned), static_cast<std::size_t>(aligned), slots};
    units = pieces.take_slots(unit_bytes, count);
  }
};

// Calls run(unit, memory, each) for all units: each(f) calls f(first, last, scratch) for parts of
// the rows and returns when all are done. Every thread takes whole units; those left over when all
// had as many are worked on together, part by part, where a factor is work enough.
template <class Run>
void for_each_unit(const call_memory& memory, std::int64_t units, const product_sizes& size,
                   std::int64_t width, Run&& run) {
  const std::int64_t n = size.n;
  const double factor_work = work_of(n, size.k, width);
  const double work = factor_work * static_cast<double>((size.n_factors + 1) * units);
  const int threads = threads_for(work, std::min(memory.scratch.count, available_threads()));
  const int at_once = std::min(threads, memory.units.count);
  const int sharers = threads_for(factor_work, threads);
  const std::int64_t shared = sharers > 1 ? units % threads : 0;
  parallel_for(units - shared, at_once, [&](std::int64_t unit, int slot) {
    run(unit, memory.units[slot], [&](auto&& f) { f(std::int64_t{0}, n, memory.scratch[slot]); });
  });
  const double row = static_cast<double>((size.k + 1) * std::max<std::int64_t>(width, 1));
  const auto least = static_cast<std::int64_t>((1 << 18) / row);
  const std::int64_t rows = divide_up(least + 1, 16) * 16;
  for (std::int64_t unit = units - shared; unit < units; ++unit) {
    run(unit, memory.units[0], [&](auto&& f) {
      parallel_for(divide_up(n, rows), sharers, [&](std::int64_t part, int slot) {
        f(part * rows, std::min(n, (part + 1) * rows), memory.scratch[slot]);
      });
    });
  }
}

template <class T>
void product_as(const factor_chain& chain, const array_view& values, const array_view& x,
                const array_view* segments, const std::int64_t* offsets, residual_type residual,
                bool circular, bool transpose, const array_view& out,
                const array_view* intermediates, const array_view& workspace) {
  const product_sizes& size = chain.size;
  workspace_layout pieces(workspace);
  const unit_split split(size, sizeof(T), intermediates != nullptr);
  const call_memory memory(pieces, size, split.bytes, split.units);
  const call_of<T> call{
      chain,     {segments, size.n, memory.starts},     offsets, residual, circular,
      transpose, are_beyond_caches<T>(size, size.batch)};
  for_each_unit(
      memory, split.units, size, split.width, [&](std::int64_t index, void* buffers, auto&& each) {
        const std::int64_t b = index / split.tiles;
        const std::int64_t channel = index % split.tiles * split.width;
        unit<T> u{};
        u.x = matrix_at<const T>(x, chain.shape.offset(x, 2, b));
        u.x.data += channel * u.x.column_stride;
        u.out = matrix_at<T>(out, chain.shape.offset(out, 2, b));
        u.out.data += channel * u.out.column_stride;
        if (intermediates != nullptr && size.n_factors > 1) {
          u.intermediates = stack_at<T>(*intermediates, chain.shape.offset(*intermediates, 3, b));
          u.intermediates.data += channel * u.intermediates.column_stride;
        }
        u.width = std::min(split.width, size.d - channel);
        run_unit<T>(call, values, b, u, static_cast<T*>(buffers), each);
      });
}

// Matrices (n, d) in the memory of the reverse of one element of the batch: two gradients in turn,
// then these, and last, where they are computed anew, M - 1 intermediates. As many elements have
// such memory as are at work at one time: at most one for each thread.
enum reverse_matrix : std::int64_t { kSum = 2, kX = 3, kIntermediate = 4, kRecomputed = 5 };

std::size_t reverse_bytes(const product_sizes& size, std::int64_t itemsize, bool recompute) {
  const std::int64_t matrices =
      kRecomputed + (recompute ? std::max<std::int64_t>(size.n_factors - 1, 0) : 0);
  return static_cast<std::size_t>(matrices * size.n * padded_length(size.d, itemsize) * itemsize);
}

struct reverse_arrays {
  const array_view& grad;
  const array_view& values;
  const array_view& x;
  const array_view* intermediates;
  const array_view* grad_values;
  const array_view* grad_x;
};

// One element of the batch; `each` as for_each_unit gives it.
template <class T, class Each>
void run_reverse(const call_of<T>& call, const reverse_arrays& arrays, std::int64_t b, T* memory,
                 Each&& each) {
  const auto& kernels = functions<T>();
  const batch_shape& shape = call.chain.shape;
  const std::int64_t n = call.chain.size.n;
  const std::int64_t d = call.chain.size.d;
  const std::int64_t n_factors = call.chain.size.n_factors;
  const std::int64_t columns = divide_up(d, kernels.lanes) * kernels.lanes;
  const std::int64_t stride = padded_length(d, sizeof(T));
  const bool with_values = arrays.grad_values != nullptr;
  const bool sums = call.residual == residual_type::input;
  const auto buffer = [&](std::int64_t index) {
    return factor_rows<T>{memory + index * n * stride, stride};
  };
  // Rows as kernels take them, copied where they do not lie so.
  const auto taken = [&](const matrix_view<const T>& from, std::int64_t index) {
    if (is_direct(from, d)) return rows_of(from);
    each([&](std::int64_t first, std::int64_t last, void*) {
      copy_rows<T>(from, first, last, d, columns, matrix_of(buffer(index)));
    });
    return read_only(buffer(index));
  };
  const auto grad = matrix_at<const T>(arrays.grad, shape.offset(arrays.grad, 2, b));
  matrix_view<T> grad_x{};
  if (arrays.grad_x != nullptr) {
    grad_x = matrix_at<T>(*arrays.grad_x, shape.offset(*arrays.grad_x, 2, b));
  }
  if (n_factors == 0) {
    if (!grad_x) return;
    each([&](std::int64_t first, std::int64_t last, void*) {
      copy_rows<T>(grad, first, last, d, 0, grad_x);
    });
    return;
  }
  factor_rows<const T> x{};
  if (with_values) x = taken(matrix_at<const T>(arrays.x, shape.offset(arrays.x, 2, b)), kX);
  const bool recompute = with_values && arrays.intermediates == nullptr;
  if (recompute) {
    factor_rows<const T> from = x;
    for (std::int64_t m = 0; m + 1 < n_factors; ++m) {
      factor_rows<T> to = buffer(kRecomputed + m);
      factor_rows<T> copy{};
      if (call.beyond_caches) {
        copy = to;
        to = buffer(m % 2);
      }
      factor_rows<const T> addend{};
      if (call.residual == residual_type::step) addend = from;
      if (sums) addend = x;
      each([&](std::int64_t first, std::int64_t last, void* scratch) {
        kernels.product({call.pattern(m, first, last, scratch), false,
                         call.values_of(arrays.values, b, m), from, addend, to, copy, columns});
      });
      from = read_only(to);
    }
  }
  factor_rows<const T> from = taken(grad, 0);
  for (std::int64_t m = n_factors - 1; m >= 0; --m) {
    const std::int64_t step = n_factors - 1 - m;
    factor_rows<const T> v = x;
    if (with_values && m > 0) {
      v = recompute ? read_only(buffer(kRecomputed + m - 1))
                    : taken(stack_at<const T>(*arrays.intermediates,
                                              shape.offset(*arrays.intermediates, 3, b))[m - 1],
                            kIntermediate);
    }
    const bool moves = m > 0 || grad_x;
    const bool direct = m == 0 && grad_x && is_direct(grad_x, d);
    const factor_rows<T> to = direct ? rows_of(grad_x) : buffer((step + 1) % 2);
    const factor_rows<const T> sum = step == 0 ? from : read_only(buffer(kSum));
    factor_rows<const T> addend{};
    if (call.residual == residual_type::step) addend = from;
    if (sums && m == 0) addend = sum;
    each([&](std::int64_t first, std::int64_t last, void* scratch) {
      const factor_pattern pattern = call.pattern(m, first, last, scratch);
      factor_gradient_task<T> gradient{};
      if (with_values) {
        gradient = {pattern, from, v, d,
                    stack_at<T>(*arrays.grad_values, shape.offset(*arrays.grad_values, 3, b))[m]};
      }
      if (!moves) return kernels.gradient(gradient);
      const factor_product_task<T> product{
          pattern, true, call.values_of(arrays.values, b, m), from, addend, to, {}, columns};
      if (with_values) {
        kernels.reverse({gradient, product});
      } else {
        kernels.product(product);
      }
      if (m == 0 && !direct) copy_rows<T>({to.data, to.stride, 1}, first, last, d, 0, grad_x);
      if (sums && m > 0) {
        add_rows<T>(sum, read_only(to), first, last, columns, buffer(kSum));
      }
    });
    from = read_only(to);
  }
}

template <class T>
void reverse_as(const factor_chain& chain, const reverse_arrays& arrays, const array_view* segments,
                const std::int64_t* offsets, residual_type residual, bool circular,
                const array_view& workspace) {
  const product_sizes& size = chain.size;
  const bool recompute = arrays.grad_values != nullptr && arrays.intermediates == nullptr;
  workspace_layout pieces(workspace);
  const call_memory memory(pieces, size, reverse_bytes(size, sizeof(T), recompute), size.batch);
  const call_of<T> call{chain,
                        {segments, size.n, memory.starts},
                        offsets,
                        residual,
                        circular,
                        false,
                        are_beyond_caches<T>(size, memory.units.count)};
  for_each_unit(memory, size.batch, size, size.d, [&](std::int64_t b, void* matrices, auto&& each) {
    run_reverse<T>(call, arrays, b, static_cast<T*>(matrices), each);
  });
}

}  // namespace

std::size_t sparse_factor_product_workspace(std::int64_t batch, std::int64_t n_factors,
                                            std::int64_t n, std::int64_t k, std::int64_t d,
                                            std::int64_t itemsize) {
  itemsize = known_itemsize(itemsize);
  const product_sizes size{batch, n_factors, n, k, d};
  std::size_t bytes = 0;
  for (const bool keeps : {false, true}) {
    const unit_split split(size, itemsize, keeps);
    workspace_layout pieces;
    const call_memory memory(pieces, size, split.bytes, split.units);
    bytes = std::max(bytes, pieces.size());
  }
  return bytes;
}

void sparse_factor_product(const array_view& values, const array_view& x,
                           const array_view* segments, const std::int64_t* offsets,
                           residual_type residual, bool circular, bool transpose,
                           const array_view& out, const array_view* intermediates,
                           const array_view& workspace) {
  const factor_chain chain =
      check_sparse_factor_product(values, x, segments, offsets, transpose, out, intermediates);
  if (chain.size.batch * chain.size.n * chain.size.d == 0) return;
  (values.type == dtype::float32 ? product_as<float>
                                 : product_as<double>)(chain, values, x, segments, offsets,
                                                       residual, circular, transpose, out,
                                                       intermediates, workspace);
}

std::size_t sparse_factor_product_vjp_workspace(std::int64_t batch, std::int64_t n_factors,
                                                std::int64_t n, std::int64_t k, std::int64_t d,
                                                std::int64_t itemsize, bool recompute) {
  itemsize = known_itemsize(itemsize);
  const product_sizes size{batch, n_factors, n, k, d};
  workspace_layout pieces;
  const call_memory memory(pieces, size, reverse_bytes(size, itemsize, recompute), batch);
  return pieces.size();
}

void sparse_factor_product_vjp(const array_view& grad, const array_view& values,
                               const array_view& x, const array_view* segments,
                               const array_view* intermediates, const std::int64_t* offsets,
                               residual_type residual, bool circular, const array_view* grad_values,
                               const array_view* grad_x, const array_view& workspace) {
  const factor_chain chain = check_sparse_factor_product_vjp(
      grad, values, x, segments, intermediates, offsets, grad_values, grad_x);
  if (chain.size.batch * chain.size.n == 0 || (!grad_values && !grad_x)) return;
  (values.type == dtype::float32
       ? reverse_as<float>
       : reverse_as<double>)(chain, {grad, values, x, intermediates, grad_values, grad_x}, segments,
                             offsets, residual, circular, workspace);
}

}  // namespace subquad::core
