# Kernels, compiled once for each instruction set.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(subquad_levels v2 v3 v4)
  set(subquad_v2_bytes 16)
  set(subquad_v2_options -march=x86-64-v2)
  set(subquad_v3_bytes 32)
  set(subquad_v3_options -march=x86-64-v3)
  set(subquad_v4_bytes 64)
  set(subquad_v4_options -march=x86-64-v4 -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(subquad_levels neon)
  set(subquad_neon_bytes 16)
  set(subquad_neon_options -march=armv8-a)
else()
  message(FATAL_ERROR "subquad builds for x86-64 and aarch64; this is ${CMAKE_SYSTEM_PROCESSOR}")
endif()

# -fno-lto: an optimiser that sees the whole program could inline these functions into code that runs
# on every processor.
set(subquad_kernel_options -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp-simd
                           -fno-lto -Wno-psabi
)

set(subquad_kernel_objects)
set(subquad_kernel_concepts)

# subquad_add_kernels(<concept>): compiles cpp/src/kernels/<concept>.inl for every level, in targets
# subquad_kernels_<concept>_<level>, and appends the objects to subquad_kernel_objects.
function(subquad_add_kernels concept)
  foreach(level IN LISTS subquad_levels)
    set(target subquad_kernels_${concept}_${level})
    set(source ${PROJECT_BINARY_DIR}/kernels/${concept}_${level}.cpp)
    file(
      CONFIGURE
      OUTPUT ${source}
      CONTENT "#define SUBQUAD_ISA ${level}\n#define SUBQUAD_VECTOR_BYTES ${subquad_${level}_bytes}\n#define SUBQUAD_KERNELS_TABLE_${concept}\n#include \"${concept}.inl\"\n"
      @ONLY
    )
    add_library(${target} OBJECT ${source})
    target_link_libraries(${target} PRIVATE subquad_options)
    target_compile_options(${target} PRIVATE ${subquad_kernel_options} ${subquad_${level}_options})
    list(APPEND subquad_kernel_objects $<TARGET_OBJECTS:${target}>)
  endforeach()
  set(subquad_kernel_objects ${subquad_kernel_objects} PARENT_SCOPE)
  set(subquad_kernel_concepts ${subquad_kernel_concepts} ${concept} PARENT_SCOPE)
endfunction()
