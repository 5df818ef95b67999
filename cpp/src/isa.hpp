// The instruction-set level in use, and how a concept finds its table of kernels.
#ifndef SUBQUAD_ISA_HPP
#define SUBQUAD_ISA_HPP

#include <string_view>

namespace subquad {

enum class isa_level : int { neon = 1, v2 = 2, v3 = 3, v4 = 4 };

// The level of this thread's scoped_isa, else the one selected. Never throws: where SUBQUAD_ISA is
// not a level, the best one (check_environment() reports it).
isa_level current_isa() noexcept;

// The level of the calls that this thread makes while the object lives: what packs memory and what
// reads it must be of one level, whatever is selected meanwhile.
class scoped_isa {
 public:
  explicit scoped_isa(isa_level level) noexcept;
  ~scoped_isa();
  scoped_isa(const scoped_isa&) = delete;
  scoped_isa& operator=(const scoped_isa&) = delete;

 private:
  int previous_;
};

// The best level that this processor runs.
isa_level best_isa() noexcept;

// Levels compiled into the library that this processor runs, narrowest first.
int isa_level_count() noexcept;
isa_level isa_level_at(int index) noexcept;
const char* isa_name(isa_level level) noexcept;

// Throws invalid_argument where `name` is not a level that this processor runs.
void select_isa(std::string_view name);

// Throws invalid_argument, naming the variable, where SUBQUAD_ISA is not a level or
// SUBQUAD_NUM_THREADS is not a positive number; error where the processor lacks the baseline.
void check_environment();

namespace detail {
void check_isa_environment();
void check_threads_environment();
}  // namespace detail

}  // namespace subquad

#if defined(__x86_64__)
#define SUBQUAD_FOR_EACH_ISA(apply, concept_name) \
  apply(v2, concept_name) apply(v3, concept_name) apply(v4, concept_name)
#elif defined(__aarch64__)
#define SUBQUAD_FOR_EACH_ISA(apply, concept_name) apply(neon, concept_name)
#else
#error "subquad supports x86-64 and aarch64"
#endif

#define SUBQUAD_DETAIL_DECLARE_KERNELS(level, concept_name)   \
  namespace level {                                           \
  extern const concept_name##_kernels kernels_##concept_name; \
  }
#define SUBQUAD_DETAIL_KERNELS_CASE(level, concept_name) \
  case isa_level::level:                                 \
    return level::kernels_##concept_name;

// At global scope, where `struct <concept>_kernels` is declared in namespace subquad: defines
// subquad::<concept>_table(), the kernels of the current level. Call it once per operation.
#define SUBQUAD_DEFINE_KERNEL_TABLE(concept_name)                               \
  namespace subquad {                                                           \
  SUBQUAD_FOR_EACH_ISA(SUBQUAD_DETAIL_DECLARE_KERNELS, concept_name)            \
  static inline const concept_name##_kernels& concept_name##_table() noexcept { \
    switch (current_isa()) {                                                    \
      SUBQUAD_FOR_EACH_ISA(SUBQUAD_DETAIL_KERNELS_CASE, concept_name)           \
      default:                                                                  \
        break;                                                                  \
    }                                                                           \
    __builtin_unreachable();                                                    \
  }                                                                             \
  }

#endif  // SUBQUAD_ISA_HPP
