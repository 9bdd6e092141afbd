#pragma once

/// Marks a function that both the CPU backend and kernels call.
#if defined(__CUDACC__)
#define EXPERTWIRE_HOST_DEVICE __host__ __device__
#else
#define EXPERTWIRE_HOST_DEVICE
#endif
