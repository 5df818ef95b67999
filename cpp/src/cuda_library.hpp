// The CUDA library, loaded when it is first asked for and kept for the life of the process.
#ifndef SUBQUAD_CUDA_LIBRARY_HPP
#define SUBQUAD_CUDA_LIBRARY_HPP

#include <string>

namespace subquad {

// Why there is no CUDA library, with its path; empty where there is one.
const std::string& cuda_library_problem();

// A function of the C ABI in it. Throws device_error where the library lacks it. To be asked only
// where there is no problem.
void* cuda_library_function(const char* name);

}  // namespace subquad

#endif  // SUBQUAD_CUDA_LIBRARY_HPP
