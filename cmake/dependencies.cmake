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

# Without nvcc the build has the CPU backend alone.
find_program(EXPERTWIRE_NVCC nvcc HINTS /usr/local/cuda/bin)
if(NOT EXPERTWIRE_NVCC)
  message(STATUS "expertwire: no nvcc found; building the CPU backend only")
endif()
