#pragma once

#include <cstddef>

/// What libexpertwire_mpi_peer.so offers: the few MPI calls that the comparison needs, so that the
/// command itself links no MPI. Displacements and counts are in bytes. All return 0 on success.
struct ExpertwireMpiPeer {
  int (*start)(int* rank, int* size);
  int (*alltoall_int)(const int* send, int* receive);
  int (*alltoallv)(const void* send, const int* send_counts, const int* send_displacements,
                   void* receive, const int* receive_counts, const int* receive_displacements);
  int (*barrier)();
  int (*finish)();
};

extern "C" const ExpertwireMpiPeer* expertwire_mpi_peer();
