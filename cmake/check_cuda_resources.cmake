# cmake -DNVCC=<nvcc> -DARCHITECTURE=<90> -DSOURCE=<file.cu> -DROOT=<repository> -DOUTPUT=<file>
#       -P check_cuda_resources.cmake
#
# A kernel must not spill registers: what it spills goes through memory in its innermost loop. Prints
# the registers of every kernel.

execute_process(
  COMMAND
    ${NVCC} -std=c++17 -O3 -arch=sm_${ARCHITECTURE} -cubin --expt-relaxed-constexpr -Xptxas -v
    --Werror=all-warnings -DSUBQUAD_FOR_CUDA -I${ROOT}/cpp/include -I${ROOT}/cpp/src -I${ROOT}/cpp/src/kernels ${SOURCE} -o
    ${OUTPUT}
  OUTPUT_VARIABLE report
  ERROR_VARIABLE report
  RESULT_VARIABLE status
)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${report}")
endif()
string(REGEX MATCHALL "Compiling entry function '[^']*'" kernels "${report}")
string(REGEX MATCHALL "[0-9]+ bytes stack frame, [0-9]+ bytes spill stores, [0-9]+ bytes spill loads"
             frames "${report}"
)
string(REGEX MATCHALL "Used [0-9]+ registers" registers "${report}")
list(LENGTH kernels count)
list(LENGTH frames count_of_frames)
list(LENGTH registers count_of_registers)
if(NOT count EQUAL count_of_frames OR NOT count EQUAL count_of_registers)
  message(FATAL_ERROR "ptxas tells of ${count} kernels, ${count_of_frames} frames and "
                      "${count_of_registers} numbers of registers:\n${report}"
  )
endif()
set(spilled)
foreach(kernel frame used IN ZIP_LISTS kernels frames registers)
  message("${used}, ${frame}: ${kernel}")
  if(NOT frame MATCHES " 0 bytes spill stores, 0 bytes spill loads")
    list(APPEND spilled "${kernel}: ${frame}")
  endif()
endforeach()
if(spilled)
  list(JOIN spilled "\n" spilled)
  message(FATAL_ERROR "kernels that spill registers:\n${spilled}")
endif()
