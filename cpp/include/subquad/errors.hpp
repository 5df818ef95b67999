// The exceptions of the C++ interface, and how a status of the C ABI becomes one.
#ifndef SUBQUAD_ERRORS_HPP
#define SUBQUAD_ERRORS_HPP

#include <cstdio>
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

// CUDA reported an error: no driver or too old a one, no such device, a failed launch.
class device_error : public error {
 public:
  using error::error;
};

// Memory that was asked for and not given, with a message.
class out_of_memory : public std::bad_alloc {
 public:
  explicit out_of_memory(const char* message) noexcept {
    std::snprintf(report_.message, sizeof(report_.message), "%s", message);
  }
  const char* what() const noexcept override { return report_.message; }

 private:
  subquad_error report_;
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
      throw out_of_memory(report.message);
    case SUBQUAD_DEVICE_ERROR:
      throw device_error(report.message);
    case SUBQUAD_INTERNAL_ERROR:
      break;
  }
  throw error(report.message);
}

}  // namespace detail

}  // namespace subquad

#endif  // SUBQUAD_ERRORS_HPP
