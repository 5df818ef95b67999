// Statistics of keys by component: rows are sorted by their label, then summed component by
// component.
#include <algorithm>

#include "clusters_checks.hpp"
#include "device.cuh"
#include "gram.cuh"
#include "launch.cuh"
#include "normalizers_core.hpp"

namespace subquad::cuda {
namespace {

constexpr std::uint32_t kAllLanes = 0xffffffffu;

// ---- rows in the order of their labels ---------------------------------------------------------

// A stable counting sort of n rows by labels in [0, k); rows with another label are left out. A
// unit is what one warp reads: it counts its labels, and with the counts of the units before it
// knows where its rows go. At most 2^23 counters, or k if that is more, whatever n is.
struct label_sort {
  vector_view<const std::int64_t> labels;
  std::int64_t n;
  std::int64_t k;
  std::int64_t units;
  std::int64_t rows_of_unit;
  std::int64_t rows_of_part;   // of a component: how sums are cut
  std::uint32_t* counters;     // [k][units]: rows of a unit, then rows of the units before
  std::int64_t* totals;        // [k]
  std::int64_t* starts;        // [k + 1]: of the components' rows in `rows`
  std::int64_t* extra_starts;  // [k + 1]: of their parts after the first
  std::uint32_t* rows;         // [n]

  label_sort(workspace_layout& workspace, std::int64_t count, std::int64_t n_labels,
             std::int64_t part_rows)
      : labels{}, n(count), k(n_labels), rows_of_part(part_rows) {
    constexpr std::int64_t kMostUnits = 2048;
    constexpr std::int64_t kCounters = std::int64_t{1} << 23;
    constexpr std::int64_t kSmallestUnit = 4 * kWarp;
    units = std::min(
        {divide_up(n, kSmallestUnit), kMostUnits, kCounters / std::max<std::int64_t>(k, 1)});
    units = std::max<std::int64_t>(units, 1);
    rows_of_unit = divide_up(divide_up(n, units), kWarp) * kWarp;
    counters = workspace.take<std::uint32_t>(k * units);
    totals = workspace.take<std::int64_t>(k);
    starts = workspace.take<std::int64_t>(k + 1);
    extra_starts = workspace.take<std::int64_t>(k + 1);
    rows = workspace.take<std::uint32_t>(n);
  }

  SUBQUAD_DEVICE std::int64_t label(std::int64_t row, std::int64_t end) const {
    const std::int64_t found = row < end ? labels[row] : -1;
    return found < k ? found : -1;
  }
  SUBQUAD_DEVICE std::uint32_t& counter(std::int64_t label, std::int64_t unit) const {
    return counters[label * units + unit];
  }
};

constexpr int kUnitsOfBlock = 4;

struct unit_range {
  std::int64_t unit;
  std::int64_t first;
  std::int64_t end;

  SUBQUAD_DEVICE explicit unit_range(const label_sort& sort)
      : unit(static_cast<std::int64_t>(blockIdx.x) * kUnitsOfBlock + threadIdx.x / kWarp),
        first(unit * sort.rows_of_unit),
        end(first + sort.rows_of_unit < sort.n ? first + sort.rows_of_unit : sort.n) {
    if (unit >= sort.units) end = first;
  }
};

// counters[a][unit] += rows of label a in the unit.
struct count_labels_kernel {
  static constexpr int kThreads = kUnitsOfBlock * kWarp;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  label_sort sort;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const unit_range range(sort);
    for (std::int64_t row = range.first + threadIdx.x % kWarp; row < range.end; row += kWarp) {
      const std::int64_t label = sort.label(row, range.end);
      if (label >= 0) atomicAdd(&sort.counter(label, range.unit), 1u);
    }
  }
};

// Calls store(i, sum of load(0) .. load(i - 1)) for i below count, by all threads of a block, and
// returns the sum of all. store(i, ...) may overwrite what load(i) reads.
template <int kThreads>
struct block_scan {
  static constexpr int kEach = 8;  // neighbours that a thread takes
  struct shared_memory {
    std::int64_t of_warps[kThreads / kWarp];
  };

  template <class Load, class Store>
  static SUBQUAD_DEVICE std::int64_t run(std::int64_t count, shared_memory& shared, Load&& load,
                                         Store&& store) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    std::int64_t before = 0;
    for (std::int64_t first = 0; first < count; first += kThreads * kEach) {
      const std::int64_t own = first + static_cast<std::int64_t>(threadIdx.x) * kEach;
      std::int64_t values[kEach];
      std::int64_t sum = 0;
      SUBQUAD_UNROLL
      for (int i = 0; i < kEach; ++i) {
        values[i] = own + i < count ? load(own + i) : 0;
        sum += values[i];
      }
      std::int64_t up_to = sum;
      SUBQUAD_UNROLL
      for (int step = 1; step < kWarp; step *= 2) {
        const std::int64_t other = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane >= step) up_to += other;
      }
      if (lane == kWarp - 1) shared.of_warps[warp] = up_to;
      __syncthreads();
      std::int64_t prefix = before + up_to - sum;
      for (int other = 0; other < kThreads / kWarp; ++other) {
        if (other < warp) prefix += shared.of_warps[other];
        before += shared.of_warps[other];
      }
      SUBQUAD_UNROLL
      for (int i = 0; i < kEach; ++i) {
        if (own + i < count) store(own + i, prefix);
        prefix += values[i];
      }
      __syncthreads();
    }
    return before;
  }
};

// From the rows of each unit to those of the units before it, for one label a block.
struct unit_offsets_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  using scan = block_scan<kThreads>;
  using shared_memory = scan::shared_memory;

  label_sort sort;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const std::int64_t label = blockIdx.x;
    const std::int64_t total = scan::run(
        sort.units, shared,
        [&](std::int64_t unit) { return static_cast<std::int64_t>(sort.counter(label, unit)); },
        [&](std::int64_t unit, std::int64_t before) {
          sort.counter(label, unit) = static_cast<std::uint32_t>(before);
        });
    if (threadIdx.x == 0) sort.totals[label] = total;
  }
};

// Where the rows of each component start, and its parts after the first, in one block.
struct component_starts_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  using scan = block_scan<kThreads>;
  using shared_memory = scan::shared_memory;

  label_sort sort;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const std::int64_t rows = scan::run(
        sort.k, shared, [&](std::int64_t a) { return sort.totals[a]; },
        [&](std::int64_t a, std::int64_t before) { sort.starts[a] = before; });
    const std::int64_t extra = scan::run(
        sort.k, shared,
        [&](std::int64_t a) {
          const std::int64_t total = sort.totals[a];
          return total > 0 ? (total - 1) / sort.rows_of_part : 0;
        },
        [&](std::int64_t a, std::int64_t before) { sort.extra_starts[a] = before; });
    if (threadIdx.x == 0) {
      sort.starts[sort.k] = rows;
      sort.extra_starts[sort.k] = extra;
    }
  }
};

// Writes each row to its place, rows of equal label in their order.
struct place_rows_kernel {
  static constexpr int kThreads = kUnitsOfBlock * kWarp;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  label_sort sort;
  int bits;  // of a label

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const unit_range range(sort);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (std::int64_t first = range.first; first < range.end; first += kWarp) {
      const std::int64_t row = first + lane;
      const std::int64_t label = sort.label(row, range.end);
      // The lanes of the same label.
      std::uint32_t peers = __ballot_sync(kAllLanes, label >= 0);
      for (int bit = 0; bit < bits; ++bit) {
        const bool is_set = (label >> bit & 1) != 0;
        const std::uint32_t votes = __ballot_sync(kAllLanes, is_set);
        peers &= is_set ? votes : ~votes;
      }
      const int rank = __popc(peers & ((std::uint32_t{1} << lane) - 1));
      std::uint32_t place = 0;
      if (label >= 0 && rank == 0) {
        std::uint32_t& counter = sort.counter(label, range.unit);
        place = counter;
        counter = place + static_cast<std::uint32_t>(__popc(peers));
      }
      const int lowest = label >= 0 ? __popc((peers & (0 - peers)) - 1) : lane;
      place = __shfl_sync(kAllLanes, place, lowest);
      if (label >= 0) {
        sort.rows[sort.starts[label] + place + rank] = static_cast<std::uint32_t>(row);
      }
      // What one lane counted another may read next.
      __syncwarp();
    }
  }
};

void run(const label_sort& sort) {
  clear(sort.counters, static_cast<std::size_t>(sort.k * sort.units) * sizeof(std::uint32_t));
  launch(divide_up(sort.units, kUnitsOfBlock), count_labels_kernel{sort});
  launch(sort.k, unit_offsets_kernel{sort});
  launch(1, component_starts_kernel{sort});
  int bits = 0;
  while ((sort.k - 1) >> bits > 0) ++bits;
  launch(divide_up(sort.units, kUnitsOfBlock), place_rows_kernel{sort, bits});
}

// A source of gram.cuh: the rows of each component, in parts of rows_of_part. Where they lie is
// known on the device alone: there is a slot for the first part of every component, and for as many
// further ones as n rows can have.
template <class T>
struct component_rows {
  matrix_view<const T> y;
  vector_view<const T> weights;  // optional
  const double* means;           // [k][depth], optional
  std::int64_t depth;
  const std::uint32_t* rows;
  const std::int64_t* starts;
  const std::int64_t* extra_starts;
  std::int64_t rows_of_part;
  std::int64_t products;
  std::int64_t slots;

  component_rows(const label_sort& sort, const array_view& keys, const array_view* key_weights,
                 const double* centers)
      : y(matrix_at<const T>(keys, 0)),
        weights(key_weights ? vector_at<const T>(*key_weights, 0) : vector_view<const T>{}),
        means(centers),
        depth(keys.shape[1]),
        rows(sort.rows),
        starts(sort.starts),
        extra_starts(sort.extra_starts),
        rows_of_part(sort.rows_of_part),
        products(sort.k),
        slots(sort.k > 0 ? sort.k + sort.n / sort.rows_of_part : 0) {}

  SUBQUAD_DEVICE bool part(std::int64_t slot, row_part<T>& to) const {
    std::int64_t component = slot;
    std::int64_t index = 0;
    to.extra = -1;
    if (slot >= products) {
      to.extra = slot - products;
      if (to.extra >= extra_starts[products]) return false;
      // The last component whose parts start at this one or before.
      std::int64_t above = products;
      component = 0;
      while (above - component > 1) {
        const std::int64_t middle = component + (above - component) / 2;
        if (extra_starts[middle] <= to.extra) {
          component = middle;
        } else {
          above = middle;
        }
      }
      index = 1 + to.extra - extra_starts[component];
    }
    const std::int64_t first = starts[component] + index * rows_of_part;
    const std::int64_t left = starts[component + 1] - first;
    to.rows.matrix = y;
    to.rows.weights = weights;
    to.rows.list = rows + first;
    to.rows.center = means ? means + component * depth : nullptr;
    to.rows.count = static_cast<int>(left < rows_of_part ? left : rows_of_part);
    to.product = component;
    to.is_only = parts(component).count == 0;
    return true;
  }
  SUBQUAD_DEVICE row_parts parts(std::int64_t product) const {
    return {extra_starts[product], extra_starts[product + 1] - extra_starts[product]};
  }
};

// radii_a = the largest |y_j - means_a| over the rows of label a whose weight is not 0, in float64;
// NaN is larger than all. One warp a row. radii holds zeros before; nothing else aliases.
template <class T>
struct radii_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  matrix_view<const T> y;
  vector_view<const std::int64_t> labels;
  vector_view<const T> weights;  // optional
  const double* means;           // [k][depth]
  double* radii;
  std::int64_t n;
  std::int64_t k;
  std::int64_t depth;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    constexpr int kRows = kThreads / kWarp;
    const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
    if (j >= n) return;
    const std::int64_t label = labels[j];
    if (label < 0 || label >= k || (weights && weights[j] == T(0))) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    double square = 0;
    for (std::int64_t t = lane; t < depth; t += kWarp) {
      const double c = static_cast<double>(y(j, t)) - means[label * depth + t];
      square = fma(c, c, square);
    }
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kWarp; flip *= 2) square += __shfl_xor_sync(kAllLanes, square, flip);
    if (lane != 0) return;
    // Without their sign, floating-point numbers are in the order of their bits, NaN above all.
    const double radius =
        square == square ? sqrt(square) : std::numeric_limits<double>::quiet_NaN();
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(radius));
    auto* largest = reinterpret_cast<unsigned long long*>(radii + label);
    if (bits > *largest) atomicMax(largest, bits);
  }
};

// ---- what a call needs -------------------------------------------------------------------------

void check_rows(std::int64_t n) {
  if (n > std::numeric_limits<std::uint32_t>::max()) {
    throw invalid_argument("y: expected less than 2^32 rows on CUDA, got " + std::to_string(n));
  }
}

struct sums_layout {
  label_sort sort;
  double* extra_counts;
  double* extra_sums;

  sums_layout(workspace_layout& workspace, std::int64_t n, std::int64_t k, std::int64_t d)
      : sort(workspace, n, k, product_split(1, n, row_sums_blocks(d)).rows) {
    const std::int64_t extra = n / sort.rows_of_part;
    extra_counts = workspace.take<double>(extra);
    extra_sums = workspace.take<double>(extra * d);
  }
};

template <class T>
void component_sums_as(const array_view& y, const array_view& labels, const array_view* weights,
                       const array_view& counts, const array_view& sums,
                       const array_view& workspace) {
  const std::int64_t d = y.shape[1];
  workspace_layout pieces(workspace);
  sums_layout layout(pieces, y.shape[0], counts.shape[0], d);
  layout.sort.labels = vector_at<const std::int64_t>(labels, 0);
  run(layout.sort);
  row_sums<T, 1>(component_rows<T>(layout.sort, y, weights, nullptr), d,
                 {static_cast<double*>(sums.data), layout.extra_sums, d},
                 {static_cast<double*>(counts.data), layout.extra_counts, 1});
}

// Of the parts after the first there are at most 512 / gram_blocks(d), 32 MiB for any d and n.
struct scatter_layout {
  label_sort sort;
  double* extra;

  scatter_layout(workspace_layout& workspace, std::int64_t n, std::int64_t k, std::int64_t d,
                 bool diagonal)
      : sort(workspace, n, k,
             product_split(1, n, diagonal ? row_sums_blocks(d) : gram_blocks(d)).rows) {
    extra = workspace.take<double>(n / sort.rows_of_part * d * (diagonal ? 1 : d));
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
  workspace_layout pieces(workspace);
  scatter_layout layout(pieces, n, k, d, diagonal);
  layout.sort.labels = vector_at<const std::int64_t>(labels, 0);
  run(layout.sort);
  const auto* centers = static_cast<const double*>(means.data);
  const component_rows<T> source(layout.sort, y, weights, centers);
  const part_sums sums{static_cast<double*>(scatter.data), layout.extra, diagonal ? d : d * d};
  if (diagonal) {
    row_sums<T, 2>(source, d, sums, {});
  } else {
    gram<T>(source, d, sums);
  }
  using kernel = radii_kernel<T>;
  auto* largest = static_cast<double*>(radii.data);
  clear(largest, static_cast<std::size_t>(k) * sizeof(double));
  launch(divide_up(n, kernel::kThreads / kWarp),
         kernel{source.y, layout.sort.labels, source.weights, centers, largest, n, k, d});
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t component_sums_workspace(std::int64_t n, std::int64_t k, std::int64_t d, std::int64_t) {
  workspace_layout workspace;
  cuda::sums_layout(workspace, n, k, d);
  return workspace.size();
}

void component_sums(const array_view& y, const array_view& labels, const array_view* weights,
                    const array_view& counts, const array_view& sums, const array_view& workspace) {
  check_component_sums(y, labels, weights, counts, sums);
  cuda::check_rows(y.shape[0]);
  (y.type == dtype::float32
       ? cuda::component_sums_as<float>
       : cuda::component_sums_as<double>)(y, labels, weights, counts, sums, workspace);
}

std::size_t component_scatter_workspace(std::int64_t n, std::int64_t k, std::int64_t d,
                                        std::int64_t, bool diagonal) {
  workspace_layout workspace;
  cuda::scatter_layout(workspace, n, k, d, diagonal);
  return workspace.size();
}

void component_scatter(const array_view& y, const array_view& labels, const array_view* weights,
                       const array_view& means, const array_view& scatter, const array_view& radii,
                       const array_view& workspace) {
  check_component_scatter(y, labels, weights, means, scatter, radii);
  cuda::check_rows(y.shape[0]);
  (y.type == dtype::float32
       ? cuda::component_scatter_as<float>
       : cuda::component_scatter_as<double>)(y, labels, weights, means, scatter, radii, workspace);
}

}  // namespace subquad::core
