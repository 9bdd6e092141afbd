"""What buffers of all generations have: a group of ranks, streams, a high-throughput object."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Optional, Tuple, Union

import torch

from .. import Communicator, HighThroughput
from ._events import EventHandle, EventOverlap, handle_of, on_cuda

MOST_TOP_K = 32
_MOST_EXPERTS = 4096
#: Bytes of the largest row that dispatch takes: 16,384 elements of bf16.
_ROW_BYTES = int(os.environ.get("EXPERTWIRE_DEEP_EP_ROW_BYTES", 32768))

Rows = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]


def plain_scales(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype != torch.float32:
        raise NotImplementedError(
            f"scales of {scales.dtype}: expertwire takes float32, one for every 128 channels")
    return scales.contiguous()


class GroupPart:
    """The ranks of a buffer, and where its operations run."""

    communicator: Communicator

    def _join(self, group: Any, comm: Any) -> None:
        assert group is not None or comm is not None, "give a process group, or comm"
        settings = {"cuda_device": torch.cuda.current_device()} if on_cuda() else {}
        if group is not None:
            self.communicator = Communicator.from_process_group(group, **settings)
        else:
            self.communicator = Communicator.from_mpi(comm, **settings)
        self.group = group
        self.rank, self.group_size = self.communicator.rank, self.communicator.size
        self._comm_stream = torch.cuda.Stream() if on_cuda() else None

    def _make_high_throughput(self, max_tokens: int = 0) -> HighThroughput:
        """For the largest rows and the most experts that there are, as no call tells before."""
        return HighThroughput(
            self.communicator, hidden=_ROW_BYTES // 2, dtype="bfloat16", max_tokens=max_tokens,
            experts=_MOST_EXPERTS // self.group_size * self.group_size, top_k=MOST_TOP_K)

    def get_comm_stream(self) -> "torch.cuda.Stream":
        assert self._comm_stream is not None, "there is no CUDA device"
        return self._comm_stream

    @contextlib.contextmanager
    def _working(self, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool,
                 inputs: Tuple[Any, ...]):
        """Where an operation runs: on the comm stream, behind `previous_event` or else the current
        stream, if it is asynchronous; else on the current stream. On the host it has happened when the
        call returns. Gives a function that makes the event of what has been made."""
        previous = handle_of(previous_event)
        if not on_cuda() or not async_finish:
            if previous is not None:
                previous.current_stream_wait()
            stream = torch.cuda.current_stream() if on_cuda() else None
            yield stream, lambda *made: EventOverlap(EventHandle() if async_finish else None)
            return
        assert not allocate_on_comm_stream or previous is not None, \
            "allocate_on_comm_stream needs a previous_event"
        current, comm = torch.cuda.current_stream(), self._comm_stream
        if previous is None:
            comm.wait_stream(current)
        with torch.cuda.stream(comm):
            if previous is not None:
                previous.current_stream_wait()

            def finish(*made: Any) -> EventOverlap:
                for tensor in inputs:
                    if isinstance(tensor, torch.Tensor):
                        tensor.record_stream(comm)
                for tensor in made:
                    if isinstance(tensor, torch.Tensor):
                        tensor.record_stream(current)
                return EventOverlap(EventHandle())

            yield comm, finish
