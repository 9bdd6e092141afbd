"""Dispatch and combine for large batches: training, prefill."""

from __future__ import annotations

from typing import Any, Dict, Optional

from . import _arrays, _native
from ._closing import Closing
from ._types import Array, HighThroughputCombine, HighThroughputDispatch, Status
from .communicator import Communicator
from .low_latency import Allocator

EVERY_ROW = -1  #: pool_rows of a pool that always suffices


class HighThroughput(Closing):
    """Rows come token-major, one per (token, this rank), by source rank, then source token; or
    expert-major, one per selection, grouped by local expert.

    Made collectively, for the most that calls bring; see LowLatency. Rows pass through rings of a few
    megabytes, so `max_tokens` may be left out: a rank may then dispatch 2^24 tokens. `pool_rows` are
    those of a receive pool, in which `dispatch(pool=True)` leaves rows: 0 makes none, EVERY_ROW
    R * max_tokens, which always suffice. `ring_frames`, a power of two, are the rows that a ring holds;
    0: as many as fit into 16 MiB over the rings to other ranks, but two at least.
    """

    def __init__(self, communicator: Communicator, *, hidden: int, experts: int, top_k: int,
                 max_tokens: int = 0, dtype: Any = "bfloat16", lanes: int = 1, pool_rows: int = 0,
                 ring_frames: int = 0, threads: int = 0, sms: int = 0) -> None:
        self._device = communicator.cuda_device
        self._native = _native.HighThroughput.create(
            communicator._native, hidden=hidden, experts=experts, top_k=top_k, max_tokens=max_tokens,
            dtype=dtype, lanes=lanes, pool_rows=pool_rows, ring_frames=ring_frames, threads=threads,
            sms=sms)

    @staticmethod
    def memory_bytes(ranks: int, *, hidden: int, experts: int, top_k: int, max_tokens: int = 0,
                     dtype: Any = "bfloat16", lanes: int = 1, pool_rows: int = 0,
                     ring_frames: int = 0) -> int:
        """Bytes that an object takes of every rank's arena."""
        return _native.HighThroughput.memory_bytes(
            ranks, hidden=hidden, experts=experts, top_k=top_k, max_tokens=max_tokens, dtype=dtype,
            lanes=lanes, pool_rows=pool_rows, ring_frames=ring_frames)

    def dispatch(self, x: Array, topk_idx: Optional[Array] = None,
                 topk_weights: Optional[Array] = None, *, x_scales: Optional[Array] = None,
                 experts: int = 0, cached: Any = None, pool: bool = False,
                 layout: str = "token_major", expert_alignment: int = 1,
                 capacity: Optional[int] = None, out: Optional[Dict[str, Array]] = None,
                 allocator: Optional[Allocator] = None, stream: Any = None,
                 timeout: Optional[float] = None, sms: int = 0) -> HighThroughputDispatch:
        """Sends `x` [T, H] to the ranks whose experts `topk_idx` [T, K] names.

        `cached`, a handle, takes its routing again in place of `topk_idx` (the backward of combine).
        `layout` is "token_major" or "expert_major", whose groups are padded with zeros to multiples of
        `expert_alignment` rows; a cached dispatch has that of its handle.
        `pool` leaves rows in the receive pool until combine or `release()`. With `capacity` outputs
        have that many rows, counts stay on the device and nothing waits for them; rows past it are
        not written. Other arguments and errors are as for `LowLatency.dispatch`; `CapacityError` on
        every rank if some rank's pool is too small.
        """
        sent = self._native.dispatch(
            x=x, topk_idx=topk_idx, topk_weights=topk_weights, x_scales=x_scales, experts=experts,
            cached=cached, pool=pool, layout=layout, expert_alignment=expert_alignment,
            capacity=capacity, out=out, allocator=allocator, stream=stream,
            timeout=timeout, sms=sms, device=self._device)
        if pool:
            for name in ("x", "source_tokens", "topk_experts", "topk_weights", "scales"):
                setattr(sent, name, _arrays.take(getattr(sent, name), x, str(x.dtype)))
        for name in ("needed_rows", "source_offsets", "expert_offsets", "group_offsets"):
            if getattr(sent, name) is not None:
                setattr(sent, name, _arrays.take(getattr(sent, name), x, "int32"))
        return sent

    def combine(self, y: Array, handle: Any, *, row_weights: Optional[Array] = None,
                topk_weights: Optional[Array] = None, bias: Optional[Array] = None, out: Optional[Array] = None,
                out_topk_weights: Optional[Array] = None, allocator: Optional[Allocator] = None,
                stream: Any = None, timeout: Optional[float] = None,
                sms: int = 0) -> HighThroughputCombine:
        """Brings rows `y` [N, H] home and sums them in ascending order of rank, onto `bias` if there is
        one; `topk_weights` [N, K] fp32 come home with them. Token-major there is one per (token, this
        rank). Expert-major they are one per selection: times `row_weights` [N] fp32, if given, those of
        a token are added before one goes home, and `topk_weights` are [N]."""
        return self._native.combine(
            y=y, handle=handle, row_weights=row_weights, topk_weights=topk_weights, bias=bias, out=out,
            out_topk_weights=out_topk_weights, allocator=allocator, stream=stream, timeout=timeout,
            sms=sms)

    def release(self, handle: Any, stream: Any = None) -> None:
        """Gives the pool rows of a dispatch back without a combine."""
        self._native.release(handle, stream)

    def status(self) -> Status:
        """What has been noticed so far. Waits for no operation."""
        return self._native.status()
