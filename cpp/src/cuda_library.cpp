#include "cuda_library.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "subquad/c_api.h"
#include "subquad/errors.hpp"

namespace subquad {
namespace {

constexpr const char* kFileName = "libsubquad_cuda.so";

std::string path_of_library() {
  const char* chosen = std::getenv("SUBQUAD_CUDA_LIBRARY");
  if (chosen != nullptr && *chosen != '\0') return chosen;
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&path_of_library), &self) == 0 ||
      self.dli_fname == nullptr) {
    return kFileName;
  }
  // A program found through PATH has no directory in its name: the dynamic loader searches then.
  const std::string object(self.dli_fname);
  return object.substr(0, object.rfind('/') + 1) + kFileName;
}

struct library {
  void* handle = nullptr;
  std::string path;
  std::string problem;

  library() : path(path_of_library()) {
    if (path.find('/') != std::string::npos && access(path.c_str(), F_OK) != 0) {
      problem = "this build of subquad has no CUDA library (" + path + ": no such file)";
      return;
    }
    // Local: it exports functions of the same names as this object.
    handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* reason = dlerror();
      problem = "the CUDA library of subquad does not load: " +
                std::string(reason == nullptr ? path.c_str() : reason);
      return;
    }
    using version_function = const char* (*)();
    const auto version = reinterpret_cast<version_function>(dlsym(handle, "subquad_version"));
    const std::string found = version == nullptr ? "unknown" : version();
    if (found != subquad_version()) {
      problem = "the CUDA library of subquad is of another version: expected " +
                std::string(subquad_version()) + ", got " + found + " (" + path + ")";
    }
  }
};

const library& loaded() {
  // Never destroyed: threads may be inside it while the process ends.
  static const library& instance = *new library;
  return instance;
}

}  // namespace

const std::string& cuda_library_problem() { return loaded().problem; }

void* cuda_library_function(const char* name) {
  void* function = dlsym(loaded().handle, name);
  if (function == nullptr) {
    throw device_error(std::string("the CUDA library of subquad lacks ") + name + " (" +
                       loaded().path + ")");
  }
  return function;
}

}  // namespace subquad
