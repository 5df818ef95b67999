# `cmake --install`: the library, its headers and what find_package(subquad) reads.

include(CMakePackageConfigHelpers)

set(subquad_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/subquad)

install(TARGETS subquad EXPORT subquad_targets)
if(TARGET subquad_cuda)
  # Beside the library that loads it.
  install(TARGETS subquad_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/cpp/include/subquad
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
)
install(EXPORT subquad_targets NAMESPACE subquad:: FILE subquadTargets.cmake
        DESTINATION ${subquad_package_dir}
)
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/subquadConfig.cmake.in ${PROJECT_BINARY_DIR}/subquadConfig.cmake
  INSTALL_DESTINATION ${subquad_package_dir} NO_SET_AND_CHECK_MACRO
)
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/subquadConfigVersion.cmake COMPATIBILITY SameMinorVersion
)
install(FILES ${PROJECT_BINARY_DIR}/subquadConfig.cmake
              ${PROJECT_BINARY_DIR}/subquadConfigVersion.cmake DESTINATION ${subquad_package_dir}
)
