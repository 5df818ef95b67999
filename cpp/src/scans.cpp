#include "scans_core.hpp"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>

#include "arguments.hpp"
#include "isa.hpp"
#include "kernels/scans_kernels.hpp"
#include "scans_checks.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(scans)

namespace subquad::core {
namespace {

template <class T>
const scans_functions<T>& functions();
template <>
const scans_functions<float>& functions() {
  return scans_table().f32;
}
template <>
const scans_functions<double>& functions() {
  return scans_table().f64;
}

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The lanes of a call: dimensions other than the scan's, those of length 1 left out, the one with
// the smallest steps in the first array last, neighbours that are one in every array merged.
// `full` of the arrays have the scan's dimension too, at their end; absent ones are null.
template <int kArrays>
class lane_grid {
 public:
  lane_grid(const array_view* const (&arrays)[kArrays], int full) {
    const array_view& first = *arrays[0];
    for (std::int32_t axis = 0; axis + 1 < first.ndim; ++axis) {
      if (first.shape[axis] == 1) continue;
      dimension added{first.shape[axis], {}};
      for (int a = 0; a < kArrays; ++a) {
        if (arrays[a] != nullptr) added.strides[a] = arrays[a]->strides[axis];
      }
      std::int32_t at = rank_++;
      for (; at > 0 && before(added, dimensions_[at - 1]); --at) {
        dimensions_[at] = dimensions_[at - 1];
      }
      dimensions_[at] = added;
    }
    while (rank_ > 1 && merges_last()) --rank_;
    for (std::int32_t i = 0; i < rank_; ++i) count_ *= dimensions_[i].length;
    for (int a = 0; a < full; ++a) {
      if (arrays[a] != nullptr && stride(a) != 1) contiguous_ = false;
    }
  }

  std::int64_t count() const { return count_; }
  // Lanes along the last dimension, and the step from one to the next.
  std::int64_t inner() const { return rank_ > 0 ? dimensions_[rank_ - 1].length : 1; }
  std::int64_t stride(int array) const {
    return rank_ > 0 ? dimensions_[rank_ - 1].strides[array] : 1;
  }
  // Whether neighbours along the last dimension are neighbours in memory, in every full array.
  bool contiguous() const { return contiguous_; }

  std::int64_t offset(int array, std::int64_t lane) const {
    std::int64_t offset = 0;
    for (std::int32_t i = rank_ - 1; i >= 0; --i) {
      offset += lane % dimensions_[i].length * dimensions_[i].strides[array];
      lane /= dimensions_[i].length;
    }
    return offset;
  }

 private:
  struct dimension {
    std::int64_t length;
    std::int64_t strides[kArrays];
  };

  static bool before(const dimension& a, const dimension& b) {
    const std::int64_t of_a = std::abs(a.strides[0]);
    const std::int64_t of_b = std::abs(b.strides[0]);
    return of_b != 0 && (of_a == 0 || of_a > of_b);
  }

  bool merges_last() {
    dimension& outer = dimensions_[rank_ - 2];
    const dimension& inner = dimensions_[rank_ - 1];
    for (int a = 0; a < kArrays; ++a) {
      if (outer.strides[a] != inner.strides[a] * inner.length) return false;
    }
    for (int a = 0; a < kArrays; ++a) outer.strides[a] = inner.strides[a];
    outer.length *= inner.length;
    return true;
  }

  dimension dimensions_[kMaxDimensions];
  std::int32_t rank_ = 0;
  std::int64_t count_ = 1;
  bool contiguous_ = true;
};

// What a task reads, and as much again that it writes, stay in half of a second-level cache of
// 512 KiB.
constexpr std::int64_t kChunkBytes = std::int64_t{128} << 10;

// Lanes side by side that are worth a vector of their own, whatever the level.
constexpr std::int64_t kVectorBytes = 32;

// How a scan is cut into tasks: chunks of time by groups of lanes. A function of shapes and strides
// alone, so that results do not depend on the number of threads.
struct partition {
  bool columns;  // lanes in the lanes of vectors
  std::int64_t lanes;
  std::int64_t inner;
  std::int64_t width;  // lanes of a group, the last of each inner dimension apart
  std::int64_t groups_of_inner;
  std::int64_t groups;
  std::int64_t length;
  std::int64_t chunk;  // entries, a multiple of `block` where there are several chunks
  std::int64_t chunks;
  std::int64_t block;  // entries between saved states

  partition(bool contiguous, std::int64_t all_lanes, std::int64_t inner_lanes, std::int64_t n,
            std::int64_t itemsize)
      : lanes(all_lanes), inner(inner_lanes), length(n) {
    const std::int64_t elements = kChunkBytes / itemsize;
    columns = contiguous && inner * itemsize >= kVectorBytes;
    block = columns ? kScanColumnBlock : kScanRowBlock;
    if (columns) {
      width = divide_up(divide_up(inner, divide_up(inner, kScanWidth)), 16) * 16;
    } else {
      width = std::clamp<std::int64_t>(elements / std::max<std::int64_t>(1, n), 1, kScanWidth);
    }
    width = std::max<std::int64_t>(1, std::min(width, inner));
    groups_of_inner = divide_up(inner, width);
    groups = inner > 0 ? lanes / inner * groups_of_inner : 0;
    // Enough groups for any number of threads need no short chunks besides.
    chunk = columns ? elements / width * (groups >= 64 ? 8 : 1) : elements;
    chunk = std::max<std::int64_t>(1, std::min(divide_up(chunk, block) * block, n));
    chunks = divide_up(n, chunk);
  }

  std::int64_t tasks() const { return chunks * groups; }
  std::int64_t blocks() const { return divide_up(length, block); }
};

// The most that any partition of so many lanes takes, whatever their strides.
struct largest_partition {
  std::int64_t chunks;
  std::int64_t flags;
  std::int64_t blocks;

  largest_partition(std::int64_t lanes, std::int64_t n, std::int64_t itemsize) {
    const std::int64_t width = std::clamp<std::int64_t>(divide_up(lanes, 16) * 16, 1, kScanWidth);
    chunks = divide_up(n, kChunkBytes / itemsize / (lanes * itemsize < kVectorBytes ? 1 : width));
    flags = (chunks + 1) * lanes;
    blocks = divide_up(n, kScanColumnBlock) * lanes;
  }
};

// One after another in time: what a task leaves to the next of its lanes, and whether it has.
class relay {
 public:
  relay(workspace_layout& workspace, std::int64_t count, bool in_memory)
      : flags_(workspace.take<std::atomic<std::uint32_t>>(count)) {
    if (!in_memory) return;
    for (std::int64_t i = 0; i < count; ++i) new (flags_ + i) std::atomic<std::uint32_t>(0);
  }

  bool ready(std::int64_t index) const {
    return flags_[index].load(std::memory_order_acquire) != 0;
  }
  void publish(std::int64_t index) { flags_[index].store(1, std::memory_order_release); }

  // Tasks are handed out in order, so that the one waited for runs and waits for none after it.
  void wait(std::int64_t index) const {
    for (int spins = 0; !ready(index); ++spins) {
      if (spins >= 1024) sched_yield();
    }
  }

 private:
  std::atomic<std::uint32_t>* flags_;
};

// Borders between runs of equal numbers.
class run_borders {
 public:
  explicit run_borders(const array_view* segments)
      : numbers_(segments != nullptr ? vector_at<const std::int64_t>(*segments, 0)
                                     : vector_view<const std::int64_t>{}) {}

  // Whether a run begins at entry i > 0.
  bool at(std::int64_t i) const { return numbers_ && numbers_[i] != numbers_[i - 1]; }

  // The first border in (begin, end), else end.
  std::int64_t next(std::int64_t begin, std::int64_t end) const {
    if (!numbers_) return end;
    constexpr std::int64_t kStep = 64;
    std::int64_t i = begin + 1;
    for (; i + kStep <= end; i += kStep) {
      std::int64_t differences = 0;
      for (std::int64_t j = i; j < i + kStep; ++j) differences |= numbers_[j] ^ numbers_[j - 1];
      if (differences != 0) break;
    }
    while (i < end && !at(i)) ++i;
    return std::min(i, end);
  }

  // The last border in (begin, end), else begin.
  std::int64_t previous(std::int64_t begin, std::int64_t end) const {
    if (!numbers_) return begin;
    std::int64_t i = end - 1;
    while (i > begin && !at(i)) --i;
    return std::max(i, begin);
  }

 private:
  vector_view<const std::int64_t> numbers_;
};

template <class T>
constexpr scan_state<T> kEmpty{0, T(0), -kInfinity<T>};

// The state whose logarithm is log_sum + remainder.
template <class T>
scan_state<T> state_of(T log_sum, T remainder) {
  const double total = static_cast<double>(log_sum) + static_cast<double>(remainder);
  if (total == -kInfinity<double>) return kEmpty<T>;
  if (!std::isfinite(total)) return {1, T(0), static_cast<T>(total)};
  const T reference = std::abs(remainder) < T(1) ? log_sum : static_cast<T>(total);
  const double rest = (static_cast<double>(log_sum) - static_cast<double>(reference)) +
                      static_cast<double>(remainder);
  return {std::exp(rest), T(0), reference};
}

// The logarithm of a state, rounded to T, and what that took.
template <class T>
struct rounded_log {
  T value;
  T remainder;
};

template <class T>
rounded_log<T> log_of(const scan_state<T>& state) {
  if (!std::isfinite(state.reference)) return {state.reference, T(0)};
  const double low = static_cast<double>(state.low);
  const double reference = static_cast<double>(state.reference);
  const double log_sum = std::log(state.sum) + low / state.sum;
  const double total = reference + log_sum;
  const double part = total - reference;
  const double lost = (reference - (total - part)) + (log_sum - part);
  const T value = static_cast<T>(total);
  if (!std::isfinite(value)) return {value, T(0)};
  return {value, static_cast<T>((total - static_cast<double>(value)) + lost)};
}

double work_of(std::int64_t lanes, std::int64_t n, double per_element) {
  return static_cast<double>(lanes) * static_cast<double>(n) * per_element;
}

// Where the lanes of one task lie.
struct lane_group {
  std::int64_t first;
  std::int64_t width;

  lane_group(const partition& cut, std::int64_t index) {
    const std::int64_t begin = index % cut.groups_of_inner * cut.width;
    first = index / cut.groups_of_inner * cut.inner + begin;
    width = std::min(cut.width, cut.inner - begin);
  }
};

template <class T>
struct logcumsumexp_layout {
  scan_state<T>* states;  // [chunk][lane]: before the chunk
  relay ready;            // [chunk][group]

  logcumsumexp_layout(workspace_layout& workspace, std::int64_t chunks, std::int64_t lanes,
                      std::int64_t flags, bool in_memory)
      : states(workspace.take<scan_state<T>>((chunks + 1) * lanes)),
        ready(workspace, flags, in_memory) {}
};

template <class T>
void logcumsumexp_as(const array_view& x, const array_view* log_sum, const array_view* remainder,
                     const array_view* segments, bool exclusive, const array_view& out,
                     const array_view* final_log_sum, const array_view* final_remainder,
                     const array_view& workspace) {
  enum { kX, kOut, kLogSum, kRemainder, kFinalLogSum, kFinalRemainder, kArrays };
  const array_view* const arrays[kArrays] = {&x,        &out,          log_sum,
                                             remainder, final_log_sum, final_remainder};
  const lane_grid<kArrays> grid(arrays, kOut + 1);
  const std::int64_t n = length_from_end(x, 1);
  if (grid.count() == 0) return;
  const partition cut(grid.contiguous(), grid.count(), grid.inner(), n, sizeof(T));
  workspace_layout pieces(workspace);
  logcumsumexp_layout<T> layout(pieces, cut.chunks, cut.lanes, (cut.chunks + 1) * cut.groups, true);
  const run_borders borders(segments);
  const auto& kernels = functions<T>();
  const auto element = [&](const array_view& array, int index, std::int64_t lane) -> T& {
    return static_cast<T*>(array.data)[grid.offset(index, lane)];
  };
  const auto load_states = [&](const lane_group& group) {
    for (std::int64_t lane = group.first; lane < group.first + group.width; ++lane) {
      layout.states[lane] =
          log_sum != nullptr ? state_of<T>(element(*log_sum, kLogSum, lane),
                                           remainder ? element(*remainder, kRemainder, lane) : T(0))
                             : kEmpty<T>;
    }
  };
  const auto store_final = [&](const lane_group& group) {
    for (std::int64_t lane = group.first; lane < group.first + group.width; ++lane) {
      const auto value = log_of<T>(layout.states[cut.chunks * cut.lanes + lane]);
      if (final_log_sum) element(*final_log_sum, kFinalLogSum, lane) = value.value;
      if (final_remainder) element(*final_remainder, kFinalRemainder, lane) = value.remainder;
    }
  };
  const bool wants_final = final_log_sum != nullptr || final_remainder != nullptr;
  if (n == 0) {
    for (std::int64_t g = 0; g < cut.groups; ++g) {
      const lane_group group(cut, g);
      load_states(group);
      store_final(group);
    }
    return;
  }
  const auto scan = cut.columns ? kernels.columns : kernels.rows;
  const int threads = threads_for(work_of(cut.lanes, n, 24), available_threads());
  parallel_for(cut.tasks(), threads, [&](std::int64_t index, int) {
    const std::int64_t c = index / cut.groups;
    const std::int64_t g = index % cut.groups;
    const lane_group group(cut, g);
    const std::int64_t begin = c * cut.chunk;
    const std::int64_t end = std::min(n, begin + cut.chunk);
    scan_state<T>* const before = layout.states + c * cut.lanes + group.first;
    scan_state<T>* const after = before + cut.lanes;
    scan_state<T> empty[kScanWidth];
    scan_state<T> local[kScanWidth];
    std::fill_n(empty, group.width, kEmpty<T>);
    const matrix_view<const T> from{static_cast<const T*>(x.data) + grid.offset(kX, group.first),
                                    x.strides[x.ndim - 1], grid.stride(kX)};
    const matrix_view<T> to{static_cast<T*>(out.data) + grid.offset(kOut, group.first),
                            out.strides[out.ndim - 1], grid.stride(kOut)};
    const auto leave = [&](const scan_state<T>* entry) {
      std::copy_n(entry, group.width, after);
      kernels.merge(after, local, group.width);
      layout.ready.publish((c + 1) * cut.groups + g);
    };
    logcumsumexp_task<T> task{};
    task.width = group.width;
    task.local = local;
    const bool continues = begin > 0 && !borders.at(begin);
    if (begin == 0) load_states(group);
    bool left = false;
    if (begin > 0 && end < n && !layout.ready.ready(index)) {
      // The next task waits for what this one leaves: that comes first, then the outputs.
      const std::int64_t last = borders.previous(begin, end);
      task.x = from.from(last);
      task.n = end - last;
      scan(task);
      if (last == begin && continues) layout.ready.wait(index);
      leave(last == begin && continues ? before : empty);
      left = true;
    }
    if (continues) layout.ready.wait(index);
    for (std::int64_t p = begin; p < end;) {
      const std::int64_t q = borders.next(p, end);
      const bool begins = p > begin || !continues;
      const bool ends = q < end || q == n || borders.at(q);
      task.entry = p == 0 || !begins ? before : empty;
      task.x = from.from(p);
      task.n = q - p;
      task.out = to.from(exclusive ? p + 1 : p);
      task.n_out = task.n - (exclusive && ends ? 1 : 0);
      scan(task);
      for (std::int64_t l = 0; exclusive && begins && l < group.width; ++l) {
        to(p, l) = log_of<T>(task.entry[l]).value;
      }
      p = q;
    }
    if (!left) leave(task.entry);
    if (end == n && wants_final) store_final(group);
  });
}

template <class T>
struct logcumsumexp_vjp_layout {
  scan_state<T>* states;  // [chunk][lane]: before the chunk
  double* later;          // [chunk][lane]: what enters the chunk from its end
  scan_state<T>* blocks;  // [lane group][block][lane]
  relay ready;            // [chunk][group]

  logcumsumexp_vjp_layout(workspace_layout& workspace, std::int64_t chunks, std::int64_t lanes,
                          std::int64_t flags, std::int64_t blocks_count, bool in_memory)
      : states(workspace.take<scan_state<T>>((chunks + 1) * lanes)),
        later(workspace.take<double>((chunks + 1) * lanes)),
        blocks(workspace.take<scan_state<T>>(blocks_count)),
        ready(workspace, flags, in_memory) {}
};

template <class T>
void logcumsumexp_vjp_as(const array_view& x, const array_view* log_sum,
                         const array_view* remainder, const array_view* segments, bool exclusive,
                         const array_view* grad, const array_view* grad_final,
                         const array_view* grad_x, const array_view* grad_log_sum,
                         const array_view& workspace) {
  enum { kX, kGrad, kGradX, kLogSum, kRemainder, kGradFinal, kGradLogSum, kArrays };
  const array_view* const arrays[kArrays] = {&x,        grad,       grad_x,      log_sum,
                                             remainder, grad_final, grad_log_sum};
  const lane_grid<kArrays> grid(arrays, kGradX + 1);
  const std::int64_t n = length_from_end(x, 1);
  if (grid.count() == 0) return;
  const partition cut(grid.contiguous(), grid.count(), grid.inner(), n, sizeof(T));
  workspace_layout pieces(workspace);
  logcumsumexp_vjp_layout<T> layout(pieces, cut.chunks, cut.lanes, (cut.chunks + 1) * cut.groups,
                                    cut.blocks() * cut.lanes, true);
  const run_borders borders(segments);
  const auto& kernels = functions<T>();
  const auto element = [&](const array_view& array, int index, std::int64_t lane) -> T& {
    return static_cast<T*>(array.data)[grid.offset(index, lane)];
  };
  const auto load_states = [&](const lane_group& group) {
    for (std::int64_t lane = group.first; lane < group.first + group.width; ++lane) {
      layout.states[lane] =
          log_sum != nullptr ? state_of<T>(element(*log_sum, kLogSum, lane),
                                           remainder ? element(*remainder, kRemainder, lane) : T(0))
                             : kEmpty<T>;
    }
  };
  // A gradient of log(state), in units of e^-reference.
  const auto seed_of = [](const scan_state<T>& state, T gradient) -> double {
    if (state.reference == -kInfinity<T> || gradient == T(0)) return 0;
    if (!std::isfinite(state.reference)) return std::numeric_limits<double>::quiet_NaN();
    return static_cast<double>(gradient) / state.sum;
  };
  const auto blocks_of = [&](std::int64_t c, const lane_group& group) {
    return layout.blocks + group.first * cut.blocks() + c * cut.chunk / cut.block * group.width;
  };
  const auto from_of = [&](const lane_group& group) -> matrix_view<const T> {
    return {static_cast<const T*>(x.data) + grid.offset(kX, group.first), x.strides[x.ndim - 1],
            grid.stride(kX)};
  };
  // The states before the blocks of a chunk, and after it those of its last run alone.
  const auto save_states = [&](std::int64_t c, const lane_group& group) {
    const std::int64_t begin = c * cut.chunk;
    const std::int64_t end = std::min(n, begin + cut.chunk);
    logcumsumexp_task<T> task{};
    task.width = group.width;
    task.local = layout.states + (c + 1) * cut.lanes + group.first;
    for (std::int64_t p = begin; p < end;) {
      const std::int64_t q = borders.next(p, end);
      task.x = from_of(group).from(p);
      task.n = q - p;
      task.blocks = blocks_of(c, group) + (p - begin) / cut.block * group.width;
      if (q == end || task.n > cut.block) (cut.columns ? kernels.columns : kernels.rows)(task);
      p = q;
    }
  };
  // Turns the state after a chunk's last run into the state after the chunk.
  const auto merge_states = [&](std::int64_t c, const lane_group& group) {
    const std::int64_t begin = c * cut.chunk;
    const std::int64_t end = std::min(n, begin + cut.chunk);
    if (borders.previous(begin, end) != begin || (begin > 0 && borders.at(begin))) return;
    scan_state<T> local[kScanWidth];
    scan_state<T>* const after = layout.states + (c + 1) * cut.lanes + group.first;
    std::copy_n(after, group.width, local);
    std::copy_n(after - cut.lanes, group.width, after);
    kernels.merge(after, local, group.width);
  };
  const auto finish = [&](const lane_group& group, const scan_adjoint* adjoint) {
    for (std::int64_t l = 0; grad_log_sum && l < group.width; ++l) {
      const std::int64_t lane = group.first + l;
      const scan_state<T>& state = layout.states[lane];
      double total = 0;
      if (state.reference != -kInfinity<T>) {
        total = adjoint[l].own;
        if (std::isfinite(state.reference)) total *= state.sum;
        if (exclusive && grad && n > 0) {
          const T first = element(*grad, kGrad, lane);
          if (std::isfinite(state.reference)) {
            total += static_cast<double>(first);
          } else if (first != T(0)) {
            total = std::numeric_limits<double>::quiet_NaN();
          }
        }
      }
      element(*grad_log_sum, kGradLogSum, lane) = static_cast<T>(total);
    }
  };
  if (n == 0) {
    for (std::int64_t g = 0; g < cut.groups; ++g) {
      const lane_group group(cut, g);
      load_states(group);
      scan_adjoint adjoint[kScanWidth];
      for (std::int64_t l = 0; l < group.width; ++l) {
        const std::int64_t lane = group.first + l;
        adjoint[l].own =
            grad_final ? seed_of(layout.states[lane], element(*grad_final, kGradFinal, lane)) : 0;
      }
      finish(group, adjoint);
    }
    return;
  }
  const int threads = threads_for(work_of(cut.lanes, n, 40), available_threads());
  if (cut.chunks > 1) {
    parallel_for(cut.tasks(), threads, [&](std::int64_t index, int) {
      save_states(index / cut.groups, lane_group(cut, index % cut.groups));
    });
    parallel_for(cut.groups, threads, [&](std::int64_t g, int) {
      const lane_group group(cut, g);
      load_states(group);
      for (std::int64_t c = 0; c < cut.chunks; ++c) merge_states(c, group);
    });
  }
  const auto reverse = cut.columns ? kernels.columns_vjp : kernels.rows_vjp;
  parallel_for(cut.tasks(), threads, [&](std::int64_t index, int) {
    const std::int64_t c = cut.chunks - 1 - index / cut.groups;
    const std::int64_t g = index % cut.groups;
    const lane_group group(cut, g);
    const std::int64_t begin = c * cut.chunk;
    const std::int64_t end = std::min(n, begin + cut.chunk);
    if (cut.chunks == 1) {
      load_states(group);
      save_states(c, group);
      merge_states(c, group);
    }
    const scan_state<T>* const before = layout.states + c * cut.lanes + group.first;
    const scan_state<T>* const after = before + cut.lanes;
    double* const later = layout.later + (c + 1) * cut.lanes + group.first;
    scan_state<T> empty[kScanWidth];
    scan_adjoint adjoint[kScanWidth];
    std::fill_n(empty, group.width, kEmpty<T>);
    if (end == n) {
      for (std::int64_t l = 0; l < group.width; ++l) {
        later[l] =
            grad_final ? seed_of(after[l], element(*grad_final, kGradFinal, group.first + l)) : 0;
      }
    }
    const matrix_view<const T> from = from_of(group);
    const bool continues = begin > 0 && !borders.at(begin);
    const bool followed = end == n || !borders.at(end);
    const std::int64_t awaited = (c + 1) * cut.groups + g;
    logcumsumexp_vjp_task<T> task{};
    task.width = group.width;
    task.adjoint = adjoint;
    task.later = later;
    const auto run = [&](std::int64_t p, std::int64_t q, bool writes) {
      const bool ends = q < end || q == n || borders.at(q);
      task.x = from.from(p);
      task.n = q - p;
      if (grad) {
        task.grad = {static_cast<const T*>(grad->data) + grid.offset(kGrad, group.first),
                     grad->strides[grad->ndim - 1], grid.stride(kGrad)};
        task.grad = task.grad.from(exclusive ? p + 1 : p);
        task.n_grad = task.n - (exclusive && ends ? 1 : 0);
      }
      if (grad_x && writes) {
        task.grad_x = {static_cast<T*>(grad_x->data) + grid.offset(kGradX, group.first),
                       grad_x->strides[grad_x->ndim - 1], grid.stride(kGradX)};
        task.grad_x = task.grad_x.from(p);
      } else {
        task.grad_x = {};
      }
      task.entry = p == 0 || (p == begin && continues) ? before : empty;
      task.blocks = blocks_of(c, group) + (p - begin) / cut.block * group.width;
      task.end = q == end && followed ? after : nullptr;
      reverse(task);
    };
    const auto leave = [&](bool with_later) {
      for (std::int64_t l = 0; l < group.width; ++l) {
        if (with_later) adjoint[l].own += adjoint[l].scale * later[l];
        layout.later[c * cut.lanes + group.first + l] = adjoint[l].own;
      }
      layout.ready.publish(c * cut.groups + g);
    };
    bool left = false;
    const bool waits = end < n && followed;
    if (begin > 0 && waits && !layout.ready.ready(awaited)) {
      const std::int64_t q = borders.next(begin, end);
      run(begin, q, false);
      if (q == end) layout.ready.wait(awaited);
      leave(q == end);
      left = true;
    }
    if (waits) layout.ready.wait(awaited);
    for (std::int64_t q = end; q > begin;) {
      const std::int64_t p = borders.previous(begin, q);
      run(p, q, true);
      if (p == begin && !left) leave(q == end && followed);
      q = p;
    }
    if (begin == 0) finish(group, adjoint);
  });
}

}  // namespace

std::size_t logcumsumexp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize) {
  workspace_layout workspace;
  const largest_partition most(lanes, n, itemsize);
  if (itemsize == 4) {
    logcumsumexp_layout<float>(workspace, most.chunks, lanes, most.flags, false);
  } else {
    logcumsumexp_layout<double>(workspace, most.chunks, lanes, most.flags, false);
  }
  return workspace.size();
}

void logcumsumexp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                  const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                  const array_view& out, const array_view* final_log_sum,
                  const array_view* final_remainder, const array_view& workspace) {
  check_logcumsumexp(x, log_sum, remainder, segments, axis, out, final_log_sum, final_remainder);
  const scan_view x_view(x, axis, reverse);
  const scan_view out_view(out, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  (x.type == dtype::float32
       ? logcumsumexp_as<float>
       : logcumsumexp_as<double>)(x_view.get(), log_sum, remainder, segments_view.get(), exclusive,
                                  out_view.get(), final_log_sum, final_remainder, workspace);
}

std::size_t logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize) {
  workspace_layout workspace;
  const largest_partition most(lanes, n, itemsize);
  if (itemsize == 4) {
    logcumsumexp_vjp_layout<float>(workspace, most.chunks, lanes, most.flags, most.blocks, false);
  } else {
    logcumsumexp_vjp_layout<double>(workspace, most.chunks, lanes, most.flags, most.blocks, false);
  }
  return workspace.size();
}

void logcumsumexp_vjp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                      const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                      const array_view* grad, const array_view* grad_final,
                      const array_view* grad_x, const array_view* grad_log_sum,
                      const array_view& workspace) {
  check_logcumsumexp_vjp(x, log_sum, remainder, segments, axis, grad, grad_final, grad_x,
                         grad_log_sum);
  const scan_view x_view(x, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  const optional_scan_view grad_view(grad, axis, reverse);
  const optional_scan_view grad_x_view(grad_x, axis, reverse);
  (x.type == dtype::float32
       ? logcumsumexp_vjp_as<float>
       : logcumsumexp_vjp_as<double>)(x_view.get(), log_sum, remainder, segments_view.get(),
                                      exclusive, grad_view.get(), grad_final, grad_x_view.get(),
                                      grad_log_sum, workspace);
}

}  // namespace subquad::core
