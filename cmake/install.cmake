if(NOT EXPERTWIRE_INSTALL)
  return()
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS expertwire expertwire_ep expertwire_comm expertwire_base EXPORT expertwire-targets)
install(DIRECTORY include/expertwire TYPE INCLUDE)
if(TARGET expertwire_cli)
  install(TARGETS expertwire_cli)
endif()
install(
  EXPORT expertwire-targets
  NAMESPACE expertwire::
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/expertwire)
configure_package_config_file(
  cmake/expertwire-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/expertwire-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/expertwire)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/expertwire-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/expertwire-config.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/expertwire-config-version.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/expertwire)
