// A step of an embedding on the sphere.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "csr_rows.cuh"
#include "embedding_checks.hpp"
#include "embedding_core.hpp"
#include "log_sum_exp.cuh"

namespace subquad::cuda {
namespace {

// Rows are counted in 32 bits times their channels.
constexpr std::int64_t kMostChannels = std::int64_t{1} << 26;
constexpr int kStepThreads = 256;
constexpr int kRowsOfThread = 4;
constexpr int kMostRowsOfTile = 256;
// Of tiles whose rows lie in the workspace: how many have a place there, and their groups.
constexpr std::int64_t kMostSlices = 256;
constexpr int kGroupsOfSlice = 4;

// How a tile of rows is dealt out to the threads of a block: `lanes` neighbouring lanes to the
// channels of kRowsOfThread rows, a group; where there are more threads than groups, `shares` of
// them to every shares-th part of a row's channels. What the rows need is in shared memory where
// that of any device is enough: shapes alone tell which.
template <class T>
struct row_tile {
  static constexpr int kWidth = kChannels<T>;
  static constexpr std::int64_t kArrays = 3;
  // What a block has besides its rows: the struct of the kernel, and starts and order of the rows.
  static constexpr std::size_t kReserved = 8 * 1024;

  std::int64_t count;  // of tiles
  int d;
  int lanes;
  int groups;
  int shares;
  int stride;  // of a row, in elements
  bool in_workspace;

  row_tile(std::int64_t n, std::int64_t channels_of_row)
      : d(static_cast<int>(channels_of_row)),
        lanes(lanes_of_channels(channels_of_row, kWidth)),
        groups(std::min(kStepThreads / lanes, kMostRowsOfTile / kRowsOfThread)) {
    const auto vectors = static_cast<int>(divide_up(channels_of_row, std::int64_t{kWidth}));
    // An odd number of vectors: neighbouring rows begin in different banks.
    stride = (vectors | 1) * kWidth;
    while (groups > 1 && !fits()) groups /= 2;
    in_workspace = !fits();
    if (in_workspace) groups = kGroupsOfSlice;
    shares = std::max(
        std::min(kStepThreads / lanes / groups, vectors / lanes + (vectors % lanes > 0)), 1);
    count = divide_up(n, rows());
  }

  SUBQUAD_HOST_DEVICE int rows() const { return groups * kRowsOfThread; }
  std::int64_t elements() const { return kArrays * rows() * stride; }
  bool fits() const {
    return static_cast<std::size_t>(elements()) * sizeof(T) + kReserved <= kSharedMemoryEverywhere;
  }
  std::int64_t blocks() const { return in_workspace ? std::min(count, kMostSlices) : count; }
};

// One step for a tile of rows. x, the push (in its place later the gradient) and a product (in its
// place later the pull) are of the block alone; the covariances come through the caches, and
// products with them are plain arithmetic: gathered rows, not they, are what most steps wait for.
//
// out may be x, for a block reads none but its own rows of x, and these before it writes; nothing
// else aliases. Shapes and the matrix determine the order of all sums. With u = 2^-24 or 2^-53, and
// in parts of the sums of magnitudes: a pull of p elements is within (p + 2) u, a product C_a x
// within d u, and a score within (2 d + 4) u. log_z is within e, the largest error of a score, and
// (6 k + 8 + 2 r) u, r the range of the scores, and a weight within twice that of itself. The
// gradient is divided by its largest element and projected twice: whatever its size |g| and that of
// its tangent part |g'| are, the direction of a turn is within 2 (2 d + 8) u |g| / |g'| and what
// the gradient was wrong by, and has no more than (2 d + 8) u along x. out is of unit norm within
// (d / 2 + 4) u.
template <class T, class Index>
struct embedding_step_kernel {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocks = 2;
  static constexpr int kWidth = kChannels<T>;
  using row_sums = csr_row_sums<T, Index, kThreads>;
  using block = channels<T, kWidth>;
  struct shared_memory {
    typename row_sums::of_warps sums;
    // Of each row, from each share, by turns.
    T dots[2][kThreads / kWarp * kRowsOfThread];
    alignas(16) T rows[1];  // and what follows
  };

  row_tile<T> tile;
  row_sums elements;  // none: rows are the pull, but for the scale
  channel_view<const T> x;
  channel_view<const T> rows;
  channel_view<const T> means;
  channel_view<const T> covariances;  // of the first component
  channel_view<const T> shifts;
  channel_view<const T> slopes;  // of the first label
  channel_view<T> out;           // optional
  vector_view<const T> log_counts;
  vector_view<const std::int64_t> labels;
  vector_view<const T> null_weights;
  vector_view<const T> null;
  vector_view<T> attraction;  // optional
  vector_view<T> log_z;       // optional
  T* slices;
  std::int64_t n;
  std::int64_t n_components;  // 0: none
  std::int64_t n_labels;      // 0: none
  std::int64_t covariance_stride;
  std::int64_t slope_stride;
  T scale;
  T sine;
  T cosine;

  // Where a block has its rows.
  struct place {
    T* x;
    T* push;
    T* pull;
    std::int64_t* starts;  // of the rows' elements, or the rows' labels
    int* order;
  };

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const std::int64_t of_array = std::int64_t{tile.rows()} * tile.stride;
    T* memory = slices ? slices + blockIdx.x * (row_tile<T>::kArrays * of_array) : shared.rows;
    T* after = slices ? shared.rows : shared.rows + row_tile<T>::kArrays * of_array;
    auto* starts = reinterpret_cast<std::int64_t*>(after);
    const place at{memory, memory + of_array, memory + 2 * of_array, starts,
                   reinterpret_cast<int*>(starts + tile.rows() + 1)};
    SUBQUAD_NO_UNROLL
    for (std::int64_t index = blockIdx.x; index < tile.count; index += gridDim.x) {
      const std::int64_t first = index * tile.rows();
      const int count = n - first < tile.rows() ? static_cast<int>(n - first) : tile.rows();
      load(first, count, at);
      __syncthreads();
      if (n_components > 0) {
        add_components(first, count, at, shared);
        __syncthreads();
      }
      if (n_labels > 0) {
        add_own(first, count, at);
        __syncthreads();
      }
      gather(first, count, at, shared);
      __syncthreads();
      turn(first, count, at);
    }
  }

  static SUBQUAD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  // The channels of a row are of tile.lanes threads here, all of one warp.
  SUBQUAD_DEVICE int lane() const { return thread() % tile.lanes; }
  static SUBQUAD_DEVICE block& block_at(T* at) { return *channels_at<kWidth>(at); }

  // Sums or largest magnitudes over the lanes of a row, to all of them.
  SUBQUAD_DEVICE T over_lanes(T sum) const {
    for (int flip = 1; flip < tile.lanes; flip *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, flip);
    }
    return sum;
  }
  SUBQUAD_DEVICE T largest_over_lanes(T most) const {
    for (int flip = 1; flip < tile.lanes; flip *= 2) {
      most = fmax(most, __shfl_xor_sync(0xffffffffu, most, flip));
    }
    return most;
  }
  // Calls body(row, whether it exists) for rows, each by all lanes that have it, and with all lanes
  // of a warp.
  template <class Body>
  SUBQUAD_DEVICE void each_row(int count, Body&& body) const {
    const int at_a_time = kThreads / tile.lanes;
    SUBQUAD_NO_UNROLL
    for (int first = 0; first < tile.rows(); first += at_a_time) {
      const int row = first + thread() / tile.lanes;
      body(row, row < count);
    }
  }
  // Calls body(channel) for the first of each kWidth channels of the lane's.
  template <class Body>
  SUBQUAD_DEVICE void each_channel(Body&& body) const {
    SUBQUAD_NO_UNROLL
    for (int channel = lane() * kWidth; channel < tile.d; channel += tile.lanes * kWidth) {
      body(channel);
    }
  }
  // The same of the thread's group and share; the others have none.
  template <class Body>
  SUBQUAD_DEVICE void each_shared_channel(Body&& body) const {
    if (share() >= tile.shares) return;
    const int width = tile.lanes * kWidth;
    SUBQUAD_NO_UNROLL
    for (int channel = share() * width + lane() * kWidth; channel < tile.d;
         channel += tile.shares * width) {
      body(channel);
    }
  }
  SUBQUAD_DEVICE int group() const { return thread() / tile.lanes % tile.groups; }
  SUBQUAD_DEVICE int share() const { return thread() / tile.lanes / tile.groups; }
  // Lanes of a warp read neighbouring rows at a time.
  SUBQUAD_DEVICE int row_of_group(int i) const { return group() + i * tile.groups; }

  // Rows that do not exist are zeros.
  SUBQUAD_DEVICE void load(std::int64_t first, int count, const place& at) const {
    each_row(tile.rows(), [&](int row, bool exists) {
      if (!exists) return;
      each_channel([&](int channel) {
        block own = block::zero();
        if (row < count) x.load(own, first + row, channel, tile.d);
        block_at(at.x + row * tile.stride + channel) = own;
        block_at(at.push + row * tile.stride + channel) = block::zero();
      });
    });
  }

  // products_i += C x_(rows_i) in channels `channel` and on. C is symmetric: rows serve as columns.
  SUBQUAD_DEVICE void multiply(const channel_view<const T>& matrix, const T* points,
                               const int (&row)[kRowsOfThread], int channel,
                               block (&products)[kRowsOfThread]) const {
    SUBQUAD_NO_UNROLL
    for (int t = 0; t < tile.d; t += kWidth) {
      block right[kWidth];
      SUBQUAD_UNROLL
      for (int w = 0; w < kWidth; ++w) {
        right[w] = block::zero();
        if (t + w < tile.d) matrix.load(right[w], t + w, channel, tile.d);
      }
      SUBQUAD_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        const block left = *channels_at<kWidth>(points + row[i] * tile.stride + t);
        SUBQUAD_UNROLL
        for (int w = 0; w < kWidth; ++w) products[i].add(left.values[w], right[w]);
      }
    }
  }

  // push += sum_a exp(s_a - log_z) (means_a + C_a x), in one pass over the components.
  SUBQUAD_DEVICE void add_components(std::int64_t first, int count, const place& at,
                                     shared_memory& shared) const {
    log_sum<T> states[kRowsOfThread];
    int row[kRowsOfThread];
    SUBQUAD_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      states[i] = log_sum<T>::nothing();
      row[i] = row_of_group(i);
    }
    int parity = 0;
    SUBQUAD_NO_UNROLL
    for (std::int64_t a = 0; a < n_components; ++a) {
      const T log_count = log_counts[a];
      // Whatever is said of a component without keys, an infinity even.
      if (log_count == -infinity<T>()) continue;
      const channel_view<const T> covariance = covariances.from(a * covariance_stride);
      T dots[kRowsOfThread];
      SUBQUAD_UNROLL
      for (auto& dot : dots) dot = T(0);
      each_shared_channel([&](int channel) {
        block products[kRowsOfThread];
        SUBQUAD_UNROLL
        for (auto& product : products) product = block::zero();
        multiply(covariance, at.x, row, channel, products);
        block mean;
        means.load(mean, a, channel, tile.d);
        SUBQUAD_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
          const block own = block_at(at.x + row[i] * tile.stride + channel);
          SUBQUAD_UNROLL
          for (int w = 0; w < kWidth; ++w) {
            T& product = products[i].values[w];
            dots[i] = fma(own.values[w], fma(T(0.5), product, mean.values[w]), dots[i]);
            product += mean.values[w];
          }
          block_at(at.pull + row[i] * tile.stride + channel) = products[i];
        }
      });
      SUBQUAD_UNROLL
      for (auto& dot : dots) dot = over_lanes(dot);
      if (tile.shares > 1) {
        add_shares(dots, row, shared.dots[parity]);
        parity ^= 1;
      }
      T weights[kRowsOfThread];
      T factors[kRowsOfThread];  // of what was added before
      SUBQUAD_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        const T exponent = (log_count + dots[i]) * kLog2E<T>;
        const T before = states[i].shift;
        states[i].raise(exponent);
        factors[i] = power_of_2(before - states[i].shift);
        weights[i] = power_of_2(exponent - states[i].shift);
        states[i].add(weights[i]);
      }
      each_shared_channel([&](int channel) {
        SUBQUAD_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
          block& push = block_at(at.push + row[i] * tile.stride + channel);
          const block slope = block_at(at.pull + row[i] * tile.stride + channel);
          SUBQUAD_UNROLL
          for (int w = 0; w < kWidth; ++w) {
            push.values[w] = fma(weights[i], slope.values[w], factors[i] * push.values[w]);
          }
        }
      });
    }
    each_shared_channel([&](int channel) {
      SUBQUAD_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        // No component at all pushes nothing.
        const T sum = states[i].total == T(0) ? T(1) : states[i].total;
        block& push = block_at(at.push + row[i] * tile.stride + channel);
        SUBQUAD_UNROLL
        for (int w = 0; w < kWidth; ++w) push.values[w] /= sum;
      }
    });
    if (log_z.data != nullptr && share() == 0 && lane() == 0) {
      SUBQUAD_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        if (row[i] < count) log_z[first + row[i]] = states[i].value();
      }
    }
  }

  // The sums over the shares of a row, in their order.
  SUBQUAD_DEVICE void add_shares(T (&dots)[kRowsOfThread], const int (&row)[kRowsOfThread],
                                 T* of_shares) const {
    if (lane() == 0 && share() < tile.shares) {
      SUBQUAD_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) of_shares[share() * tile.rows() + row[i]] = dots[i];
    }
    __syncthreads();
    SUBQUAD_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      dots[i] = of_shares[row[i]];
      for (int other = 1; other < tile.shares; ++other) {
        dots[i] += of_shares[other * tile.rows() + row[i]];
      }
    }
  }

  // push += shifts_c + slopes_c x, c the label; labels out of range have none. Rows are taken in
  // the order of their labels, so that those of a thread share their matrices.
  SUBQUAD_DEVICE void add_own(std::int64_t first, int count, const place& at) const {
    std::int64_t* of_rows = at.starts;
    if (thread() < tile.rows()) {
      std::int64_t label = -1;
      if (thread() < count) label = labels[first + thread()];
      of_rows[thread()] = label >= 0 && label < n_labels ? label : -1;
    }
    __syncthreads();
    if (thread() < tile.rows()) {
      const std::int64_t own = of_rows[thread()];
      int rank = 0;
      for (int other = 0; other < tile.rows(); ++other) {
        rank += of_rows[other] < own || (of_rows[other] == own && other < thread());
      }
      at.order[rank] = thread();
    }
    __syncthreads();
    if (share() >= tile.shares) return;
    int row[kRowsOfThread];
    SUBQUAD_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) row[i] = at.order[group() * kRowsOfThread + i];
    std::int64_t before = -1;
    SUBQUAD_NO_UNROLL
    for (int of_label = 0; of_label < kRowsOfThread; ++of_label) {
      const std::int64_t label = of_rows[at.order[group() * kRowsOfThread + of_label]];
      if (label == before) continue;
      before = label;
      const channel_view<const T> slope = slopes.from(label * slope_stride);
      each_shared_channel([&](int channel) {
        block products[kRowsOfThread];
        SUBQUAD_UNROLL
        for (auto& product : products) product = block::zero();
        multiply(slope, at.x, row, channel, products);
        block shift;
        shifts.load(shift, label, channel, tile.d);
        SUBQUAD_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
          if (of_rows[row[i]] != label) continue;
          products[i].add(shift);
          block_at(at.push + row[i] * tile.stride + channel).add(products[i]);
        }
      });
    }
  }

  SUBQUAD_DEVICE void gather(std::int64_t first, int count, const place& at,
                             shared_memory& shared) const {
    const auto store = [&](const block& total, int row, int channel) {
      block pull;
      SUBQUAD_UNROLL
      for (int w = 0; w < kWidth; ++w) pull.values[w] = scale * total.values[w];
      block_at(at.pull + row * tile.stride + channel) = pull;
    };
    if (!elements) {
      each_row(count, [&](int row, bool exists) {
        if (!exists) return;
        each_channel([&](int channel) {
          block own;
          rows.load(own, first + row, channel, tile.d);
          store(own, row, channel);
        });
      });
      return;
    }
    for (int i = thread(); i <= count; i += kThreads) {
      at.starts[i] = elements.matrix.start(first + i);
    }
    __syncthreads();
    SUBQUAD_NO_UNROLL
    for (int channel = 0; channel < tile.d; channel += tile.lanes * kWidth) {
      elements.run(rows, at.starts, count, channel, shared.sums, store);
    }
  }

  // The gradient from push and pull, its tangent part, and the step.
  SUBQUAD_DEVICE void turn(std::int64_t first, int count, const place& at) const {
    each_row(count, [&](int row, bool exists) {
      const T* point = at.x + row * tile.stride;
      T* gradient = at.push + row * tile.stride;
      const T* pull = at.pull + row * tile.stride;
      const T null_weight = null_weights.data && exists ? null_weights[first + row] : T(0);
      // Calls body(x, gradient, index) for the lane's elements.
      const auto each = [&](auto&& body) {
        if (!exists) return;
        each_channel([&](int channel) {
          SUBQUAD_UNROLL
          for (int w = 0; w < kWidth; ++w) {
            if (channel + w < tile.d) body(point[channel + w], gradient[channel + w], channel + w);
          }
        });
      };
      T dot = 0;
      T most = 0;
      each([&](T own, T& element, int channel) {
        dot = fma(own, pull[channel], dot);
        element -= pull[channel];
        if (null.data) element = fma(null_weight, null[channel], element);
        most = fmax(most, fabs(element));
      });
      dot = over_lanes(dot);
      if (exists && attraction.data && lane() == 0) attraction[first + row] = dot;
      if (!out) return;
      T length = 0;
      if (sine != T(0)) {
        // What is left of a gradient nearly along x is mostly rounding along x: a second
        // projection takes that off; where it takes half of the square, nothing but rounding was
        // left. Divided, squares neither overflow nor vanish.
        T along = 0;
        SUBQUAD_NO_UNROLL
        for (int turn = 0; turn < 2; ++turn) {
          most = divisor(largest_over_lanes(most));
          along = 0;
          each([&](T own, T& element, int) {
            element /= most;
            along = fma(own, element, along);
          });
          along = over_lanes(along);
          most = 0;
          each([&](T own, T& element, int) {
            element = fma(-along, own, element);
            most = fmax(most, fabs(element));
          });
        }
        most = divisor(largest_over_lanes(most));
        each([&](T, T& element, int) {
          element /= most;
          length = fma(element, element, length);
        });
        length = sqrt(over_lanes(length));
        if (fabs(along) >= length * most) length = 0;
      }
      const bool stays = length == T(0);
      T norm = 0;
      each([&](T own, T& element, int) {
        element = stays ? own : fma(-sine, element / length, cosine * own);
        norm = fma(element, element, norm);
      });
      norm = sqrt(over_lanes(norm));
      if (!exists) return;
      each_channel([&](int channel) {
        block result = block_at(gradient + channel);
        SUBQUAD_UNROLL
        for (int w = 0; w < kWidth; ++w) {
          if (!stays) result.values[w] /= norm;
        }
        out.store(result, first + row, channel, tile.d);
      });
    });
  }

  static SUBQUAD_DEVICE T divisor(T most) { return most == T(0) ? T(1) : most; }
};

// A stack of symmetric matrices of which threads take neighbouring channels of a row: of each
// matrix the axis that lies closer in memory.
template <class T>
channel_view<const T> symmetric_stack(const array_view& stack) {
  array_view view = stack;
  std::int64_t strides[3] = {stack.strides[0], stack.strides[1], stack.strides[2]};
  if (strides[1] == 1) std::swap(strides[1], strides[2]);
  view.strides = strides;
  return channels_of<const T>(&view, batches<1>{}, 0, kChannels<T>, 1);
}

template <class T, class Index>
void embedding_step_as(const embedding_sizes& size, const array_view& x, const array_view& rows,
                       const embedding_terms& terms, double step, const array_view* out,
                       const array_view* attraction, const array_view* log_z,
                       const array_view& workspace) {
  using kernel = embedding_step_kernel<T, Index>;
  const row_tile<T> tile(size.n, size.d);
  workspace_layout pieces(workspace);
  T* slices = tile.in_workspace ? pieces.take<T>(tile.blocks() * tile.elements()) : nullptr;
  const auto matrix = [](const array_view* array) {
    return channels_of<const T>(array, batches<1>{}, 0, kChannels<T>);
  };
  kernel call{tile,
              terms.data ? typename kernel::row_sums({1, size.n, size.m, size.nnz, size.d},
                                                     *terms.data, *terms.indices, *terms.indptr)
                         : typename kernel::row_sums(size.d),
              matrix(&x),
              matrix(&rows),
              matrix(terms.means),
              {},
              matrix(terms.shifts),
              {},
              channels_of<T>(out, batches<1>{}, 0, kChannels<T>),
              {},
              {},
              {},
              {},
              {},
              {},
              slices,
              size.n,
              size.k,
              size.c,
              0,
              0,
              static_cast<T>(terms.scale),
              static_cast<T>(step),
              static_cast<T>(std::sqrt((1 - step) * (1 + step)))};
  if (terms.log_counts) {
    call.log_counts = vector_at<const T>(*terms.log_counts, 0);
    call.covariances = symmetric_stack<T>(*terms.covariances);
    call.covariance_stride = terms.covariances->strides[0];
  }
  if (terms.labels) {
    call.labels = vector_at<const std::int64_t>(*terms.labels, 0);
    call.slopes = symmetric_stack<T>(*terms.slopes);
    call.slope_stride = terms.slopes->strides[0];
  }
  if (terms.null) {
    call.null_weights = vector_at<const T>(*terms.null_weights, 0);
    call.null = vector_at<const T>(*terms.null, 0);
  }
  if (attraction) call.attraction = vector_at<T>(*attraction, 0);
  if (log_z) call.log_z = vector_at<T>(*log_z, 0);
  const std::size_t of_rows = slices ? 0 : static_cast<std::size_t>(tile.elements()) * sizeof(T);
  const auto count = static_cast<std::size_t>(tile.rows());
  const std::size_t bytes = offsetof(typename kernel::shared_memory, rows) + of_rows +
                            (count + 1) * sizeof(std::int64_t) + count * sizeof(int);
  launch_with_memory(tile.blocks(), std::max(bytes, sizeof(typename kernel::shared_memory)), call);
}

template <class T>
std::size_t workspace_as(std::int64_t n, std::int64_t d) {
  const row_tile<T> tile(n, d);
  workspace_layout workspace;
  if (tile.in_workspace) workspace.take<T>(tile.blocks() * tile.elements());
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

// None, but where the rows of a tile are more than shared memory holds: of up to 4096 rows, three
// numbers for each channel.
std::size_t embedding_step_workspace(std::int64_t n, std::int64_t, std::int64_t, std::int64_t d,
                                     std::int64_t, std::int64_t, std::int64_t itemsize) {
  return (itemsize == 4 ? cuda::workspace_as<float> : cuda::workspace_as<double>)(n, d);
}

void embedding_step(const array_view& x, const array_view& rows, const embedding_terms& terms,
                    double step, const array_view* out, const array_view* attraction,
                    const array_view* log_z, const array_view& workspace) {
  const embedding_sizes size = check_embedding_step(x, rows, terms, step, out, attraction, log_z);
  if (size.d > cuda::kMostChannels) {
    throw invalid_argument("x: expected at most 2^26 channels on CUDA, got " +
                           std::to_string(size.d));
  }
  const bool is_float = x.type == dtype::float32;
  const bool is_short = terms.indices == nullptr || terms.indices->type == dtype::int32;
  (is_float   ? is_short ? cuda::embedding_step_as<float, std::int32_t>
                         : cuda::embedding_step_as<float, std::int64_t>
   : is_short ? cuda::embedding_step_as<double, std::int32_t>
              : cuda::embedding_step_as<double, std::int64_t>)(size, x, rows, terms, step, out,
                                                               attraction, log_z, workspace);
}

}  // namespace subquad::core
