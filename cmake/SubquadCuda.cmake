# The CUDA library: the functions of the C ABI for arrays on CUDA, in one plain shared library.
#
# It needs nothing of CUDA at run time but the driver: its runtime is linked statically, and where
# there is no driver it loads and says so.

set(SUBQUAD_CUDA AUTO CACHE STRING "Build the CUDA library: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE SUBQUAD_CUDA PROPERTY STRINGS AUTO ON OFF)
set(SUBQUAD_CUDA_ARCHITECTURES
    "80-real;90-real;100-real;120"
    CACHE STRING "Architectures of the CUDA library, as in CMAKE_CUDA_ARCHITECTURES"
)

file(GLOB subquad_cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cpp/src/cuda/*.cu)
list(
  APPEND
  subquad_cuda_sources
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_attention.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_embedding.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_factors.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_features.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_normalizers.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_scans.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/c_api_version.cpp
  ${PROJECT_SOURCE_DIR}/cpp/src/cuda/c_api_cuda.cpp
)

set(subquad_has_cuda OFF)
if(SUBQUAD_CUDA)
  include(CheckLanguage)
  # Of the library; and what the compiler is tried with.
  set(CMAKE_CUDA_ARCHITECTURES ${SUBQUAD_CUDA_ARCHITECTURES})
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
      set(subquad_has_cuda ON)
      message(STATUS "CUDA library: nvcc ${CMAKE_CUDA_COMPILER_VERSION}, for "
                     "${SUBQUAD_CUDA_ARCHITECTURES}"
      )
    elseif(SUBQUAD_CUDA STREQUAL "AUTO")
      message(STATUS "CUDA library: not built, nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 13.0")
    else()
      message(FATAL_ERROR "SUBQUAD_CUDA=${SUBQUAD_CUDA} needs nvcc 13.0 or newer, found "
                          "${CMAKE_CUDA_COMPILER_VERSION}"
      )
    endif()
  elseif(SUBQUAD_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA library: not built, no nvcc found")
  else()
    message(FATAL_ERROR "SUBQUAD_CUDA=${SUBQUAD_CUDA} needs nvcc, which was not found: "
                        "put it on PATH or set CMAKE_CUDA_COMPILER"
    )
  endif()
endif()

function(subquad_add_cuda_library)
  if(NOT subquad_has_cuda)
    return()
  endif()
  add_library(subquad_cuda SHARED ${subquad_cuda_sources})
  # What show_config tells: sm_80, and compute_120 where there is code for newer devices too.
  string(REGEX REPLACE "([0-9]+)-real" "sm_\\1" names "${SUBQUAD_CUDA_ARCHITECTURES}")
  string(REGEX REPLACE "(^|;)([0-9]+)(-virtual)?(;|$)" "\\1compute_\\2\\4" names "${names}")
  list(JOIN names " " names)
  target_compile_definitions(
    subquad_cuda PRIVATE SUBQUAD_FOR_CUDA SUBQUAD_VERSION="${PROJECT_VERSION}"
                         SUBQUAD_CUDA_ARCHITECTURES="${names}"
  )
  target_include_directories(
    subquad_cuda PRIVATE ${PROJECT_SOURCE_DIR}/cpp/include ${PROJECT_SOURCE_DIR}/cpp/src
                         ${PROJECT_SOURCE_DIR}/cpp/src/kernels
                         ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}
  )
  target_compile_options(
    subquad_cuda
    PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wconversion -Wshadow $<$<BOOL:${SUBQUAD_WERROR}>:-Werror>>
      $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra --compress-mode=size>
      $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${SUBQUAD_WERROR}>>:--Werror=all-warnings -Xptxas=--warn-on-spills>
  )
  set(exports ${PROJECT_SOURCE_DIR}/cmake/exports.map)
  target_link_options(
    subquad_cuda PRIVATE LINKER:--version-script=${exports} LINKER:--no-undefined
  )
  set_target_properties(
    subquad_cuda
    PROPERTIES CUDA_STANDARD 17
               CUDA_STANDARD_REQUIRED ON
               CUDA_EXTENSIONS OFF
               CUDA_VISIBILITY_PRESET hidden
               CUDA_RUNTIME_LIBRARY Static
               LINK_DEPENDS ${exports}
  )
endfunction()
