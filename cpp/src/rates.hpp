// Rates of this machine at the current instruction set, for the limits that benchmarks print.
#ifndef SUBQUAD_RATES_HPP
#define SUBQUAD_RATES_HPP

#include <cstdint>
#include <string_view>

namespace subquad {

// Units per second of all threads that a region may use now, each measured for `seconds`; the units
// are those of rates_kernels.hpp. name: "multiply_adds", "tile_products" (of inner dimension depth)
// or "exponentials"; itemsize 4 or 8.
double measure_rate(std::string_view name, std::int64_t itemsize, std::int64_t depth,
                    double seconds);

}  // namespace subquad

#endif  // SUBQUAD_RATES_HPP
