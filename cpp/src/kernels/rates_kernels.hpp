// Work whose only purpose is to be timed: the rates that limits are computed from.
#ifndef SUBQUAD_KERNELS_RATES_KERNELS_HPP
#define SUBQUAD_KERNELS_RATES_KERNELS_HPP

#include <cstddef>
#include <cstdint>

namespace subquad {

// Each does about 1e7 units of work, adds something that depends on all of it to *sink and returns
// the number of units: floating-point operations of multiply-adds in registers, operations of tile
// products of inner dimension `depth` on panels in the second-level cache (the maximum of each
// column as epilogue), exponentials of a block in the first-level cache, summed.
struct rates_functions {
  double (*multiply_adds)(double* sink);
  std::size_t (*tile_products_scratch)(std::int64_t depth);
  void (*prepare_tile_products)(std::int64_t depth, void* scratch);
  double (*tile_products)(std::int64_t depth, void* scratch, double* sink);
  double (*exponentials)(double* sink);
};

struct rates_kernels {
  rates_functions f32;
  rates_functions f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_RATES_KERNELS_HPP
