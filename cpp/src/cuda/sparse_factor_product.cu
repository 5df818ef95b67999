// Products of sparse factors, and their transposes.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "factors.cuh"

namespace subquad::cuda {
namespace {

// ---- rows of terms ------------------------------------------------------------------------------

// Writes offsets to memory, up to kOffsetsOfLaunch of them.
struct write_offsets_kernel {
  static constexpr int kThreads = kOffsetsOfLaunch;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  offset_table offsets;
  std::int64_t* to;
  int count;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const int index = static_cast<int>(threadIdx.x);
    if (index < count) to[index] = offsets.values[index];
  }
};

// Sets bit i % 32 of word i / 32 where a run of equal numbers starts at row i, else clears it.
struct run_borders_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  vector_view<const std::int64_t> segments;
  std::uint32_t* words;
  int n;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const bool is_border = row < n && (row == 0 || segments[row] != segments[row - 1]);
    const std::uint32_t word = __ballot_sync(0xffffffffu, is_border);
    if (threadIdx.x % kWarp == 0 && row < n) words[row / kWarp] = word;
  }
};

// runs_i = the run of row i, from the words of run_borders_kernel. One warp a word.
struct find_runs_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {};

  const std::uint32_t* words;
  row_run* runs;
  int n;

  static SUBQUAD_DEVICE int lowest(std::uint32_t bits) { return __popc((bits & (0u - bits)) - 1u); }
  static SUBQUAD_DEVICE int highest(std::uint32_t bits) {
    SUBQUAD_UNROLL
    for (int by = 1; by < 32; by *= 2) bits |= bits >> by;
    return __popc(bits) - 1;
  }

  // The first word from `first` on, in steps of `direction`, that is not 0, and where it is; -1
  // where there is none. A warp looks at 32 words at a time.
  SUBQUAD_DEVICE int search(int first, int direction, int lane, std::uint32_t& word) const {
    const int count = (n + kWarp - 1) / kWarp;
    for (; first >= 0 && first < count; first += direction * kWarp) {
      const int at = first + direction * lane;
      const std::uint32_t own = at >= 0 && at < count ? words[at] : 0;
      const std::uint32_t found = __ballot_sync(0xffffffffu, own != 0);
      if (found != 0) {
        word = __shfl_sync(0xffffffffu, own, lowest(found));
        return first + direction * lowest(found);
      }
    }
    return -1;
  }

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const auto at = static_cast<int>(row / kWarp);
    if (std::int64_t{at} * kWarp >= n) return;
    const std::uint32_t word = words[at];
    const std::uint32_t up_to = 0xffffffffu >> (kWarp - 1 - lane);
    std::uint32_t other = 0;
    int start = 0;
    if ((word & 1u) == 0) {
      const int before = search(at - 1, -1, lane, other);
      start = before * kWarp + highest(other);
    }
    if ((word & up_to) != 0) start = at * kWarp + highest(word & up_to);
    const int after = search(at + 1, 1, lane, other);
    int end = after < 0 ? n : after * kWarp + lowest(other);
    if ((word & ~up_to) != 0) end = at * kWarp + lowest(word & ~up_to);
    if (row < n) runs[row] = {start, end - start};
  }
};

// Values of a warp's 32 rows, a few terms at a time, on their way from memory, where the values of
// a row are neighbours, to lanes that have a row each.
template <class T>
struct value_tile {
  static constexpr int kTerms = 8;
  static constexpr int kStride = kTerms + 1;  // rows in different banks
  T elements[kWarp * kStride];

  // By all lanes of the warp; nothing is read of what lies beyond n rows or k terms.
  SUBQUAD_DEVICE void load(const matrix_view<const T>& values, int first_row, int n, int first_term,
                           int k, int lane) {
    __syncwarp();
    SUBQUAD_UNROLL
    for (int turn = 0; turn < kTerms; ++turn) {
      const int row = turn * (kWarp / kTerms) + lane / kTerms;
      const int term = lane % kTerms;
      if (first_row + row < n && first_term + term < k) {
        elements[row * kStride + term] = values(first_row + row, first_term + term);
      }
    }
    __syncwarp();
  }
  SUBQUAD_DEVICE T operator()(int row, int term) const { return elements[row * kStride + term]; }
};

// ---- one factor --------------------------------------------------------------------------------

enum step_array { kValues, kFrom, kResidual, kTo, kSum, kStepArrays };

// to_i = sum_k w_ik from_j + residual_i, j the row of term k of row i, and w_ik = values_ik or, of
// the transpose, values_jk. `sum` as in multiply_factor. kChannels channels of a row to a thread,
// which alone reads and writes its element of sum. The sum of a row is taken in the order of k,
// every term one fma: its error is at most K u sum_k |w_ik from_j|, u = 2^-24 or 2^-53.
template <class T>
struct factor_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  static constexpr int kWidth = kChannels<T>;
  static constexpr int kTerms = 4;  // whose loads are under way at a time
  using block = channels<T, kWidth>;
  struct shared_memory {
    std::int64_t offsets[kStepArrays];
  };

  matrix_view<const T> values;
  channel_view<const T> from;
  channel_view<const T> residual;  // optional
  channel_view<T> to;
  channel_view<T> sum;  // optional
  batches<kStepArrays> batch;
  factor_pattern pattern;
  std::int64_t first_offset;
  int k;
  int d;
  int groups;  // of channels
  int rows_of_block;
  std::int64_t tiles;
  bool transpose;
  bool is_first;
  bool is_last;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kStepArrays) {
      shared.offsets[thread] = batch.offset(thread, blockIdx.x / tiles);
    }
    __syncthreads();
    const int first_row = static_cast<int>(blockIdx.x % tiles) * rows_of_block;
    for (int item = thread; item < rows_of_block * groups; item += kThreads) {
      const int row = first_row + item / groups;
      if (row < pattern.rows.n) multiply(row, item % groups * kWidth, shared);
    }
  }

  SUBQUAD_DEVICE void multiply(int row, int channel, const shared_memory& shared) const {
    const channel_view<const T> source = from.from(shared.offsets[kFrom]);
    const T* weights = values.data + shared.offsets[kValues];
    const row_run run = pattern.rows.run_of(row);
    block total = block::zero();
    for (int first = 0; first < k; first += kTerms) {
      int rows[kTerms];
      T factors[kTerms];
      block terms[kTerms];
      SUBQUAD_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        rows[t] = first + t < k
                      ? pattern.rows.after(row, run, pattern.offsets[first_offset + first + t])
                      : -1;
        if (rows[t] < 0) continue;
        factors[t] = weights[(transpose ? rows[t] : row) * values.row_stride +
                             (first + t) * values.column_stride];
        source.load(terms[t], rows[t], channel, d);
      }
      SUBQUAD_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        if (rows[t] >= 0) total.add(factors[t], terms[t]);
      }
    }
    if (residual) {
      block more;
      residual.from(shared.offsets[kResidual]).load(more, row, channel, d);
      if (k == 0) total = more;
      if (k > 0) total.add(more);
    }
    if (sum) {
      const channel_view<T> sums = sum.from(shared.offsets[kSum]);
      block inputs;
      source.load(inputs, row, channel, d);
      if (!is_first) {
        block before;
        sums.load(before, row, channel, d);
        before.add(inputs);
        inputs = before;
      }
      if (is_last) {
        inputs.add(total);
        total = inputs;
      } else {
        sums.store(inputs, row, channel, d);
      }
    }
    to.from(shared.offsets[kTo]).store(total, row, channel, d);
  }
};

// ---- all factors in one launch -----------------------------------------------------------------

inline constexpr int kFusedThreads = 448;    // two blocks of them leave each 72 registers
inline constexpr int kMostFusedTerms = 128;  // of a row

// columns_bmkj = values_bmik, j the row of term k of row i: what the transpose of a factor
// multiplies row j of the batch with. Terms that are left out are not written.
template <class T>
struct factor_columns_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 4;
  struct shared_memory {
    value_tile<T> tiles[kThreads / kWarp];
    std::int64_t offset;
  };

  stack_view<const T> values;
  batches<1> batch;
  factor_pattern pattern;
  T* columns;
  std::int64_t first_batch;
  std::int64_t tiles;
  int n_factors;
  int k;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const std::int64_t matrix = blockIdx.x / tiles;
    const std::int64_t m = matrix % n_factors;
    if (threadIdx.x == 0) shared.offset = batch.offset(0, first_batch + matrix / n_factors);
    __syncthreads();
    const auto first_row = static_cast<int>(blockIdx.x % tiles) * kThreads + warp * kWarp;
    const int n = pattern.rows.n;
    if (first_row >= n) return;
    const int row = first_row + lane;
    const row_run run = row < n ? pattern.rows.run_of(row) : row_run{0, 1};
    const matrix_view<const T> from{values.data + shared.offset + m * values.stride,
                                    values.row_stride, values.column_stride};
    T* to = columns + matrix * k * n;
    value_tile<T>& tile = shared.tiles[warp];
    for (int first = 0; first < k; first += value_tile<T>::kTerms) {
      tile.load(from, first_row, n, first, k, lane);
      if (row >= n) continue;
      SUBQUAD_UNROLL
      for (int t = 0; t < value_tile<T>::kTerms; ++t) {
        if (first + t >= k) break;
        const int other = pattern.rows.after(row, run, pattern.offsets[m * k + first + t]);
        if (other >= 0) to[std::int64_t{first + t} * n + other] = tile(lane, t);
      }
    }
  }
};

enum fused_array { kFusedValues, kFusedX, kFusedOut, kFusedStates, kFusedArrays };

template <class T>
struct fused_memory {
  value_tile<T> tiles[kFusedThreads / kWarp];
  std::int64_t offsets[kFusedArrays];
  std::int64_t of_terms[2][kMostFusedTerms];  // the offsets of a factor and of the next
  alignas(16) unsigned char states[16];       // where the two states of all rows begin
};
template <class T>
inline constexpr std::size_t kFusedFixed = sizeof(fused_memory<T>) - 16;
static_assert(kFusedFixed<float> % 16 == 0 && kFusedFixed<double> % 16 == 0);

// The whole chain of multiply_chain for kWidth channels of one batch, which no others take part in:
// two states of all rows lie in shared memory. Each element is the same as of factor_kernel.
template <class T, int kWidth, bool kTranspose>
struct factor_chain_kernel {
  static constexpr int kThreads = kFusedThreads;
  static constexpr int kBlocks = 2;
  using block = channels<T, kWidth>;
  using tile = value_tile<T>;
  using shared_memory = fused_memory<T>;

  stack_view<const T> values;
  const T* columns;  // of the transpose
  channel_view<const T> x;
  channel_view<T> out;     // optional
  channel_view<T> states;  // optional
  std::int64_t states_stride;
  batches<kFusedArrays> batch;
  factor_pattern pattern;
  std::int64_t first_batch;
  int groups;  // of channels
  int n_factors;
  int k;
  int d;
  residual_type residual;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto block_index = static_cast<std::int64_t>(blockIdx.x);
    const std::int64_t of_launch = block_index / groups;
    if (thread < kFusedArrays) {
      shared.offsets[thread] = batch.offset(thread, first_batch + of_launch);
    }
    __syncthreads();
    load_offsets(0, shared);
    const int n = pattern.rows.n;
    const int channel = static_cast<int>(block_index % groups) * kWidth;
    const channel_view<const T> inputs = x.from(shared.offsets[kFusedX]);
    auto* now = reinterpret_cast<block*>(shared.states);
    block* next = now + n;
    for (int row = thread; row < n; row += kThreads) inputs.load(now[row], row, channel, d);
    __syncthreads();
    // Without `out`, what comes after the last state is not asked for.
    const int steps = out ? n_factors : n_factors - 1;
    for (int step = 0; step < steps; ++step) {
      const int m = factor_of(step);
      const bool is_last = step == n_factors - 1;
      const std::int64_t* of_terms = shared.of_terms[step % 2];
      const channel_view<T> results = is_last
                                          ? out.from(shared.offsets[kFusedOut])
                                          : states.from(shared.offsets[kFusedStates] +
                                                        (kTranspose ? m - 1 : m) * states_stride);
      // Warps go through the rows 32 at a time: a tile of values is theirs.
      for (int first = thread / kWarp * kWarp; first < n; first += kThreads) {
        const int row = first + thread % kWarp;
        block total = block::zero();
        const row_run run = row < n ? pattern.rows.run_of(row) : row_run{0, 1};
        if constexpr (kTranspose) {
          add_columns(total, columns + (of_launch * n_factors + m) * k * n, of_terms, row, run,
                      now);
        } else {
          add_values(total, m, of_terms, first, row, run, now, shared);
        }
        if (row >= n) continue;
        if (residual == residual_type::step) {
          total.add(now[row]);
        } else if (residual == residual_type::input) {
          add_input(total, inputs, now[row], row, channel, step, is_last, shared);
        }
        next[row] = total;
        if (results) results.store(total, row, channel, d);
      }
      if (step + 1 < steps) load_offsets(step + 1, shared);
      __syncthreads();
      block* other = now;
      now = next;
      next = other;
    }
  }

  SUBQUAD_DEVICE int factor_of(int step) const { return kTranspose ? n_factors - 1 - step : step; }
  SUBQUAD_DEVICE void load_offsets(int step, shared_memory& shared) const {
    const int term = static_cast<int>(threadIdx.x);
    if (term < k) {
      shared.of_terms[step % 2][term] = pattern.offsets[std::int64_t{factor_of(step)} * k + term];
    }
  }

  SUBQUAD_DEVICE void add_values(block& total, int m, const std::int64_t* of_terms, int first,
                                 int row, const row_run& run, const block* now,
                                 shared_memory& shared) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    tile& own = shared.tiles[threadIdx.x / kWarp];
    const matrix_view<const T> from{values.data + shared.offsets[kFusedValues] + m * values.stride,
                                    values.row_stride, values.column_stride};
    for (int term = 0; term < k; term += tile::kTerms) {
      own.load(from, first, pattern.rows.n, term, k, lane);
      if (row >= pattern.rows.n) continue;
      SUBQUAD_UNROLL_BY(4)  // more takes registers that there are not
      for (int t = 0; t < tile::kTerms; ++t) {
        if (term + t >= k) break;
        const int other = pattern.rows.after(row, run, of_terms[term + t]);
        if (other >= 0) total.add(own(lane, t), now[other]);
      }
    }
  }

  SUBQUAD_DEVICE void add_columns(block& total, const T* factors, const std::int64_t* of_terms,
                                  int row, const row_run& run, const block* now) const {
    if (row >= pattern.rows.n) return;
    constexpr int kTerms = 4;  // whose loads are under way at a time
    const T* column = factors + row;
    for (int first = 0; first < k; first += kTerms) {
      int rows[kTerms];
      T weights[kTerms];
      SUBQUAD_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        rows[t] = first + t < k ? pattern.rows.after(row, run, of_terms[first + t]) : -1;
        if (rows[t] >= 0) weights[t] = *column;
        column += pattern.rows.n;
      }
      SUBQUAD_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        if (rows[t] >= 0) total.add(weights[t], now[rows[t]]);
      }
    }
  }

  // Of the transpose, the inputs of all factors are summed up in `out`.
  SUBQUAD_DEVICE void add_input(block& total, const channel_view<const T>& inputs,
                                const block& input, int row, int channel, int step, bool is_last,
                                const shared_memory& shared) const {
    if constexpr (!kTranspose) {
      block more;
      inputs.load(more, row, channel, d);
      total.add(more);
      return;
    }
    if (!out) return;
    const channel_view<T> sums = out.from(shared.offsets[kFusedOut]);
    block sum = input;
    if (step > 0) {
      sums.load(sum, row, channel, d);
      sum.add(input);
    }
    if (is_last) {
      sum.add(total);
      total = sum;
    } else {
      sums.store(sum, row, channel, d);
    }
  }
};

// ---- what a call needs -------------------------------------------------------------------------

// Batches whose columns are held at a time: 64 MiB of them, or those of one.
std::int64_t batches_of_columns(const product_sizes& size, std::int64_t itemsize) {
  const std::int64_t bytes = size.n_factors * size.n * size.k * itemsize;
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  return std::clamp<std::int64_t>(kBytes / std::max<std::int64_t>(1, bytes), 1,
                                  std::max<std::int64_t>(1, size.batch));
}

template <class T, int kWidth, bool kTranspose>
void multiply_fused(const chain_call& call, const array_view& x, residual_type residual,
                    const array_view* out, const array_view* states) {
  using kernel = factor_chain_kernel<T, kWidth, kTranspose>;
  const product_sizes& size = call.size;
  const auto batch =
      batches_of<kFusedArrays>(call.shape, {{&call.values, 3}, {&x, 2}, {out, 2}, {states, 3}});
  kernel chain{};
  chain.values = stack_at<const T>(call.values, 0);
  chain.columns = reinterpret_cast<const T*>(call.memory.scratch);
  chain.x = channels_of<const T>(&x, batch, kFusedX, kWidth);
  chain.out = channels_of<T>(out, batch, kFusedOut, kWidth);
  chain.states = channels_of<T>(states, batch, kFusedStates, kWidth, 1);
  chain.states_stride = states ? states->strides[states->ndim - 3] : 0;
  chain.batch = batch;
  chain.pattern = call.pattern;
  chain.pattern.rows.backwards = kTranspose;
  chain.groups = static_cast<int>(divide_up(size.d, kWidth));
  chain.n_factors = static_cast<int>(size.n_factors);
  chain.k = static_cast<int>(size.k);
  chain.d = static_cast<int>(size.d);
  chain.residual = residual;
  const std::size_t memory =
      kFusedFixed<T> + 2 * static_cast<std::size_t>(size.n) * sizeof(typename kernel::block);
  if constexpr (!kTranspose) {
    launch_with_memory(size.batch * chain.groups, memory, chain);
    return;
  }
  using columns = factor_columns_kernel<T>;
  const std::int64_t tiles = divide_up(size.n, columns::kThreads);
  const std::int64_t of_turn = batches_of_columns(size, sizeof(T));
  for (std::int64_t first = 0; first < size.batch; first += of_turn) {
    const std::int64_t count = std::min(of_turn, size.batch - first);
    if (size.k > 0) {
      launch(count * size.n_factors * tiles,
             columns{chain.values, batches_of<1>(call.shape, {{&call.values, 3}}), call.pattern,
                     reinterpret_cast<T*>(call.memory.scratch), first, tiles, chain.n_factors,
                     chain.k});
    }
    chain.first_batch = first;
    launch_with_memory(count * chain.groups, memory, chain);
  }
}

void check_sizes(const product_sizes& size) {
  const auto check = [](std::int64_t length, const char* what) {
    if (length <= kMostLength) return;
    throw invalid_argument(std::string("values: expected at most 2^30 ") + what + " on CUDA, got " +
                           std::to_string(length));
  };
  check(size.n, "rows");
  check(size.n_factors, "factors");
  check(size.k, "terms of a row");
  check(size.d, "channels");
}

}  // namespace

// ---- chains ------------------------------------------------------------------------------------

int bytes_of_fused_row(const product_sizes& size, std::int64_t itemsize,
                       std::size_t shared_memory) {
  const std::size_t fixed = itemsize == 8 ? kFusedFixed<double> : kFusedFixed<float>;
  if (size.n_factors == 0 || size.k > kMostFusedTerms || shared_memory < fixed) return 0;
  const auto rows = static_cast<std::int64_t>((shared_memory - fixed) / 2);
  const auto blocks = [&](std::int64_t bytes) {
    return size.batch * divide_up(size.d * itemsize, bytes);
  };
  // Few blocks leave most of a device idle, and only short sequences are done before a launch for
  // each factor is.
  constexpr std::int64_t kFewBlocks = 32;
  constexpr std::int64_t kManyBlocks = 132;
  constexpr std::int64_t kFewRows = 1024;
  if (size.n * 8 > rows || (blocks(8) < kFewBlocks && size.n > kFewRows)) return 0;
  return size.n * 16 <= rows && blocks(16) >= kManyBlocks ? 16 : 8;
}

chain_memory::chain_memory(workspace_layout& workspace, const product_sizes& size,
                           std::int64_t itemsize) {
  const std::int64_t terms = size.n_factors * size.k;
  offsets = workspace.take<std::int64_t>(terms > kOffsetsOfLaunch ? terms : 0);
  borders = workspace.take<std::uint32_t>(divide_up(size.n, kWarp));
  runs = workspace.take<row_run>(size.n);
  // What the device holds in shared memory decides between the two ways, and is not known here.
  std::int64_t bytes = 0;
  if (bytes_of_fused_row(size, itemsize, kSharedMemoryEverywhere) == 0) {
    bytes = std::clamp<std::int64_t>(size.n_factors - 1, 0, 2) * size.batch * size.n * size.d;
  }
  if (bytes_of_fused_row(size, itemsize, kMostSharedMemory) != 0) {
    bytes = std::max(bytes, batches_of_columns(size, itemsize) * size.n_factors * size.n * size.k);
  }
  scratch = workspace.take<char>(bytes * itemsize);
}

chain_call::chain_call(const factor_chain& chain, const array_view& all_values,
                       const array_view* segments, const std::int64_t* offsets, bool circular,
                       const chain_memory& taken)
    : shape(chain.shape), size(chain.size), values(all_values), pattern{}, memory(taken) {
  check_sizes(size);
  if (size.batch == 0 || size.n == 0) return;
  const auto n = static_cast<int>(size.n);
  pattern.rows = {segments ? memory.runs : nullptr, n, circular, false};
  const auto reduced = [&](std::int64_t offset) {
    if (!circular) return std::clamp<std::int64_t>(offset, -size.n, size.n);
    // Segments have lengths that only the device knows.
    return segments ? offset : (offset % size.n + size.n) % size.n;
  };
  const std::int64_t terms = size.n_factors * size.k;
  for (std::int64_t first = 0; first < terms; first += kOffsetsOfLaunch) {
    const auto count = static_cast<int>(std::min<std::int64_t>(kOffsetsOfLaunch, terms - first));
    for (int i = 0; i < count; ++i) pattern.offsets.values[i] = reduced(offsets[first + i]);
    if (terms > kOffsetsOfLaunch) {
      launch(1, write_offsets_kernel{pattern.offsets, memory.offsets + first, count});
    }
  }
  if (terms > kOffsetsOfLaunch) pattern.offsets.memory = memory.offsets;
  if (segments) {
    const std::int64_t blocks = divide_up(n, run_borders_kernel::kThreads);
    launch(blocks,
           run_borders_kernel{vector_at<const std::int64_t>(*segments, 0), memory.borders, n});
    launch(blocks, find_runs_kernel{memory.borders, memory.runs, n});
  }
}

template <class T>
void multiply_factor(const chain_call& call, std::int64_t m, bool transpose, const array_view& from,
                     const array_view* residual, const array_view* sum, chain_part part,
                     const array_view& to) {
  using kernel = factor_kernel<T>;
  constexpr int kWidth = kernel::kWidth;
  const array_view* added = m < 0 ? &from : residual;
  const auto batch = batches_of<kStepArrays>(
      call.shape, {{&call.values, 3}, {&from, 2}, {added, 2}, {&to, 2}, {sum, 2}});
  kernel step{};
  step.values =
      matrix_at<const T>(call.values, m < 0 ? 0 : m * call.values.strides[call.values.ndim - 3]);
  step.from = channels_of<const T>(&from, batch, kFrom, kWidth);
  step.residual = channels_of<const T>(added, batch, kResidual, kWidth);
  step.to = channels_of<T>(&to, batch, kTo, kWidth);
  step.sum = channels_of<T>(sum, batch, kSum, kWidth);
  step.batch = batch;
  step.pattern = call.pattern;
  step.pattern.rows.backwards = transpose;
  step.first_offset = m * call.size.k;
  step.k = m < 0 ? 0 : static_cast<int>(call.size.k);
  step.d = static_cast<int>(call.size.d);
  step.groups = static_cast<int>(divide_up(call.size.d, kWidth));
  step.rows_of_block = std::max(1, kernel::kThreads / std::max(1, step.groups));
  step.tiles = divide_up(call.size.n, step.rows_of_block);
  step.transpose = transpose;
  step.is_first = part == chain_part::first || part == chain_part::only;
  step.is_last = part == chain_part::last || part == chain_part::only;
  launch(call.size.d > 0 ? call.size.batch * step.tiles : 0, step);
}

template <class T>
void multiply_chain(const chain_call& call, const array_view& x, residual_type residual,
                    bool transpose, const array_view* out, const array_view* states,
                    const factor_visitor& visit) {
  const product_sizes& size = call.size;
  if (size.batch == 0 || size.n == 0 || size.d == 0) return;
  const std::int64_t factors = size.n_factors;
  if (factors == 0) {
    if (out) multiply_factor<T>(call, -1, false, x, nullptr, nullptr, chain_part::only, *out);
    return;
  }
  if (out == nullptr && factors == 1 && !visit) return;
  const int bytes = bytes_of_fused_row(size, sizeof(T), most_shared_memory());
  if (bytes > 0) {
    constexpr int kWidth = kChannels<T>;
    const auto multiply =
        bytes == 16 ? transpose ? multiply_fused<T, kWidth, true> : multiply_fused<T, kWidth, false>
        : transpose ? multiply_fused<T, kWidth / 2, true>
                    : multiply_fused<T, kWidth / 2, false>;
    multiply(call, x, residual, out, states);
    return;
  }
  const std::int64_t elements = size.batch * size.n * size.d;
  const auto state = [&](std::int64_t index, auto&& use) {
    if (states) {
      use(matrix_of_stack<T>(*states, index).view());
    } else {
      T* memory = reinterpret_cast<T*>(call.memory.scratch) + index % 2 * elements;
      use(contiguous_array(call.shape, {size.n, size.d}, memory).view());
    }
  };
  const bool sums = transpose && residual == residual_type::input && out != nullptr;
  for (std::int64_t step = 0; step < factors; ++step) {
    const std::int64_t m = transpose ? factors - 1 - step : step;
    const bool is_first = step == 0;
    const bool is_last = step == factors - 1;
    const chain_part part = is_first && is_last ? chain_part::only
                            : is_first          ? chain_part::first
                            : is_last           ? chain_part::last
                                                : chain_part::inner;
    const auto multiply = [&](const array_view& from, const array_view& to) {
      const array_view* added = residual == residual_type::step                  ? &from
                                : residual == residual_type::input && !transpose ? &x
                                                                                 : nullptr;
      multiply_factor<T>(call, m, transpose, from, added, sums ? out : nullptr, part, to);
    };
    const auto go_on_from = [&](const array_view& from) {
      if (visit) visit(m, from);
      if (!is_last) {
        state(transpose ? m - 1 : m, [&](const array_view& to) { multiply(from, to); });
      } else if (out) {
        multiply(from, *out);
      }
    };
    if (is_first) {
      go_on_from(x);
    } else {
      state(transpose ? m : m - 1, go_on_from);
    }
  }
}

template void multiply_factor<float>(const chain_call&, std::int64_t, bool, const array_view&,
                                     const array_view*, const array_view*, chain_part,
                                     const array_view&);
template void multiply_factor<double>(const chain_call&, std::int64_t, bool, const array_view&,
                                      const array_view*, const array_view*, chain_part,
                                      const array_view&);
template void multiply_chain<float>(const chain_call&, const array_view&, residual_type, bool,
                                    const array_view*, const array_view*, const factor_visitor&);
template void multiply_chain<double>(const chain_call&, const array_view&, residual_type, bool,
                                     const array_view*, const array_view*, const factor_visitor&);

}  // namespace subquad::cuda

namespace subquad::core {

std::size_t sparse_factor_product_workspace(std::int64_t batch, std::int64_t n_factors,
                                            std::int64_t n, std::int64_t k, std::int64_t d,
                                            std::int64_t itemsize) {
  workspace_layout workspace;
  cuda::chain_memory(workspace, {batch, n_factors, n, k, d}, itemsize);
  return workspace.size();
}

void sparse_factor_product(const array_view& values, const array_view& x,
                           const array_view* segments, const std::int64_t* offsets,
                           residual_type residual, bool circular, bool transpose,
                           const array_view& out, const array_view* intermediates,
                           const array_view& workspace) {
  const factor_chain chain =
      check_sparse_factor_product(values, x, segments, offsets, transpose, out, intermediates);
  workspace_layout pieces(workspace);
  const bool is_float = values.type == dtype::float32;
  const cuda::chain_memory memory(pieces, chain.size, is_float ? 4 : 8);
  const cuda::chain_call call(chain, values, segments, offsets, circular, memory);
  (is_float ? cuda::multiply_chain<float>
            : cuda::multiply_chain<double>)(call, x, residual, transpose, &out, intermediates, {});
}

}  // namespace subquad::core
