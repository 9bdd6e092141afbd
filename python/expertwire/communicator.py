"""The ranks of a job and how they reach each other."""

from __future__ import annotations

import threading
from typing import Any, Callable, List, Optional, Tuple

from . import _native
from ._closing import Closing


class Communicator(Closing):
    """The ranks of a job, how they reach each other, and the memory they share.

    Made collectively, by one of the class methods. Closing it is local and never waits; a peer that
    still needs this rank then gets `PeerLost`. Objects made from it keep it alive. Usable as a
    context manager.

    All of them take, by keyword: `cuda_device`, the device whose memory this rank's arrays lie in
    (None: host memory, the CPU backend); `arena_bytes`; `ranks_per_node`; `staged_pairs`; `timeout`, the
    deadline of every wait that names none, in seconds. Another name is a TypeError. What is None comes from the environment
    (docs/environment.md).
    """

    def __init__(self, native: _native.Communicator) -> None:
        self._native = native

    @classmethod
    def from_environment(cls, **settings: Any) -> "Communicator":
        """Joins the job that the environment describes: `expertwire launch`, torchrun, mpirun or srun.
        A process that nobody launched is a job of one rank."""
        return cls(_native.Communicator.from_environment(**settings))

    @classmethod
    def from_process_group(cls, group: Any = None, **settings: Any) -> "Communicator":
        """Over a torch process group of any backend (None: the default group). It carries addresses
        when things are made, and no rows."""
        import torch.distributed as dist

        size = dist.get_world_size(group)

        def all_gather(mine: bytes) -> List[bytes]:
            parts: List[Optional[bytes]] = [None] * size
            dist.all_gather_object(parts, mine, group=group)
            return parts  # type: ignore[return-value]

        return cls.from_all_gather(dist.get_rank(group), size, all_gather, **settings)

    @classmethod
    def from_mpi(cls, comm: Any, **settings: Any) -> "Communicator":
        """Over an mpi4py communicator."""
        return cls.from_all_gather(comm.Get_rank(), comm.Get_size(), comm.allgather, **settings)

    @classmethod
    def from_all_gather(cls, rank: int, size: int, all_gather: Callable[[bytes], List[bytes]],
                        **settings: Any) -> "Communicator":
        """Over anything that gives every rank's bytes, in order of rank."""
        return cls(_native.Communicator.from_all_gather(rank, size, all_gather, **settings))

    @property
    def rank(self) -> int:
        return self._native.rank

    @property
    def size(self) -> int:
        return self._native.size

    @property
    def nodes(self) -> int:
        return self._native.nodes

    def node_of(self, rank: int) -> int:
        return self._native.node_of(rank)

    @property
    def cuda_device(self) -> int:
        """The CUDA device of this rank, or -1 on the CPU backend."""
        return self._native.cuda_device

    @property
    def timeout(self) -> float:
        """Seconds."""
        return self._native.timeout

    @property
    def banner(self) -> str:
        """One line: version, backend, ranks, wires and why each was chosen."""
        return self._native.banner

    def path(self, peer: int) -> Tuple[str, str, str]:
        """How operations reach `peer`: kind (`mapped` or `staged`), transport, and why."""
        return self._native.path(peer)

    @property
    def staged_pair(self) -> Optional[Tuple[int, int]]:
        """Two ranks that reach each other through host memory, if there are any; the same on all ranks.
        High throughput then has no pool."""
        return self._native.staged_pair

    def barrier(self) -> None:
        """Collective; for setup and tests."""
        self._native.barrier()

    def all_gather(self, mine: bytes) -> List[bytes]:
        """Collective: everybody's bytes, equally many, in order of rank. For setup and tests."""
        return self._native.all_gather(mine)


def run_in_process(size: int, body: Callable[[Communicator], Any], **settings: Any) -> List[Any]:
    """Runs `body(communicator)` on `size` threads, one a rank, and returns what each returned: a job
    in one process, for tests and first steps. If some raise, the error of the lowest rank that did
    not merely lose a peer is raised."""
    from ._errors import PeerLost

    bootstraps = _native.in_process(size)
    results: List[Any] = [None] * size
    errors: List[Optional[BaseException]] = [None] * size

    def run(rank: int) -> None:
        try:
            native = _native.Communicator.from_bootstrap(bootstraps[rank], **settings)
            with Communicator(native) as communicator:
                results[rank] = body(communicator)
        except BaseException as error:  # raised again below
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    for error in [e for e in raised if not isinstance(e, PeerLost)] + raised:
        raise error
    return results
