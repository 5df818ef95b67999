#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "isa.hpp"
#include "subquad/errors.hpp"

namespace subquad {
namespace {

#if defined(__x86_64__)
constexpr std::array<isa_level, 3> kCompiledLevels{isa_level::v2, isa_level::v3, isa_level::v4};

bool processor_runs(isa_level level) noexcept {
  switch (level) {
    case isa_level::v2:
      return __builtin_cpu_supports("x86-64-v2");
    case isa_level::v3:
      return __builtin_cpu_supports("x86-64-v3");
    case isa_level::v4:
      return __builtin_cpu_supports("x86-64-v4");
    default:
      return false;
  }
}
#else
constexpr std::array<isa_level, 1> kCompiledLevels{isa_level::neon};

bool processor_runs(isa_level) noexcept { return true; }
#endif

// Each level includes the ones before it.
int count_levels() noexcept {
  int count = 0;
  for (const isa_level level : kCompiledLevels) count += processor_runs(level) ? 1 : 0;
  return count;
}

bool find_level(std::string_view name, isa_level& found) noexcept {
  for (const isa_level level : kCompiledLevels) {
    if (name == isa_name(level)) {
      found = level;
      return true;
    }
  }
  return false;
}

std::string level_names(std::size_t count) {
  std::string names;
  for (std::size_t i = 0; i < count; ++i) {
    names += names.empty() ? "" : ", ";
    names += isa_name(kCompiledLevels[i]);
  }
  return names;
}

isa_level initial_level() noexcept {
  isa_level cap = best_isa();
  const char* value = std::getenv("SUBQUAD_ISA");
  if (value != nullptr && *value != '\0') find_level(value, cap);
  return cap < best_isa() ? cap : best_isa();
}

std::atomic<isa_level>& selected_level() noexcept {
  static std::atomic<isa_level> level{initial_level()};
  return level;
}

}  // namespace

const char* isa_name(isa_level level) noexcept {
  switch (level) {
    case isa_level::neon:
      return "neon";
    case isa_level::v2:
      return "v2";
    case isa_level::v3:
      return "v3";
    case isa_level::v4:
      return "v4";
  }
  return "";
}

int isa_level_count() noexcept {
  static const int count = count_levels();
  return count;
}

isa_level isa_level_at(int index) noexcept {
  return kCompiledLevels[static_cast<std::size_t>(index)];
}

isa_level best_isa() noexcept {
  const int count = isa_level_count();
  return isa_level_at(count > 0 ? count - 1 : 0);
}

namespace {
thread_local int scoped_level = 0;
}  // namespace

isa_level current_isa() noexcept {
  if (scoped_level != 0) return static_cast<isa_level>(scoped_level);
  return selected_level().load(std::memory_order_relaxed);
}

scoped_isa::scoped_isa(isa_level level) noexcept : previous_(scoped_level) {
  scoped_level = static_cast<int>(level);
}
scoped_isa::~scoped_isa() { scoped_level = previous_; }

void select_isa(std::string_view name) {
  isa_level level{};
  if (!find_level(name, level) || level > best_isa()) {
    throw invalid_argument("level: expected one of " +
                           level_names(static_cast<std::size_t>(isa_level_count())) + ", got '" +
                           std::string(name) + "'");
  }
  selected_level().store(level, std::memory_order_relaxed);
}

void detail::check_isa_environment() {
  if (isa_level_count() == 0) {
    throw error(std::string("this processor does not run the baseline instruction set, ") +
                isa_name(kCompiledLevels[0]));
  }
  const char* value = std::getenv("SUBQUAD_ISA");
  isa_level level{};
  if (value != nullptr && *value != '\0' && !find_level(value, level)) {
    throw invalid_argument("SUBQUAD_ISA: expected one of " + level_names(kCompiledLevels.size()) +
                           ", got '" + value + "'");
  }
}

void check_environment() {
  // The environment is read once: getenv is not safe beside a setenv of another thread.
  static const bool checked = [] {
    detail::check_isa_environment();
    detail::check_threads_environment();
    return true;
  }();
  static_cast<void>(checked);
}

}  // namespace subquad
