// Threads and instruction set of the C++ interface.
#ifndef SUBQUAD_THREADS_HPP
#define SUBQUAD_THREADS_HPP

#include <string>
#include <vector>

#include "subquad/c_api.h"
#include "subquad/errors.hpp"

namespace subquad {

// Threads that a call may use: see subquad_get_num_threads.
inline int get_num_threads() { return subquad_get_num_threads(); }

// Throws invalid_argument unless n_threads >= 1.
inline void set_num_threads(int n_threads) { detail::call(subquad_set_num_threads, n_threads); }

// The instruction set in use: "v2", "v3", "v4" (x86-64 levels) or "neon".
inline std::string get_isa() { return subquad_get_isa(); }

// Throws invalid_argument for a name that is not among isa_levels().
inline void set_isa(const std::string& level) { detail::call(subquad_set_isa, level.c_str()); }

// The instruction sets that this processor can run, narrowest first.
inline std::vector<std::string> isa_levels() {
  std::vector<std::string> levels;
  for (int i = 0; i < subquad_isa_level_count(); ++i) levels.emplace_back(subquad_isa_level(i));
  return levels;
}

}  // namespace subquad

#endif  // SUBQUAD_THREADS_HPP
