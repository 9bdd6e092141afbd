#pragma once

#include "bench.hpp"

namespace expertwire::tools {

/// The same exchange by hand over MPI, for comparison: pack rows by destination rank, MPI_Alltoall
/// of the counts, MPI_Alltoallv of the rows, unpack; and back. Pack and unpack use the same threads
/// and vector copies as expertwire. Token-major; combine sums in unpack.
///
/// MPI is loaded at run time. Throws std::runtime_error with what to do if it cannot be.
Timings bench_mpi(const Communicator& communicator, const Steps& steps, const BenchOptions& options,
                  int threads);

}  // namespace expertwire::tools
