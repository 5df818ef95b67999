// Cumulative log-sum-exp and its reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_SCANS_KERNELS_HPP
#define SUBQUAD_KERNELS_SCANS_KERNELS_HPP

#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

// Entries between two saved states of a lane: a reverse works through them twice, the second time
// out of the first-level cache. Columns go through it a vector wide.
constexpr std::int64_t kScanRowBlock = 256;
constexpr std::int64_t kScanColumnBlock = 64;

// Most lanes of one task.
constexpr std::int64_t kScanWidth = 128;

// e^reference (sum + low), |low| at most half an ulp of sum. The reference is an entry, or the
// logarithm that a state came in with: sum is at least about 1, and differences from the reference
// do not feel a shift of all entries. Empty: reference -inf, sum 0. Not finite: the reference,
// which is then NaN or +inf, alone.
template <class T>
struct scan_state {
  double sum;
  T low;
  T reference;
};

// States of `width` lanes after the n entries x (n, width) of one run, and
//   out_i = log(e^entry + sum_{j <= i} exp(x_j)).
// `local` does not depend on `entry`, and neither depends on what is written. Nothing aliases.
// float: sums of a vector's lanes, or of 16 entries of a lane, in float, all others in double.
// double: all others in double with what rounding took from them.
template <class T>
struct logcumsumexp_task {
  matrix_view<const T> x;
  std::int64_t n;
  std::int64_t width;
  matrix_view<T> out;  // optional
  std::int64_t n_out;  // the first so many are written
  const scan_state<T>* entry;
  scan_state<T>* local;
  scan_state<T>* blocks;  // optional: local before entry (b + 1) block of lane l at
                          // blocks[b * width + l]
};

// What the sums of a task's entries and later ones pass to what came before it:
// own + scale * later, in units of e^-(reference of the entry state).
struct scan_adjoint {
  double own;
  double scale;
};

// grad_x_j = exp(x_j) (sum_{i >= j} grad_i / exp(out_i) + later), with `later` that sum over what
// follows the task, in units of e^-(reference of the state `end`); 0 where x_j = -inf. A sum that
// is not finite makes NaN of what it holds where its gradient is not 0; an empty one counts for
// nothing. Nothing aliases. The sums in T and double as those of logcumsumexp_task.
template <class T>
struct logcumsumexp_vjp_task {
  matrix_view<const T> x;
  std::int64_t n;
  std::int64_t width;
  matrix_view<const T> grad;  // optional (0)
  std::int64_t n_grad;        // rows of grad; those after count as 0
  matrix_view<T> grad_x;      // optional
  const scan_state<T>* entry;
  const scan_state<T>* blocks;  // as logcumsumexp_task left them
  const scan_state<T>* end;     // after the last entry; null where nothing follows
  const double* later;          // width, with `end`; read with grad_x alone
  scan_adjoint* adjoint;        // width
};

template <class T>
struct scans_functions {
  void (*rows)(const logcumsumexp_task<T>& task);     // lanes one after another, any strides
  void (*columns)(const logcumsumexp_task<T>& task);  // lanes contiguous, side by side in vectors
  void (*rows_vjp)(const logcumsumexp_vjp_task<T>& task);
  void (*columns_vjp)(const logcumsumexp_vjp_task<T>& task);
  // state[l] = state[l] followed by next[l].
  void (*merge)(scan_state<T>* state, const scan_state<T>* next, std::int64_t width);
};

struct scans_kernels {
  scans_functions<float> f32;
  scans_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_SCANS_KERNELS_HPP
