# cmake -DOBJECT=<file> -DLEVEL=<v2|v3|v4|neon> -DNM=<nm> [-DOBJDUMP=<objdump>] -P check_kernel_object.cmake
#
# A kernel object must not define weak functions of anybody else's: the linker keeps one copy of each
# for the whole program, and a copy that uses a wide instruction set crashes elsewhere. With OBJDUMP,
# the registers must be those of the level, which also tells that loops are still vectors.

function(run_tool result)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

run_tool(symbols ${NM} --demangle ${OBJECT})
if(NOT symbols MATCHES "subquad::${LEVEL}::kernels_")
  message(FATAL_ERROR "${OBJECT} defines no table of kernels")
endif()
string(REGEX MATCHALL "[^\n]* [Wu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX " [Wu] [^(<]*subquad::${LEVEL}::")
if(weak)
  list(JOIN weak "\n" weak)
  message(FATAL_ERROR "weak functions outside of subquad::${LEVEL} in ${OBJECT}:\n${weak}")
endif()

if(OBJDUMP AND NOT LEVEL STREQUAL "neon")
  run_tool(code ${OBJDUMP} --disassemble --no-show-raw-insn ${OBJECT})
  foreach(register IN ITEMS ymm zmm)
    string(FIND "${code}" "%${register}" position)
    if(position EQUAL -1)
      set(has_${register} FALSE)
    else()
      set(has_${register} TRUE)
    endif()
  endforeach()
  if(LEVEL STREQUAL "v2" AND (has_ymm OR has_zmm))
    message(FATAL_ERROR "${OBJECT} uses registers wider than its level's")
  elseif(LEVEL STREQUAL "v3" AND (has_zmm OR NOT has_ymm))
    message(FATAL_ERROR "${OBJECT} does not use exactly the registers of its level: ymm")
  elseif(LEVEL STREQUAL "v4" AND NOT has_zmm)
    message(FATAL_ERROR "${OBJECT} does not use the registers of its level: zmm")
  endif()
endif()
