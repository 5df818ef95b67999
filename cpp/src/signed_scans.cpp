#include <cmath>
#include <limits>

#include "isa.hpp"
#include "kernels/signed_scans_kernels.hpp"
#include "lane_partition.hpp"
#include "scans_checks.hpp"
#include "scans_core.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(signed_scans)

namespace subquad::core {
namespace {

constexpr double kLowest = std::numeric_limits<double>::lowest();

template <class T>
const signed_scans_functions<T>& functions();
template <>
const signed_scans_functions<float>& functions() {
  return signed_scans_table().f32;
}
template <>
const signed_scans_functions<double>& functions() {
  return signed_scans_table().f64;
}

// The sum of one lane, as the kernels keep it for each of a tile.
struct lane_sum {
  double reference = kLowest;
  double sum = 0;
  double remainder = 0;

  static lane_sum in(const signed_state& tile, int lane) {
    return {tile.reference[lane], tile.sum[lane], tile.remainder[lane]};
  }
  void write(signed_state& tile, int lane) const {
    tile.reference[lane] = reference;
    tile.sum[lane] = sum;
    tile.remainder[lane] = remainder;
  }
};

// A sum and that of the piece after it. References that are equal, as those of a row's pieces are
// while its entries lie near each other, make this exact.
lane_sum joined(const lane_sum& a, const lane_sum& b) {
  const double total_a = a.sum + a.remainder;
  const double total_b = b.sum + b.remainder;
  if (total_b == 0) return a;
  if (!std::isfinite(total_a) || !std::isfinite(total_b)) {
    return {a.reference,
            (std::isfinite(total_a) ? 0 : total_a) + (std::isfinite(total_b) ? 0 : total_b), 0};
  }
  if (total_a == 0) return b;
  const double d = b.reference - a.reference;
  const bool moves = d > kSignedThreshold;
  const double factor_a = moves ? std::exp(-d) : 1;
  const double factor_b = moves ? 1 : std::exp(d);
  const double from_a = a.sum * factor_a;
  const double from_b = b.sum * factor_b;
  const double sum = from_a + from_b;
  const double part = sum - from_a;
  const double lost = (from_a - (sum - part)) + (from_b - part);
  return {moves ? b.reference : a.reference, sum,
          a.remainder * factor_a + b.remainder * factor_b + lost};
}

// The gradients of two stretches of a row, over the sums that they are divided by.
struct lane_carry {
  double reference = kLowest;
  double sum = 0;
};

lane_carry joined(const lane_carry& a, const lane_carry& b) {
  if (a.sum == 0) return b;
  if (b.sum == 0) return a;
  if (a.reference <= b.reference) {
    return {a.reference, a.sum + b.sum * std::exp(a.reference - b.reference)};
  }
  return {b.reference, a.sum * std::exp(b.reference - a.reference) + b.sum};
}

// As scan_views.
struct signed_arguments {
  const array_view& x;
  const array_view& sign;
  bool exclusive;
};

template <class T>
signed_scan_task<T> task_of(const lane_partition& cut, const signed_arguments& with,
                            std::int64_t index) {
  signed_scan_task<T> task{};
  task.tile = cut.tile(index);
  task.x = cut.view<const T>(with.x, index);
  task.sign = cut.view<const T>(with.sign, index);
  task.exclusive = with.exclusive;
  return task;
}

void begin(signed_state& state) {
  for (int c = 0; c < kTileLanes; ++c) lane_sum{}.write(state, c);
}

// The reference that a row would find by itself: its first entry that counts.
template <class T>
double first_reference(const lane_partition& cut, const signed_arguments& with, std::int64_t row) {
  const std::int64_t lane = row * cut.pieces;
  const int c = static_cast<int>(lane % kTileLanes);
  const lane_view<const T> x = cut.view<const T>(with.x, lane / kTileLanes);
  const lane_view<const T> sign = cut.view<const T>(with.sign, lane / kTileLanes);
  for (std::int64_t t = 0; t < cut.n; ++t) {
    const T value = x.data[x.offsets[c] + t * x.stride];
    if (std::isfinite(value) && sign.data[sign.offsets[c] + t * sign.stride] != T(0)) {
      return static_cast<double>(value);
    }
  }
  return kLowest;
}

// The sums before each piece. All pieces of a row start from one reference, so that what cancels
// within a piece cancels across their borders.
template <class T>
void summarise(const lane_partition& cut, const signed_arguments& with,
               const workspace_layout::slots& slots, int threads, signed_state* states) {
  for (std::int64_t index = 0; index < cut.tiles; ++index) begin(states[index]);
  for (std::int64_t row = 0; row < cut.rows; ++row) {
    const lane_sum empty{first_reference<T>(cut, with, row), 0, 0};
    for (std::int64_t piece = 0; piece < cut.pieces; ++piece) {
      const std::int64_t lane = row * cut.pieces + piece;
      empty.write(states[lane / kTileLanes], static_cast<int>(lane % kTileLanes));
    }
  }
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    signed_scan_task<T> task = task_of<T>(cut, with, index);
    task.state = states + index;
    task.scratch = slots[slot];
    functions<T>().summarise(task);
  });
  for (std::int64_t row = 0; row < cut.rows; ++row) {
    lane_sum before{first_reference<T>(cut, with, row), 0, 0};
    for (std::int64_t piece = 0; piece < cut.pieces; ++piece) {
      const std::int64_t lane = row * cut.pieces + piece;
      signed_state& tile = states[lane / kTileLanes];
      const int c = static_cast<int>(lane % kTileLanes);
      const lane_sum after = joined(before, lane_sum::in(tile, c));
      before.write(tile, c);
      before = after;
    }
  }
}

template <class T>
struct forward_layout {
  signed_state* states = nullptr;  // of each tile, where rows are cut
  workspace_layout::slots slots;

  forward_layout(workspace_layout& workspace, const lane_partition& cut) {
    if (cut.is_cut()) states = workspace.take<signed_state>(cut.tiles);
    slots = workspace.take_slots(functions<T>().scratch, cut.tiles);
  }
};

template <class T>
void run_forward(const signed_arguments& with, const array_view& out, const array_view& out_sign,
                 const array_view& workspace) {
  const lane_partition cut(row_count(with.x), with.x.shape[with.x.ndim - 1]);
  if (cut.rows == 0 || cut.n == 0) return;
  workspace_layout pieces(workspace);
  const forward_layout<T> layout(pieces, cut);
  const int threads = threads_for(cut.work(1), layout.slots.count);
  if (cut.is_cut()) summarise<T>(cut, with, layout.slots, threads, layout.states);
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    signed_state state;
    signed_scan_task<T> task = task_of<T>(cut, with, index);
    task.out = cut.view<T>(out, index);
    task.out_sign = cut.view<T>(out_sign, index);
    task.state = cut.is_cut() ? layout.states + index : &state;
    task.scratch = layout.slots[slot];
    if (!cut.is_cut()) begin(state);
    functions<T>().scan(task);
  });
}

// Where rows are cut, every tile keeps what its pieces need; otherwise a slot does for its tile.
template <class T>
struct reverse_layout {
  signed_state* states = nullptr;
  signed_state* saved = nullptr;
  signed_carry* carries = nullptr;
  std::int64_t blocks;
  std::size_t saved_bytes;  // of a slot
  workspace_layout::slots slots;

  reverse_layout(workspace_layout& workspace, const lane_partition& cut)
      : blocks(divide_up(cut.length, kBlockSteps)),
        saved_bytes(cut.is_cut() ? 0 : static_cast<std::size_t>(blocks) * sizeof(signed_state)) {
    if (cut.is_cut()) {
      states = workspace.take<signed_state>(cut.tiles);
      saved = workspace.take<signed_state>(cut.tiles * blocks);
      carries = workspace.take<signed_carry>(cut.tiles);
    }
    slots = workspace.take_slots(saved_bytes + functions<T>().scratch, cut.tiles);
  }

  signed_state* saved_of(std::int64_t index, int slot) const {
    return saved ? saved + index * blocks : static_cast<signed_state*>(slots[slot]);
  }
  void* scratch_of(int slot) const { return static_cast<char*>(slots[slot]) + saved_bytes; }
};

template <class T>
void run_reverse(const signed_arguments& with, const array_view& grad, const array_view* grad_x,
                 const array_view* grad_sign, const array_view& workspace) {
  const lane_partition cut(row_count(with.x), with.x.shape[with.x.ndim - 1]);
  if (cut.rows == 0 || cut.n == 0) return;
  workspace_layout pieces(workspace);
  const reverse_layout<T> layout(pieces, cut);
  const auto& kernels = functions<T>();
  const int threads = threads_for(cut.work(2), layout.slots.count);
  const auto task_for = [&](std::int64_t index, int slot) {
    signed_scan_task<T> task = task_of<T>(cut, with, index);
    task.saved = layout.saved_of(index, slot);
    task.scratch = layout.scratch_of(slot);
    return task;
  };
  if (cut.is_cut()) {
    summarise<T>(cut, with, layout.slots, threads, layout.states);
    parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
      signed_scan_task<T> task = task_for(index, slot);
      task.grad = cut.view<const T>(grad, index);
      task.state = layout.states + index;
      task.carry = layout.carries + index;
      kernels.prepare(task);
    });
    // The carry of a piece becomes that of all behind it.
    for (std::int64_t row = 0; row < cut.rows; ++row) {
      lane_carry behind;
      for (std::int64_t piece = cut.pieces - 1; piece >= 0; --piece) {
        const std::int64_t lane = row * cut.pieces + piece;
        signed_carry& tile = layout.carries[lane / kTileLanes];
        const auto c = lane % kTileLanes;
        const lane_carry sum = joined({tile.reference[c], tile.sum[c]}, behind);
        tile.reference[c] = behind.reference;
        tile.sum[c] = behind.sum;
        behind = sum;
      }
    }
  }
  parallel_for(cut.tiles, threads, [&](std::int64_t index, int slot) {
    signed_state state;
    signed_carry carry;
    signed_scan_task<T> task = task_for(index, slot);
    if (cut.is_cut()) {
      task.carry = layout.carries + index;
    } else {
      begin(state);
      task.state = &state;
      kernels.prepare(task);
      for (int c = 0; c < kTileLanes; ++c) {
        carry.reference[c] = kLowest;
        carry.sum[c] = 0;
      }
      task.carry = &carry;
    }
    task.grad = cut.view<const T>(grad, index);
    task.grad_x = cut.view<T>(grad_x, index);
    task.grad_sign = cut.view<T>(grad_sign, index);
    kernels.reverse(task);
  });
}

}  // namespace

std::size_t signed_logcumsumexp_workspace(std::int64_t lanes, std::int64_t n,
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

void signed_logcumsumexp(const array_view& x, const array_view& sign, std::int32_t axis,
                         bool reverse, bool exclusive, const array_view& out,
                         const array_view& out_sign, const array_view& workspace) {
  check_signed_logcumsumexp(x, sign, axis, out, out_sign);
  const scan_view exponents(x, axis, reverse);
  const scan_view weights(sign, axis, reverse);
  const scan_view result(out, axis, reverse);
  const scan_view result_sign(out_sign, axis, reverse);
  const signed_arguments with{exponents.get(), weights.get(), exclusive};
  (x.type == dtype::float32 ? run_forward<float> : run_forward<double>)(with, result.get(),
                                                                        result_sign.get(),
                                                                        workspace);
}

std::size_t signed_logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n,
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

void signed_logcumsumexp_vjp(const array_view& x, const array_view& sign, std::int32_t axis,
                             bool reverse, bool exclusive, const array_view& grad,
                             const array_view* grad_x, const array_view* grad_sign,
                             const array_view& workspace) {
  check_signed_logcumsumexp_vjp(x, sign, axis, grad, grad_x, grad_sign);
  const scan_view exponents(x, axis, reverse);
  const scan_view weights(sign, axis, reverse);
  const scan_view grads(grad, axis, reverse);
  const optional_scan_view gx(grad_x, axis, reverse);
  const optional_scan_view gs(grad_sign, axis, reverse);
  const signed_arguments with{exponents.get(), weights.get(), exclusive};
  (x.type == dtype::float32 ? run_reverse<float> : run_reverse<double>)(with, grads.get(), gx.get(),
                                                                        gs.get(), workspace);
}

}  // namespace subquad::core
