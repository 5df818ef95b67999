// The exceptions of the C++ interface, and how a status of the C ABI becomes one.
#ifndef SUBQUAD_ERRORS_HPP
#define SUBQUAD_ERRORS_HPP

#include <new>
#include <stdexcept>

#include "subquad/c_api.h"

namespace subquad {

class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value, rank or size that the function does not take.
class invalid_argument : public error {
 public:
  using error::error;
};

// An element type or a device that the function does not take.
class type_error : public error {
 public:
  using error::error;
};

namespace detail {

// Calls a function of the C ABI, whose last argument is a subquad_error*, and throws what it
// reports.
template <class F, class... Arguments>
void call(F function, Arguments... arguments) {
  subquad_error report;
  switch (function(arguments..., &report)) {
    case SUBQUAD_SUCCESS:
      return;
    case SUBQUAD_INVALID_ARGUMENT:
      throw invalid_argument(report.message);
    case SUBQUAD_TYPE_ERROR:
      throw type_error(report.message);
    case SUBQUAD_OUT_OF_MEMORY:
      throw std::bad_alloc();
    case SUBQUAD_INTERNAL_ERROR:
      break;
  }
  throw error(report.message);
}

}  // namespace detail

}  // namespace subquad

#endif  // SUBQUAD_ERRORS_HPP
