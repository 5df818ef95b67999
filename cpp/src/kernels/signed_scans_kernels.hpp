// Running sums of signed exponentials, as logarithms, and their reverse: what one task computes.
#ifndef SUBQUAD_KERNELS_SIGNED_SCANS_KERNELS_HPP
#define SUBQUAD_KERNELS_SIGNED_SCANS_KERNELS_HPP

#include <cstddef>
#include <cstdint>

#include "lane_tile.hpp"

namespace subquad {

// s = e^reference (sum + remainder): the reference is an entry x_j, the lowest number before there
// is one. The sum keeps what rounding takes from it, so that terms which cancel leave nothing.
struct signed_state {
  lane_numbers reference;
  lane_numbers sum;
  lane_numbers remainder;
};

// sum_i grad_i / s_i = e^-reference sum.
struct signed_carry {
  lane_numbers reference;
  lane_numbers sum;
};

// Tiles of s_i = sum_{j <= i} sign_j exp(x_j) and of its reverse, formulas in c_api.h.
//   scan       out = log |s_i| and out_sign from state, or of s_{i-1} where `exclusive`; the last
//              state
//   summarise  the last state
//   prepare    from state the states that reverse needs, and with grad also carry, of the tile
//   reverse    grad_x, grad_sign (each optional) from saved; carry, of the i behind the tile, takes
//              in those of the tile
// Nothing aliases. Terms whose x lie within kSignedThreshold above and 700 below the reference are
// equal where their x are, which makes a sum of them exact to 106 bits of its largest value; each
// errs by 2 ulp of a double. Gradients below 1e-190 may lose digits, and those above 1e177, which
// float32 does not have, may be infinite.
template <class T>
struct signed_scan_task {
  lane_tile tile;
  lane_view<const T> x;
  lane_view<const T> sign;
  lane_view<const T> grad;
  lane_view<T> out;
  lane_view<T> out_sign;
  lane_view<T> grad_x;
  lane_view<T> grad_sign;
  bool exclusive;
  signed_state* state;
  signed_state* saved;  // before each block of kBlockSteps steps
  signed_carry* carry;
  void* scratch;  // `scratch` bytes, aligned to 64
};

template <class T>
struct signed_scans_functions {
  std::size_t scratch;
  void (*scan)(const signed_scan_task<T>& task);
  void (*summarise)(const signed_scan_task<T>& task);
  void (*prepare)(const signed_scan_task<T>& task);
  void (*reverse)(const signed_scan_task<T>& task);
};

struct signed_scans_kernels {
  signed_scans_functions<float> f32;
  signed_scans_functions<double> f64;
};

// An x that exceeds the reference by more than this becomes the reference, and so does one that
// lies further below it than this while the sum is 0.
constexpr double kSignedThreshold = 300;

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_SIGNED_SCANS_KERNELS_HPP
