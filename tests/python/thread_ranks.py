"""Buffers of `deep_ep`, a rank a thread."""

import threading

import expertwire as ew
from expertwire.deep_ep import Buffer


class ThreadComm:
    """What is asked of an mpi4py communicator, between threads."""

    def __init__(self, rank, parts, barrier):
        self.rank, self.parts, self.barrier = rank, parts, barrier

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.parts)

    def allgather(self, mine):
        self.parts[self.rank] = mine
        self.barrier.wait()
        everybody = list(self.parts)
        self.barrier.wait()
        return everybody


def on_ranks(ranks, body, kind=Buffer, **settings):
    """body(buffer, rank) on a thread a rank."""
    parts, barrier, errors = [None] * ranks, threading.Barrier(ranks, timeout=60), []

    def run(rank):
        try:
            buffer = kind(None, comm=ThreadComm(rank, parts, barrier), explicitly_destroy=True,
                            **settings)
            body(buffer, rank)
            buffer.destroy()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = [e for e in errors if not isinstance(e, (threading.BrokenBarrierError, ew.PeerLost))]
    for error in broken + errors:
        raise error
