#include "rates.hpp"

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "isa.hpp"
#include "kernels/rates_kernels.hpp"
#include "parallel.hpp"
#include "subquad/errors.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(rates)

namespace subquad {

double measure_rate(std::string_view name, std::int64_t itemsize, std::int64_t depth,
                    double seconds) {
  if (itemsize != 4 && itemsize != 8) {
    throw invalid_argument("itemsize: expected 4 or 8, got " + std::to_string(itemsize));
  }
  if (depth < 1) throw invalid_argument("depth: expected at least 1, got " + std::to_string(depth));
  const bool known = name == "multiply_adds" || name == "tile_products" || name == "exponentials";
  if (!known) {
    throw invalid_argument("name: expected multiply_adds, tile_products or exponentials, got " +
                           std::string(name));
  }
  const rates_functions& kernels = itemsize == 4 ? rates_table().f32 : rates_table().f64;
  const int threads = available_threads();
  std::vector<double> rates(static_cast<std::size_t>(threads), 0.0);
  parallel_for(threads, threads, [&](std::int64_t task, int) {
    using clock = std::chrono::steady_clock;
    const std::size_t bytes = kernels.tile_products_scratch(depth);
    const auto scratch = std::make_unique<double[]>(bytes / sizeof(double) + 1);
    kernels.prepare_tile_products(depth, scratch.get());
    double sink = 0;
    double units = 0;
    const clock::time_point begin = clock::now();
    double elapsed = 0;
    do {
      if (name == "multiply_adds") {
        units += kernels.multiply_adds(&sink);
      } else if (name == "tile_products") {
        units += kernels.tile_products(depth, scratch.get(), &sink);
      } else {
        units += kernels.exponentials(&sink);
      }
      elapsed = std::chrono::duration<double>(clock::now() - begin).count();
    } while (elapsed < seconds);
    // The sink is finite, so this adds nothing; without it the work could be left out.
    rates[static_cast<std::size_t>(task)] = units / elapsed + (sink != sink ? 1 : 0);
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace subquad
