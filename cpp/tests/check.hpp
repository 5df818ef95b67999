// Checks for the test programs: each failure is printed, and main returns whether there were any.
#ifndef SUBQUAD_TESTS_CHECK_HPP
#define SUBQUAD_TESTS_CHECK_HPP

#include <cstdio>
#include <string>

namespace checks {

inline int& failures() {
  static int count = 0;
  return count;
}

// What main returns. The number of failures would not do: a multiple of 256 is a success.
inline int status() { return failures() > 0; }

inline void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::printf("%s:%d: %s\n", file, line, what);
  ++failures();
}

// Whether `function` throws an E whose message contains `part`.
template <class E, class F>
bool throws(F&& function, const std::string& part) {
  try {
    function();
  } catch (const E& e) {
    if (std::string(e.what()).find(part) != std::string::npos) return true;
    std::printf("other message: %s\n", e.what());
    return false;
  }
  return false;
}

}  // namespace checks

#define SUBQUAD_CHECK(condition) checks::check((condition), #condition, __FILE__, __LINE__)

#endif  // SUBQUAD_TESTS_CHECK_HPP
