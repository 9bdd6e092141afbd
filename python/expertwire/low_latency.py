"""Dispatch and combine for small batches: decoding."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Tuple

from . import _native
from ._closing import Closing
from ._types import Array, LowLatencyDispatch, Status
from .communicator import Communicator

Allocator = Callable[[str, str, tuple], Array]


class LowLatency(Closing):
    """Every byte goes straight to its place; sizes are fixed, nothing is exchanged with the host.

    Made collectively, for the most that calls bring: `hidden` elements of `dtype`, `experts` over all
    ranks, `top_k`, and `max_tokens` a rank. Operations use the `lanes` in turn; all ranks make the same
    calls in the same order, one thread at a time. Arrays are of torch, NumPy or CuPy and are never
    copied. A CUDA stream may be capturing: give `out` then, or an `allocator` of the graph's memory.
    """

    def __init__(self, communicator: Communicator, *, hidden: int, experts: int, top_k: int,
                 max_tokens: int, dtype: Any = "bfloat16", lanes: int = 1, threads: int = 0,
                 sms: int = 0) -> None:
        self._native = _native.LowLatency.create(
            communicator._native, hidden=hidden, experts=experts, top_k=top_k, max_tokens=max_tokens,
            dtype=dtype, lanes=lanes, threads=threads, sms=sms)
        self._open: List[Tuple[Any, Any]] = []  # send halves: handle, and arrays that are in use

    @staticmethod
    def memory_bytes(ranks: int, *, hidden: int, experts: int, top_k: int, max_tokens: int,
                     dtype: Any = "bfloat16", lanes: int = 1) -> int:
        """Bytes that an object takes of every rank's arena."""
        return _native.LowLatency.memory_bytes(
            ranks, hidden=hidden, experts=experts, top_k=top_k, max_tokens=max_tokens, dtype=dtype,
            lanes=lanes)

    def dispatch(self, x: Array, topk_idx: Array, topk_weights: Optional[Array] = None, *,
                 x_scales: Optional[Array] = None, experts: int = 0, max_tokens: int = 0,
                 cast_to_fp8: bool = False, out: Optional[Dict[str, Array]] = None,
                 allocator: Optional[Allocator] = None, stream: Any = None,
                 timeout: Optional[float] = None, sms: int = 0,
                 send_only: bool = False) -> LowLatencyDispatch:
        """Sends `x` [T, H] to the experts that `topk_idx` [T, K] (int32 or int64, -1: none) names.

        `topk_weights` [T, K] fp32 go along for combine. `x` is bf16, fp16, fp32, or fp8 with `x_scales`
        fp32 [T, ceil(H/128)]; `cast_to_fp8` casts rows on their way. `experts` and `max_tokens` of this
        call, 0: those of the object. `out` has outputs by name, all or none; others come from
        `allocator(name, dtype, shape)`, or are made by the library of `x`. `stream`: a CUDA stream, or
        a `Queue`; None: finished on return. `send_only` leaves the receive half to `receive()`.

        Raises `InvalidArgument` and `InvalidUsage` before anything is sent; `Mismatch`, `Timeout` and
        `PeerLost` end the object.
        """
        sent = self._native.dispatch(
            x=x, topk_idx=topk_idx, topk_weights=topk_weights, x_scales=x_scales, experts=experts,
            max_tokens=max_tokens, cast_to_fp8=cast_to_fp8, out=out, allocator=allocator,
            stream=stream, timeout=timeout, sms=sms, send_only=send_only)
        if send_only:
            self._open.append((sent.handle, (x, topk_idx, topk_weights, x_scales, sent)))
        return sent

    def combine(self, y: Array, handle: Any, *, topk_weights: Optional[Array] = None,
                bias: Optional[Array] = None, out: Optional[Array] = None,
                allocator: Optional[Allocator] = None, stream: Any = None,
                timeout: Optional[float] = None, sms: int = 0, send_only: bool = False) -> Array:
        """Brings the rows `y` [L, R*M, H] home and sums them: [T, H], `bias` plus, over ascending ranks,
        each rank's weighted sum. `topk_weights` [T, K] fp32 if dispatch had none."""
        home = self._native.combine(
            y=y, handle=handle, topk_weights=topk_weights, bias=bias, out=out, allocator=allocator,
            stream=stream, timeout=timeout, sms=sms, send_only=send_only)
        if send_only:
            self._open.append((handle, (y, topk_weights, bias, home)))
        return home

    def receive(self, handle: Any, stream: Any = None) -> None:
        """The receive half of the dispatch that made `handle`, or of its oldest combine that has sent
        only."""
        self._native.receive(handle, stream)
        for i, (opened, arrays) in enumerate(self._open):
            if opened is handle:
                del self._open[i]
                if isinstance(stream, _native.Queue):
                    stream._keep(arrays)
                break

    def status(self) -> Status:
        """What has been noticed so far. Waits for no operation."""
        return self._native.status()
