// Scans along one axis: how lanes are cut, read and written, and how the states of their pieces are
// put together.
//
// A thread takes a few neighbouring steps of a lane, `parts` threads of a block one after the other
// a tile of it. A state stands for what a piece of a lane does; merged(first, second) for two
// pieces, first coming before second in the direction of the scan. States are put together in an
// order that shapes alone determine.
#ifndef SUBQUAD_CUDA_SCAN_CUH
#define SUBQUAD_CUDA_SCAN_CUH

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "arguments.hpp"
#include "batches.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "scans_checks.hpp"

namespace subquad::cuda {

inline constexpr int kScanThreads = 256;
// What a thread takes of an array: as much as leaves registers for what is made of it, less where
// there are several arrays.
template <class T>
inline constexpr int kScanSteps = 64 / static_cast<int>(sizeof(T));
template <class T>
inline constexpr int kFewScanSteps = 32 / static_cast<int>(sizeof(T));
inline constexpr std::uint32_t kWholeWarp = 0xffffffffu;

// ---- how a scan is cut -------------------------------------------------------------------------

// Where steps of a lane lie side by side, threads of a warp follow each other along it; `across`,
// where lanes do, they hold neighbouring lanes.
struct scan_plan {
  std::int64_t lanes;
  std::int64_t n;
  std::int64_t lane_groups;
  std::int64_t tiles;  // of a lane
  int parts;
  bool across;
  bool walks;  // a block takes all tiles of its lanes, else one

  // Enough blocks for the multiprocessors of a large device, four on each.
  static constexpr std::int64_t kManyBlocks = 528;

  scan_plan(std::int64_t lane_count, std::int64_t length, int steps_of_thread, bool is_across)
      : lanes(lane_count), n(length), parts(1), across(is_across) {
    const int most_parts = across ? kScanThreads / kWarp : kScanThreads;
    while (parts < most_parts && std::int64_t{parts} * steps_of_thread < n &&
           !(across && groups() >= kManyBlocks)) {
      parts *= 2;
    }
    lane_groups = groups();
    tiles = std::max<std::int64_t>(1, divide_up(n, std::int64_t{parts} * steps_of_thread));
    walks = lane_groups >= kManyBlocks || tiles == 1;
  }

  std::int64_t blocks() const { return walks ? lane_groups : lane_groups * tiles; }

 private:
  std::int64_t groups() const { return divide_up(lanes, kScanThreads / parts); }
};

// Which steps of which lane a thread has.
struct scan_place {
  std::int64_t n;
  std::int64_t lanes;
  std::int64_t block_lane;  // the first lane of the block
  std::int64_t lane;
  std::int64_t first;  // step
  int parts;
  int part;
  bool has_lane;

  SUBQUAD_DEVICE scan_place(const scan_plan& plan, std::int64_t lane_group)
      : n(plan.n), lanes(plan.lanes), first(0), parts(plan.parts) {
    const int lanes_of_block = kScanThreads / parts;
    const int thread = static_cast<int>(threadIdx.x);
    part = plan.across ? thread / lanes_of_block : thread % parts;
    block_lane = lane_group * lanes_of_block;
    lane = block_lane + (plan.across ? thread % lanes_of_block : thread / parts);
    has_lane = lane < lanes;
  }

  template <int kSteps>
  SUBQUAD_DEVICE void go_to(std::int64_t tile) {
    first = (tile * parts + part) * kSteps;
  }
};

// ---- arrays ------------------------------------------------------------------------------------

// Elements from the start of array `which` to its part for one lane.
template <int kArrays>
SUBQUAD_DEVICE std::int64_t lane_offset(const batches<kArrays>& batch, int which,
                                        std::int64_t lane) {
  std::int64_t offset = 0;
  for (int i = 0; i + 1 < batch.rank; ++i) {
    offset += lane % batch.lengths[i] * batch.strides[which][i];
    lane /= batch.lengths[i];
  }
  return batch.rank > 0 ? offset + lane * batch.strides[which][batch.rank - 1] : 0;
}

// An array that is scanned: null where it is absent.
template <class T>
struct scanned {
  T* data;
  std::int64_t stride;
  bool in_pieces;  // every lane starts at a multiple of 16 bytes and is contiguous

  SUBQUAD_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <class T, int kArrays>
scanned<T> scanned_of(const array_view* array, const batches<kArrays>& batch, int which) {
  if (array == nullptr) return {nullptr, 0, false};
  const vector_view<T> lane = vector_at<T>(*array, 0);
  constexpr std::int64_t kPiece = 16 / sizeof(T);
  bool in_pieces = lane.stride == 1 && reinterpret_cast<std::uintptr_t>(lane.data) % 16 == 0;
  for (int i = 0; i < batch.rank; ++i) in_pieces &= batch.strides[which][i] % kPiece == 0;
  return {lane.data, lane.stride, in_pieces};
}

// Whether lanes, rather than steps, lie side by side.
template <int kArrays>
bool lanes_lie_closer(const batches<kArrays>& batch, int which, const array_view& array) {
  const std::int64_t step = array.strides[array.ndim - 1];
  if (batch.rank == 0 || batch.lengths[0] < kWarp / 2) return false;
  const std::int64_t lane = batch.strides[which][0];
  return (lane < 0 ? -lane : lane) < (step < 0 ? -step : step);
}

template <class T>
struct alignas(16) piece {
  T values[16 / sizeof(T)];
};

// Brings a thread's steps of an array into its registers and back. Along a lane they pass through
// shared memory, where a warp has what its threads take.
template <class T, int kSteps, bool kAcross>
struct lane_io {
  // Threads lie 16 bytes more apart than their steps take: pieces of eight neighbours then lie in
  // different banks.
  static constexpr int kBytes = kSteps * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) stage {
    unsigned char bytes[kAcross ? 16 : kBytes * kScanThreads];
  };
  static_assert(kSteps % kPiece == 0);

  // The element that is `index` steps after the first of the warp, and where its stage is.
  struct element {
    std::int64_t step;
    std::int64_t offset;
    bool exists;
    int byte;
  };
  static SUBQUAD_DEVICE element element_at(const scan_place& place, std::int64_t offset,
                                           int index) {
    const int owner = index / kSteps;
    const int warp = static_cast<int>(threadIdx.x) / kWarp * kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    element found;
    found.byte = (warp + owner) * kBytes + index % kSteps * static_cast<int>(sizeof(T));
    if (place.parts >= kWarp) {
      found.step = place.first + (owner - lane) * kSteps + index % kSteps;
      found.offset = offset;
      found.exists = place.has_lane && found.step < place.n;
    } else {
      found.step = place.first + (owner % place.parts - place.part) * kSteps + index % kSteps;
      found.offset = __shfl_sync(kWholeWarp, offset, owner);
      found.exists =
          place.block_lane + (warp + owner) / place.parts < place.lanes && found.step < place.n;
    }
    return found;
  }

  // Begins to read: `finish_reading` once the copies have come.
  static SUBQUAD_DEVICE void start_reading(const scanned<const T>& from, std::int64_t offset,
                                           const scan_place& place, stage& memory) {
    if constexpr (!kAcross) {
      const int lane = static_cast<int>(threadIdx.x) % kWarp;
      if (from.in_pieces) {
        SUBQUAD_NO_UNROLL
        for (int i = 0; i < kSteps / kPiece; ++i) {
          const element e = element_at(place, offset, (i * kWarp + lane) * kPiece);
          const std::int64_t left = place.n - e.step;
          if (e.exists) {
            copy_async<16>(
                memory.bytes + e.byte, from.data + e.offset + e.step,
                (left < kPiece ? static_cast<int>(left) : kPiece) * static_cast<int>(sizeof(T)));
          }
        }
      } else {
        SUBQUAD_NO_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          const element e = element_at(place, offset, i * kWarp + lane);
          if (e.exists) {
            copy_async<static_cast<int>(sizeof(T))>(memory.bytes + e.byte,
                                                    from.data + e.offset + e.step * from.stride,
                                                    static_cast<int>(sizeof(T)));
          }
        }
      }
    }
  }

  static SUBQUAD_DEVICE void wait_for_reads() {
    if constexpr (!kAcross) {
      commit_copies();
      wait_copies<0>();
      __syncwarp();
    }
  }

  // Steps that do not exist hold `nothing`.
  static SUBQUAD_DEVICE void finish_reading(const scanned<const T>& from, std::int64_t offset,
                                            const scan_place& place, const stage& memory, T nothing,
                                            T (&values)[kSteps]) {
    const std::int64_t count = place.has_lane ? place.n - place.first : 0;
    if constexpr (kAcross) {
      const T* lane = from.data + offset + place.first * from.stride;
      SUBQUAD_UNROLL
      for (int j = 0; j < kSteps; ++j) values[j] = j < count ? lane[j * from.stride] : nothing;
    } else {
      const auto* own =
          reinterpret_cast<const piece<T>*>(memory.bytes + static_cast<int>(threadIdx.x) * kBytes);
      SUBQUAD_UNROLL
      for (int i = 0; i < kSteps / kPiece; ++i) {
        const piece<T> each = own[i];
        SUBQUAD_UNROLL
        for (int k = 0; k < kPiece; ++k) {
          values[i * kPiece + k] = i * kPiece + k < count ? each.values[k] : nothing;
        }
      }
    }
  }

  // A warp has read its stage, and does not read it again, before it writes.
  static SUBQUAD_DEVICE void write(const scanned<T>& to, std::int64_t offset,
                                   const scan_place& place, stage& memory,
                                   const T (&values)[kSteps]) {
    if constexpr (kAcross) {
      const std::int64_t count = place.has_lane ? place.n - place.first : 0;
      T* lane = to.data + offset + place.first * to.stride;
      SUBQUAD_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        if (j < count) lane[j * to.stride] = values[j];
      }
    } else {
      __syncwarp();
      auto* own =
          reinterpret_cast<piece<T>*>(memory.bytes + static_cast<int>(threadIdx.x) * kBytes);
      SUBQUAD_UNROLL
      for (int i = 0; i < kSteps / kPiece; ++i) {
        piece<T> each;
        SUBQUAD_UNROLL
        for (int k = 0; k < kPiece; ++k) each.values[k] = values[i * kPiece + k];
        own[i] = each;
      }
      __syncwarp();
      const int lane = static_cast<int>(threadIdx.x) % kWarp;
      if (to.in_pieces) {
        SUBQUAD_NO_UNROLL
        for (int i = 0; i < kSteps / kPiece; ++i) {
          const element e = element_at(place, offset, (i * kWarp + lane) * kPiece);
          if (!e.exists) continue;
          const auto each = *reinterpret_cast<const piece<T>*>(memory.bytes + e.byte);
          T* at = to.data + e.offset + e.step;
          if (e.step + kPiece <= place.n) {
            *reinterpret_cast<piece<T>*>(at) = each;
          } else {
            for (int k = 0; k < place.n - e.step; ++k) at[k] = each.values[k];
          }
        }
      } else {
        SUBQUAD_NO_UNROLL
        for (int i = 0; i < kSteps; ++i) {
          const element e = element_at(place, offset, i * kWarp + lane);
          if (!e.exists) continue;
          to.data[e.offset + e.step * to.stride] =
              *reinterpret_cast<const T*>(memory.bytes + e.byte);
        }
      }
      __syncwarp();
    }
  }
};

// The steps of a thread that begin a run, a bit for each.
template <int kSteps>
SUBQUAD_DEVICE std::uint32_t borders_at(const vector_view<const std::int64_t>& segments,
                                        const scan_place& place) {
  std::uint32_t borders = 0;
  if (!segments) return borders;
  const std::int64_t count = place.n - place.first;
  if (count <= 0) return borders;
  std::int64_t before = segments[place.first > 0 ? place.first - 1 : 0];
  SUBQUAD_UNROLL
  for (int j = 0; j < kSteps; ++j) {
    if (j >= count) break;
    const std::int64_t here = segments[place.first + j];
    if (here != before) borders |= std::uint32_t{1} << j;
    before = here;
  }
  return borders;
}

// ---- the states of a block ---------------------------------------------------------------------

// A state has nothing(), merged(first, second) and exchanged(f), its numbers by f.
template <class State, bool kAcross, bool kReverse>
struct block_scan {
  struct shared_memory {
    State states[kAcross ? kScanThreads : kScanThreads / kWarp];
  };
  struct result {
    State before;  // over the parts before the thread's
    State total;   // over all
  };

  static SUBQUAD_DEVICE State from_before(const State& state, int distance, int width) {
    return state.exchanged([&](auto number) {
      return kReverse ? __shfl_down_sync(kWholeWarp, number, distance, width)
                      : __shfl_up_sync(kWholeWarp, number, distance, width);
    });
  }
  static SUBQUAD_DEVICE State from_lane(const State& state, int lane, int width) {
    return state.exchanged(
        [&](auto number) { return __shfl_sync(kWholeWarp, number, lane, width); });
  }
  // Over groups of `width` lanes.
  static SUBQUAD_DEVICE result of_lanes(State state, int width) {
    const int lane = static_cast<int>(threadIdx.x) % width;
    const int position = kReverse ? width - 1 - lane : lane;
    SUBQUAD_NO_UNROLL
    for (int step = 1; step < width; step *= 2) {
      const State other = from_before(state, step, width);
      if (position >= step) state = State::merged(other, state);
    }
    result found;
    found.total = from_lane(state, kReverse ? 0 : width - 1, width);
    found.before = from_before(state, 1, width);
    if (position == 0) found.before = State::nothing();
    return found;
  }

  static SUBQUAD_DEVICE result run(const State& own, int parts, shared_memory& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kAcross) {
      if (parts == 1) return {State::nothing(), own};
      const int lanes = kScanThreads / parts;
      const int own_part = thread / lanes;
      shared.states[thread] = own;
      __syncthreads();
      result found{State::nothing(), State::nothing()};
      SUBQUAD_NO_UNROLL
      for (int p = 0; p < parts; ++p) {
        const int part = kReverse ? parts - 1 - p : p;
        if (part == own_part) found.before = found.total;
        found.total = State::merged(found.total, shared.states[part * lanes + thread % lanes]);
      }
      __syncthreads();
      return found;
    } else {
      result found = of_lanes(own, parts < kWarp ? parts : kWarp);
      if (parts <= kWarp) return found;
      const int warps = parts / kWarp;
      const int warp = thread / kWarp;
      if (thread % kWarp == 0) shared.states[warp] = found.total;
      __syncthreads();
      const int first = warp / warps * warps;
      const result of_warps = of_lanes(shared.states[first + thread % warps], warps);
      found.before = State::merged(from_lane(of_warps.before, warp - first, warps), found.before);
      found.total = of_warps.total;
      __syncthreads();
      return found;
    }
  }
};

// ---- the states of tiles -----------------------------------------------------------------------

// Decoupled look-back: blocks take tiles in the order of the scan, publish what their tile does,
// and put together what those before it do. A block waits for tiles that were taken before its own,
// which never wait for it, and for nothing but what these tiles do by themselves: the order in
// which states are merged is the same in every run. To have few of them to merge, the last tile of
// a group publishes what the group does, and so on.
template <class State>
struct look_back {
  static constexpr int kLevels = 3;
  static constexpr int kFan = 32;

  std::uint32_t* ticket;
  std::uint32_t* flags;  // [entries][lanes]
  State* states;         // likewise
  std::int64_t lanes;
  std::int64_t starts[kLevels + 1];  // of the entries of each level

  look_back(workspace_layout& workspace, const scan_plan& plan) : lanes(plan.lanes) {
    std::int64_t entries = plan.walks ? 0 : plan.tiles;
    starts[0] = 0;
    for (int level = 0; level < kLevels; ++level) {
      starts[level + 1] = starts[level] + entries;
      entries /= kFan;
    }
    const std::int64_t count = starts[kLevels] * lanes;
    ticket = workspace.take<std::uint32_t>(plan.walks ? 0 : 1 + count);
    flags = ticket + 1;
    states = workspace.take<State>(count);
  }

  void reset() const {
    if (starts[kLevels] > 0) {
      clear(ticket, static_cast<std::size_t>(1 + starts[kLevels] * lanes) * sizeof(*ticket));
    }
  }

  SUBQUAD_DEVICE void publish(std::int64_t entry, const State& state,
                              const scan_place& place) const {
    if (place.part != 0 || !place.has_lane) return;
    const std::int64_t at = entry * lanes + place.lane;
    states[at] = state;
    store_release(flags + at, 1u);
  }
  SUBQUAD_DEVICE State read(std::int64_t entry, const scan_place& place) const {
    const std::int64_t at = entry * lanes + place.lane;
    wait_until_set(flags + at);
    return states[at];
  }

  // What the tiles before `position` do, in the order of the scan; `own` is what that tile does.
  template <bool kAcross, bool kReverse>
  SUBQUAD_DEVICE State
  before(std::int64_t position, const State& own, const scan_place& place,
         typename block_scan<State, kAcross, kReverse>::shared_memory& shared) const {
    publish(position, own, place);
    const std::int64_t group = position / kFan;
    const std::int64_t above = group / kFan;
    const bool ends_group = position % kFan == kFan - 1;
    State whole = own;
    State found = State::nothing();
    // The rest of the tile's group, of the group's own group, and then all there is.
    SUBQUAD_NO_UNROLL
    for (int level = ends_group ? 0 : 2; level < kLevels; ++level) {
      if (level == 1 && group % kFan != kFan - 1) continue;
      const bool takes_all = level == 2;
      const std::int64_t tiles = level == 1 ? 0 : position % kFan;
      const std::int64_t groups = level == 0 ? 0 : group % kFan;
      const std::int64_t highest = takes_all ? above : 0;
      const std::int64_t count = highest + groups + tiles;
      const std::int64_t each = (count + place.parts - 1) / place.parts;
      std::int64_t at = (kReverse ? place.parts - 1 - place.part : place.part) * each;
      const std::int64_t end = at + each < count ? at + each : count;
      State state = State::nothing();
      if (place.has_lane) {
        SUBQUAD_NO_UNROLL
        for (; at < end; ++at) {
          std::int64_t entry = starts[2] + at;
          if (at >= highest) entry = starts[1] + above * kFan + (at - highest);
          if (at >= highest + groups) entry = group * kFan + (at - highest - groups);
          state = State::merged(state, read(entry, place));
        }
      }
      found = block_scan<State, kAcross, kReverse>::run(state, place.parts, shared).total;
      if (takes_all) break;
      whole = State::merged(found, whole);
      publish(starts[level + 1] + (level == 0 ? group : above), whole, place);
    }
    return found;
  }
};

// ---- kernels -----------------------------------------------------------------------------------

// Calls body(place, position) for the tiles of a block, in the order of the scan.
template <class State, class Body>
SUBQUAD_DEVICE void for_tiles(const scan_plan& plan, const look_back<State>& board,
                              std::uint32_t& ticket, Body&& body) {
  if (plan.walks) {
    scan_place place(plan, blockIdx.x);
    SUBQUAD_NO_UNROLL
    for (std::int64_t position = 0; position < plan.tiles; ++position) body(place, position);
  } else {
    if (threadIdx.x == 0) ticket = atomicAdd(board.ticket, 1u);
    __syncthreads();
    const std::int64_t position = ticket / plan.lane_groups;
    scan_place place(plan, ticket - position * plan.lane_groups);
    body(place, position);
  }
}

// A task of a scan has `element`, `kSteps`, `state`, `steps` (what a thread holds), and
//   initial(place)               the state before the first step
//   load(place, stages, steps), store(place, stages, steps); load may be for the summary alone
//   summary(steps)               what they do
//   apply(steps, before)         makes results of them
//   finish(place, total)         with the state after the last step
// `carries`, [tiles][lanes], gets the state before each tile in place of all that apply, store and
// finish do.
template <class Task, bool kAcross, bool kOnlyCarries>
struct scan_kernel {
  using state = typename Task::state;
  using scan = block_scan<state, kAcross, false>;
  using io = lane_io<typename Task::element, Task::kSteps, kAcross>;
  static constexpr int kThreads = kScanThreads;
  static constexpr int kBlocks = Task::kBlocks;
  struct shared_memory {
    typename io::stage stages[Task::kInputs];
    typename scan::shared_memory states;
    std::uint32_t ticket;
  };

  scan_plan plan;
  Task task;
  look_back<state> board;
  state* carries;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    state carry = state::nothing();
    for_tiles(plan, board, shared.ticket, [&](scan_place& place, std::int64_t tile) {
      const bool is_last = tile == plan.tiles - 1;
      place.go_to<Task::kSteps>(tile);
      typename Task::steps steps;
      typename scan::result found{state::nothing(), state::nothing()};
      if (!kOnlyCarries || !is_last) {
        task.template load<io, kOnlyCarries>(place, shared.stages, steps);
        found = scan::run(task.summary(steps), place.parts, shared.states);
      }
      if (tile == 0 || !plan.walks) carry = task.initial(place);
      if (!plan.walks) {
        carry = state::merged(
            carry, board.template before<kAcross, false>(tile, found.total, place, shared.states));
      }
      if constexpr (kOnlyCarries) {
        if (place.part == 0 && place.has_lane) carries[tile * plan.lanes + place.lane] = carry;
      } else {
        task.apply(steps, state::merged(carry, found.before));
        task.template store<io>(place, shared.stages, steps);
      }
      carry = state::merged(carry, found.total);
      if constexpr (!kOnlyCarries) {
        if (is_last && place.part == 0 && place.has_lane) task.finish(place, carry);
      }
    });
  }
};

// The reverse of a scan goes from the last step to the first, through what the scan makes of the
// steps. Its task has what a task of a scan has (of which only initial, load, summary and store are
// used), and
//   adjoint                      the state of the reverse
//   relate(steps, before, own, after)  with the states of the scan before the steps, of them and
//                                after them
//   adjoint_initial(place, total)  the adjoint after the last step
//   adjoint_summary(steps), adjoint_apply(steps, after)
//   adjoint_finish(place, total)  with the adjoint before the first step
template <class Task, bool kAcross>
struct reverse_scan_kernel {
  using state = typename Task::state;
  using adjoint = typename Task::adjoint;
  using scan = block_scan<state, kAcross, false>;
  using adjoint_scan = block_scan<adjoint, kAcross, true>;
  using io = lane_io<typename Task::element, Task::kSteps, kAcross>;
  static constexpr int kThreads = kScanThreads;
  static constexpr int kBlocks = Task::kBlocks;
  struct shared_memory {
    typename io::stage stages[Task::kInputs];
    typename scan::shared_memory states;
    typename adjoint_scan::shared_memory adjoints;
    std::uint32_t ticket;
  };

  scan_plan plan;
  Task task;
  look_back<adjoint> board;
  const state* carries;  // null where there is one tile

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    adjoint carry = adjoint::nothing();
    for_tiles(plan, board, shared.ticket, [&](scan_place& place, std::int64_t position) {
      const std::int64_t tile = plan.tiles - 1 - position;
      place.go_to<Task::kSteps>(tile);
      typename Task::steps steps;
      task.template load<io, false>(place, shared.stages, steps);
      const state own = task.summary(steps);
      const typename scan::result found = scan::run(own, place.parts, shared.states);
      state entry = state::nothing();
      if (tile == 0) {
        entry = task.initial(place);
      } else if (place.has_lane) {
        entry = carries[tile * plan.lanes + place.lane];
      }
      const state before = state::merged(entry, found.before);
      task.relate(steps, before, own, state::merged(before, own));
      typename adjoint_scan::result back =
          adjoint_scan::run(task.adjoint_summary(steps), place.parts, shared.adjoints);
      if (position == 0) {
        carry = task.adjoint_initial(place, state::merged(entry, found.total));
      }
      if (!plan.walks) {
        const adjoint others = board.template before<kAcross, true>(
            position, adjoint::merged(carry, back.total), place, shared.adjoints);
        carry = adjoint::merged(others, carry);
      }
      task.adjoint_apply(steps, adjoint::merged(carry, back.before));
      task.template store<io>(place, shared.stages, steps);
      carry = adjoint::merged(carry, back.total);
      if (tile == 0 && place.part == 0 && place.has_lane) task.adjoint_finish(place, carry);
    });
  }
};

// ---- calls -------------------------------------------------------------------------------------

// What a scan takes of the workspace.
template <class Task>
struct scan_layout {
  scan_plan plan;
  look_back<typename Task::state> board;

  scan_layout(workspace_layout& workspace, std::int64_t lanes, std::int64_t n, bool across)
      : plan(lanes, n, Task::kSteps, across), board(workspace, plan) {}

  void run(const Task& task) const {
    board.reset();
    if (plan.across) {
      launch(plan.blocks(), scan_kernel<Task, true, false>{plan, task, board, nullptr});
    } else {
      launch(plan.blocks(), scan_kernel<Task, false, false>{plan, task, board, nullptr});
    }
  }
};

template <class Task>
struct reverse_scan_layout {
  scan_layout<Task> forward;
  look_back<typename Task::adjoint> board;
  typename Task::state* carries;

  reverse_scan_layout(workspace_layout& workspace, std::int64_t lanes, std::int64_t n, bool across)
      : forward(workspace, lanes, n, across),
        board(workspace, forward.plan),
        carries(workspace.take<typename Task::state>(
            forward.plan.tiles > 1 ? forward.plan.tiles * lanes : 0)) {}

  void run(const Task& task) const {
    if (forward.plan.across) {
      run_as<true>(task);
    } else {
      run_as<false>(task);
    }
  }

 private:
  template <bool kAcross>
  void run_as(const Task& task) const {
    const scan_plan& plan = forward.plan;
    if (plan.tiles > 1) {
      forward.board.reset();
      launch(plan.blocks(), scan_kernel<Task, kAcross, true>{plan, task, forward.board, carries});
    }
    board.reset();
    launch(plan.blocks(), reverse_scan_kernel<Task, kAcross>{plan, task, board, carries});
  }
};

// The bytes that a layout takes, however the arrays lie.
template <class Layout>
std::size_t scan_workspace(std::int64_t lanes, std::int64_t n) {
  std::size_t most = 0;
  for (const bool across : {false, true}) {
    workspace_layout pieces;
    static_cast<void>(Layout(pieces, lanes, n, across));
    most = std::max(most, pieces.size());
  }
  return most;
}

template <class T>
T* data_of(const array_view* array) {
  return array ? static_cast<T*>(array->data) : nullptr;
}

template <class F>
void for_scanned_type(dtype type, F&& body) {
  if (type == dtype::float64) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_SCAN_CUH
