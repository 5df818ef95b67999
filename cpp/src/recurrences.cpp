#include <cmath>
#include <limits>

#include "isa.hpp"
#include "kernels/recurrences_kernels.hpp"
#include "lane_partition.hpp"
#include "scans_checks.hpp"
#include "scans_core.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(recurrences)

namespace subquad::core {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLowest = std::numeric_limits<double>::lowest();

template <class T>
const recurrences_functions<T>& functions();
template <>
const recurrences_functions<float>& functions() {
  return recurrences_table().f32;
}
template <>
const recurrences_functions<double>& functions() {
  return recurrences_table().f64;
}

// The state of one lane, as the kernels keep it for each of a tile.
struct lane_state {
  double reference = kLowest;
  double remainder = 0;
  double sum = 0;

  static lane_state of(double log_h) {
    if (log_h == -kInfinity) return {};
    return {log_h, 0, 1};
  }
  static lane_state in(const recurrence_state& tile, int lane) {
    return {tile.reference[lane], tile.remainder[lane], tile.sum[lane]};
  }
  void write(recurrence_state& tile, int lane) const {
    tile.reference[lane] = reference;
    tile.remainder[lane] = remainder;
    tile.sum[lane] = sum;
  }
};

// h after a piece of a row: exp(scale) `before`, plus what the piece makes of an empty state.
lane_state follow(const lane_state& before, double log_scale, double remainder,
                  const lane_state& piece) {
  lane_state state;
  const double sum = before.reference + log_scale;
  if (log_scale != -kInfinity && sum != -kInfinity) {
    const double part = sum - before.reference;
    const double lost = (before.reference - (sum - part)) + (log_scale - part);
    state = {sum, std::isfinite(sum) ? before.remainder + (remainder + lost) : 0, before.sum};
  }
  if (piece.sum == 0) return state;
  const double bounded = state.reference == kInfinity ? -kLowest : state.reference;
  const double d = (piece.reference - bounded) + (piece.remainder - state.remainder);
  if (d > kRecurrenceThreshold) {
    return {piece.reference, piece.remainder, state.sum * std::exp(-d) + piece.sum};
  }
  state.sum += piece.sum * std::exp(d);
  return state;
}

struct piece_index {
  std::int64_t tile;
  int lane;

  explicit piece_index(std::int64_t index)
      : tile(index / kTileLanes), lane(static_cast<int>(index % kTileLanes)) {}
};

template <class T>
double element(const array_view* array, std::int64_t offset) {
  return static_cast<double>(static_cast<const T*>(array->data)[offset]);
}

// States before the first steps of a tile's lanes, where no row is cut.
template <class T>
void begin(const lane_partition& cut, const array_view* state, std::int64_t index,
           recurrence_state& states) {
  std::int64_t offsets[kTileLanes] = {};
  if (state) cut.offsets(*state, 0, index, offsets);
  for (int c = 0; c < kTileLanes; ++c) {
    const bool in_use = index * kTileLanes + c < cut.lanes;
    (state && in_use ? lane_state::of(element<T>(state, offsets[c])) : lane_state{})
        .write(states, c);
  }
}

// Makes of what the pieces do to an empty state the states before them.
template <class T>
void connect(const lane_partition& cut, const array_view* state, const recurrence_scale* scales,
             recurrence_state* states) {
  for (std::int64_t row = 0; row < cut.rows; ++row) {
    lane_state before;
    if (state) {
      const piece_index at(row * cut.pieces);
      std::int64_t offsets[kTileLanes];
      cut.offsets(*state, 0, at.tile, offsets);
      before = lane_state::of(element<T>(state, offsets[at.lane]));
    }
    for (std::int64_t piece = 0; piece < cut.pieces; ++piece) {
      const piece_index at(row * cut.pieces + piece);
      const lane_state after =
          follow(before, scales[at.tile].log_scale[at.lane], scales[at.tile].remainder[at.lane],
                 lane_state::in(states[at.tile], at.lane));
      before.write(states[at.tile], at.lane);
      before = after;
    }
  }
}

// As scan_views.
struct recurrence_arguments {
  const array_view& log_a;
  const array_view& log_b;
  const array_view* state;
  const array_view* segments;
};

// What every pass over a tile reads.
template <class T>
recurrence_task<T> task_of(const lane_partition& cut, const recurrence_arguments& with,
                           std::int64_t index) {
  recurrence_task<T> task{};
  task.tile = cut.tile(index);
  task.log_a = cut.view<const T>(with.log_a, index);
  task.log_b = cut.view<const T>(with.log_b, index);
  if (with.segments) task.segments = vector_at<const std::int64_t>(*with.segments, 0);
  task.fresh = with.state == nullptr;
  return task;
}

template <class T>
struct forward_layout {
  recurrence_state* states = nullptr;  // of each tile, where rows are cut
  recurrence_scale* scales = nullptr;
  workspace_layout::slots slots;

  forward_layout(workspace_layout& workspace, const lane_partition& cut) {
    if (cut.is_cut()) {
      states = workspace.take<recurrence_state>(cut.tiles);
      scales = workspace.take<recurrence_scale>(cut.tiles);
    }
    slots = workspace.take_slots(functions<T>().recurrence_scratch, cut.tiles);
  }
};

template <class T>
void summarise(const lane_partition& cut, const recurrence_arguments& with,
               const workspace_layout::slots& slots, int threads, recurrence_state* states,
               recurrence_scale* scales) {
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    recurrence_task<T> task = task_of<T>(cut, with, index);
    task.state = states + index;
    task.scale = scales + index;
    task.scratch = slots[slot];
    functions<T>().summarise(task);
  });
  connect<T>(cut, with.state, scales, states);
}

template <class T>
void run_forward(const recurrence_arguments& with, const array_view& out,
                 const array_view& workspace) {
  const lane_partition cut(row_count(with.log_a), with.log_a.shape[with.log_a.ndim - 1]);
  if (cut.rows == 0 || cut.n == 0) return;
  workspace_layout pieces(workspace);
  const forward_layout<T> layout(pieces, cut);
  const int threads = threads_for(cut.work(1), layout.slots.count);
  if (cut.is_cut()) {
    summarise<T>(cut, with, layout.slots, threads, layout.states, layout.scales);
  }
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    recurrence_state state;
    recurrence_task<T> task = task_of<T>(cut, with, index);
    task.out = cut.view<T>(out, index);
    task.state = cut.is_cut() ? layout.states + index : &state;
    task.scratch = layout.slots[slot];
    if (!cut.is_cut()) begin<T>(cut, with.state, index, state);
    functions<T>().scan(task);
  });
}

// Where rows are cut, every tile keeps what its pieces need; otherwise a slot does for its tile.
template <class T>
struct reverse_layout {
  recurrence_state* states = nullptr;
  recurrence_scale* scales = nullptr;
  recurrence_link* links = nullptr;
  recurrence_state* saved = nullptr;
  std::int64_t blocks;
  std::size_t saved_bytes;  // of a slot
  workspace_layout::slots slots;

  reverse_layout(workspace_layout& workspace, const lane_partition& cut)
      : blocks(divide_up(cut.length, kBlockSteps)),
        saved_bytes(cut.is_cut() ? 0
                                 : static_cast<std::size_t>(blocks) * sizeof(recurrence_state)) {
    if (cut.is_cut()) {
      states = workspace.take<recurrence_state>(cut.tiles);
      scales = workspace.take<recurrence_scale>(cut.tiles);
      links = workspace.take<recurrence_link>(cut.tiles);
      saved = workspace.take<recurrence_state>(cut.tiles * blocks);
    }
    slots = workspace.take_slots(saved_bytes + functions<T>().recurrence_scratch, cut.tiles);
  }

  recurrence_state* saved_of(std::int64_t index, int slot) const {
    return saved ? saved + index * blocks : static_cast<recurrence_state*>(slots[slot]);
  }
  void* scratch_of(int slot) const { return static_cast<char*>(slots[slot]) + saved_bytes; }
};

template <class T>
void set_zero(const array_view& array, const lane_partition& cut) {
  for (std::int64_t index = 0; index < cut.tiles; ++index) {
    std::int64_t offsets[kTileLanes];
    cut.offsets(array, 0, index, offsets);
    for (int c = 0; c < kTileLanes && index * kTileLanes + c < cut.lanes; ++c) {
      static_cast<T*>(array.data)[offsets[c]] = T(0);
    }
  }
}

template <class T>
void run_reverse(const recurrence_arguments& with, const array_view& grad,
                 const array_view* grad_log_a, const array_view* grad_log_b,
                 const array_view* grad_state, const array_view& workspace) {
  const lane_partition cut(row_count(with.log_a), with.log_a.shape[with.log_a.ndim - 1]);
  if (cut.rows == 0) return;
  if (cut.n == 0) {
    if (grad_state) set_zero<T>(*grad_state, cut);
    return;
  }
  workspace_layout pieces(workspace);
  const reverse_layout<T> layout(pieces, cut);
  const auto& kernels = functions<T>();
  const int threads = threads_for(cut.work(2), layout.slots.count);
  if (cut.is_cut()) {
    summarise<T>(cut, with, layout.slots, threads, layout.states, layout.scales);
    parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
      recurrence_task<T> task = task_of<T>(cut, with, index);
      task.grad = cut.view<const T>(grad, index);
      task.state = layout.states + index;
      task.link = layout.links + index;
      task.saved = layout.saved_of(index, slot);
      task.scratch = layout.scratch_of(slot);
      kernels.prepare(task);
    });
    // constant becomes the gradient that enters a piece from behind.
    for (std::int64_t row = 0; row < cut.rows; ++row) {
      double carry = 0;
      for (std::int64_t piece = cut.pieces - 1; piece >= 0; --piece) {
        const piece_index at(row * cut.pieces + piece);
        double& constant = layout.links[at.tile].constant[at.lane];
        const double product = layout.links[at.tile].product[at.lane];
        const double passed = product == 0 || carry == 0 ? 0 : product * carry;
        const double leaves = constant + passed;
        constant = carry;
        carry = leaves;
      }
    }
  }
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    recurrence_state state;
    double carry[kTileLanes] = {};
    recurrence_task<T> task = task_of<T>(cut, with, index);
    task.saved = layout.saved_of(index, slot);
    task.scratch = layout.scratch_of(slot);
    if (cut.is_cut()) {
      task.carry = layout.links[index].constant;
    } else {
      begin<T>(cut, with.state, index, state);
      task.state = &state;
      kernels.prepare(task);
      task.carry = carry;
    }
    task.grad = cut.view<const T>(grad, index);
    task.grad_log_a = cut.view<T>(grad_log_a, index);
    task.grad_log_b = cut.view<T>(grad_log_b, index);
    kernels.reverse(task);
    if (!grad_state) return;
    std::int64_t offsets[kTileLanes];
    cut.offsets(*grad_state, 0, index, offsets);
    for (int c = 0; c < task.tile.count; ++c) {
      if (task.tile.positions[c] != 0) continue;
      static_cast<T*>(grad_state->data)[offsets[c]] = static_cast<T>(task.carry[c]);
    }
  });
}

}  // namespace

std::size_t log_linear_recurrence_workspace(std::int64_t lanes, std::int64_t n,
                                            std::int64_t itemsize) {
  workspace_layout workspace;
  const lane_partition cut(lanes, n);
  if (itemsize == 4) {
    forward_layout<float>(workspace, cut);
  } else {
    forward_layout<double>(workspace, cut);
  }
  return workspace.size();
}

void log_linear_recurrence(const array_view& log_a, const array_view& log_b,
                           const array_view* state, const array_view* segments, std::int32_t axis,
                           bool reverse, const array_view& out, const array_view& workspace) {
  check_log_linear_recurrence(log_a, log_b, state, segments, axis, out);
  const scan_view a(log_a, axis, reverse);
  const scan_view b(log_b, axis, reverse);
  const optional_scan_view runs(segments, 0, reverse);
  const scan_view result(out, axis, reverse);
  const recurrence_arguments with{a.get(), b.get(), state, runs.get()};
  (log_a.type == dtype::float32 ? run_forward<float> : run_forward<double>)(with, result.get(),
                                                                            workspace);
}

std::size_t log_linear_recurrence_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                                std::int64_t itemsize) {
  workspace_layout workspace;
  const lane_partition cut(lanes, n);
  if (itemsize == 4) {
    reverse_layout<float>(workspace, cut);
  } else {
    reverse_layout<double>(workspace, cut);
  }
  return workspace.size();
}

void log_linear_recurrence_vjp(const array_view& log_a, const array_view& log_b,
                               const array_view* state, const array_view* segments,
                               std::int32_t axis, bool reverse, const array_view& grad,
                               const array_view* grad_log_a, const array_view* grad_log_b,
                               const array_view* grad_state, const array_view& workspace) {
  check_log_linear_recurrence_vjp(log_a, log_b, state, segments, axis, grad, grad_log_a, grad_log_b,
                                  grad_state);
  const scan_view a(log_a, axis, reverse);
  const scan_view b(log_b, axis, reverse);
  const optional_scan_view runs(segments, 0, reverse);
  const scan_view g(grad, axis, reverse);
  const optional_scan_view ga(grad_log_a, axis, reverse);
  const optional_scan_view gb(grad_log_b, axis, reverse);
  const recurrence_arguments with{a.get(), b.get(), state, runs.get()};
  (log_a.type == dtype::float32 ? run_reverse<float> : run_reverse<double>)(with, g.get(), ga.get(),
                                                                            gb.get(), grad_state,
                                                                            workspace);
}

}  // namespace subquad::core
