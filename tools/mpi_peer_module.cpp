#include "mpi_peer_module.hpp"

#include <mpi.h>

namespace {

int start(int* rank, int* size) {
  int started = 0;
  MPI_Initialized(&started);
  if (started == 0 && MPI_Init(nullptr, nullptr) != MPI_SUCCESS) return 1;
  return MPI_Comm_rank(MPI_COMM_WORLD, rank) + MPI_Comm_size(MPI_COMM_WORLD, size);
}

int alltoall_int(const int* send, int* receive) {
  return MPI_Alltoall(send, 1, MPI_INT, receive, 1, MPI_INT, MPI_COMM_WORLD);
}

int alltoallv(const void* send, const int* send_counts, const int* send_displacements,
              void* receive, const int* receive_counts, const int* receive_displacements) {
  return MPI_Alltoallv(send, send_counts, send_displacements, MPI_BYTE, receive, receive_counts,
                       receive_displacements, MPI_BYTE, MPI_COMM_WORLD);
}

int barrier() { return MPI_Barrier(MPI_COMM_WORLD); }
int finish() { return MPI_Finalize(); }

constexpr ExpertwireMpiPeer kPeer = {&start, &alltoall_int, &alltoallv, &barrier, &finish};

}  // namespace

const ExpertwireMpiPeer* expertwire_mpi_peer() { return &kPeer; }
