# A project that adds expertwire with add_subdirectory gets the library alone.
option(EXPERTWIRE_BUILD_TESTS "Build the tests" ${PROJECT_IS_TOP_LEVEL})
option(EXPERTWIRE_BUILD_TOOLS "Build the expertwire command" ${PROJECT_IS_TOP_LEVEL})
option(EXPERTWIRE_BUILD_EXAMPLES "Build the examples" ${PROJECT_IS_TOP_LEVEL})
option(EXPERTWIRE_BUILD_PYTHON "Build the bindings of the Python package; needs nanobind" OFF)
option(EXPERTWIRE_INSTALL "Make install rules" ${PROJECT_IS_TOP_LEVEL})
option(EXPERTWIRE_PORTABLE "Link third-party code statically, to run on other distributions" OFF)
option(EXPERTWIRE_REQUIRE_CUDA "Fail when there is no nvcc" OFF)
option(EXPERTWIRE_CLANG_TIDY "Run clang-tidy beside the compiler" OFF)
set(EXPERTWIRE_SANITIZE "" CACHE STRING "Sanitizers, as -fsanitize takes them")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES AND PROJECT_IS_TOP_LEVEL)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

if(PROJECT_IS_TOP_LEVEL)
  find_program(CCACHE_PROGRAM ccache)
  if(CCACHE_PROGRAM)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
endif()

# What every target of this project is compiled with; not passed on to users.
add_library(expertwire_build_flags INTERFACE)
target_compile_features(expertwire_build_flags INTERFACE cxx_std_20)
# No contraction: results must be the same bits on every machine, so an fma is written as one.
target_compile_options(
  expertwire_build_flags
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wconversion;-ffp-contract=off>
            $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;-fmad=false;-lineinfo;-Xcompiler=-Wall,-Wextra>)
if(EXPERTWIRE_SANITIZE)
  # What is found ends the program, so that a test which meets it fails.
  target_compile_options(
    expertwire_build_flags INTERFACE -fsanitize=${EXPERTWIRE_SANITIZE} -fno-sanitize-recover=all
                                     -fno-omit-frame-pointer -g)
  target_link_options(expertwire_build_flags INTERFACE -fsanitize=${EXPERTWIRE_SANITIZE})
endif()
if(EXPERTWIRE_PORTABLE)
  target_compile_options(expertwire_build_flags
                         INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-ffunction-sections;-fdata-sections>)
  target_link_options(expertwire_build_flags INTERFACE -static-libstdc++ -static-libgcc
                      -Wl,--gc-sections)
endif()
if(EXPERTWIRE_CLANG_TIDY)
  find_program(CLANG_TIDY_PROGRAM clang-tidy REQUIRED)
  set(CMAKE_CXX_CLANG_TIDY ${CLANG_TIDY_PROGRAM} --quiet)
endif()
