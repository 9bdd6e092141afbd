# Everything comes from the distribution's packages (tools/install_dependencies.sh); nothing is
# fetched here.
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
if(EXPERTWIRE_PORTABLE)
  set(OPENSSL_USE_STATIC_LIBS ON)
endif()
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
find_package(fmt REQUIRED)
find_package(spdlog REQUIRED)
# Debian has no static forms of these two; their header-only forms take their place.
if(EXPERTWIRE_PORTABLE)
  set(EXPERTWIRE_FMT $<BUILD_INTERFACE:fmt::fmt-header-only>)
  set(EXPERTWIRE_SPDLOG $<BUILD_INTERFACE:spdlog::spdlog_header_only>)
else()
  set(EXPERTWIRE_FMT fmt::fmt)
  set(EXPERTWIRE_SPDLOG spdlog::spdlog)
endif()

# hwloc tells the NUMA node. The portable build leaves it out: its static form needs libudev.
find_library(HWLOC_LIBRARY hwloc)
find_path(HWLOC_INCLUDE_DIR hwloc.h)
if(HWLOC_LIBRARY AND HWLOC_INCLUDE_DIR AND NOT EXPERTWIRE_PORTABLE)
  set(EXPERTWIRE_HAVE_HWLOC ON)
else()
  set(EXPERTWIRE_HAVE_HWLOC OFF)
  message(STATUS "expertwire: without hwloc; NUMA nodes will read as unknown")
endif()

# UCX carries what goes between hosts. Its library is loaded at run time; the build needs headers.
find_path(EXPERTWIRE_UCX_INCLUDE_DIR ucp/api/ucp.h)
if(NOT EXPERTWIRE_UCX_INCLUDE_DIR)
  message(STATUS "expertwire: without UCX's headers (libucx-dev); ranks of several hosts are refused")
endif()

# Without nvcc the build has the CPU backend alone. Kernels are compiled for Ampere (vector stores),
# Hopper (bulk copies) and Blackwell; sanitizers are for host code, so their builds leave kernels out.
find_program(EXPERTWIRE_NVCC nvcc HINTS /usr/local/cuda/bin)
if(EXPERTWIRE_NVCC AND NOT EXPERTWIRE_SANITIZE)
  set(EXPERTWIRE_CUDA ON)
  set(CMAKE_CUDA_COMPILER ${EXPERTWIRE_NVCC})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100 CACHE STRING "GPU architectures")
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(CCACHE_PROGRAM)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
elseif(EXPERTWIRE_REQUIRE_CUDA)
  message(FATAL_ERROR "expertwire: the cuda preset needs nvcc, and none was found")
else()
  set(EXPERTWIRE_CUDA OFF)
  message(STATUS "expertwire: no nvcc; building the CPU backend only")
endif()
