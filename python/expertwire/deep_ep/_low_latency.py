"""The low-latency half of `Buffer`."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

import torch

from .. import LowLatency
from ._events import EventOverlap, on_cuda


class _Sizes:
    """The most that calls have brought: H, M, E and K."""

    def __init__(self, hidden: int = 0, tokens: int = 0, experts: int = 0, top_k: int = 0) -> None:
        self.all = (hidden, tokens, experts, top_k)

    def covers(self, other: "_Sizes") -> bool:
        return all(mine >= theirs for mine, theirs in zip(self.all, other.all))

    def grown(self, other: "_Sizes") -> "_Sizes":
        return _Sizes(*(max(pair) for pair in zip(self.all, other.all)))


class LowLatencyPart:
    """Expert-major [L, R*M, H] on both ways. Handles keep the object they were made by, so a larger one
    may follow while they are in use."""

    _LANES = 2  # two batches in flight, as callers do with hooks

    def __init__(self) -> None:
        self._low_latency: Optional[LowLatency] = None
        self._made_for = _Sizes()
        self._in_place: Dict[Tuple[int, int, int], torch.Tensor] = {}

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int,
                                       num_ranks: int, num_experts: int) -> int:
        """Bytes that low latency takes for so many tokens of a rank, with up to 16 experts a token."""
        return LowLatency.memory_bytes(
            num_ranks, hidden=hidden, experts=num_experts, top_k=min(16, num_experts),
            max_tokens=num_max_dispatch_tokens_per_rank, lanes=LowLatencyPart._LANES)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int,
                                 num_experts: int) -> None:
        """Nothing has to be cleaned: the modes share no memory."""

    def low_latency_dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor,
                             num_max_dispatch_tokens_per_rank: int, num_experts: int,
                             cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                             dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
                             use_fp8: bool = True, round_scale: bool = False,
                             use_ue8m0: bool = False, async_finish: bool = False,
                             return_recv_hook: bool = False):
        """As DeepEP's; rows of a source are in the order of its tokens. With `return_recv_hook` what
        arrives is there when the hook has been called. Returns (rows, counts [L], handle, event, hook)."""
        self._refuse(dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats is not None,
                     round_scale=round_scale, use_ue8m0=use_ue8m0)
        assert not (async_finish and return_recv_hook), "give async_finish or return_recv_hook"
        most = num_max_dispatch_tokens_per_rank
        layer = self._layer(_Sizes(x.shape[1], most, num_experts, topk_idx.shape[1]))
        with self._working(None, async_finish, False, (x, topk_idx)) as (stream, finish):
            sent = layer.dispatch(x, topk_idx.contiguous(), experts=num_experts, max_tokens=most,
                                  cast_to_fp8=use_fp8, stream=stream, send_only=return_recv_hook)
            local = num_experts // self.group_size
            scales = None
            if use_fp8:  # as the grouped GEMMs of this field read them: the token runs fastest
                scales = torch.empty(local, sent.scales.shape[2], sent.scales.shape[1],
                                     device=x.device).transpose(1, 2)

            def arrived() -> None:
                if scales is not None:
                    scales.copy_(sent.scales)
                if cumulative_local_expert_recv_stats is not None:
                    cumulative_local_expert_recv_stats.add_(sent.tokens_per_expert)

            layout = sent.ranges.view(torch.int64).squeeze(-1)
            handle = _Handle((sent.source_tokens, layout, most, x.shape[1], num_experts))
            handle.native, handle.layer = sent.handle, layer
            hook = None
            if return_recv_hook:
                hook = self._hook(layer, sent.handle, arrived)
            else:
                arrived()
            rows = sent.x if scales is None else (sent.x, scales)
            return (rows, sent.tokens_per_expert, handle,
                    finish(sent.x, scales, sent.tokens_per_expert, sent.source_tokens, layout), hook)

    def low_latency_combine(self, x: torch.Tensor, topk_idx: torch.Tensor,
                            topk_weights: torch.Tensor, handle: "_Handle",
                            use_logfmt: bool = False, zero_copy: bool = False,
                            async_finish: bool = False, return_recv_hook: bool = False,
                            out: Optional[torch.Tensor] = None,
                            combine_wait_recv_cost_stats: Optional[torch.Tensor] = None):
        """As DeepEP's; each rank rounds what it sums of a token once, before it travels. Returns
        (rows [T, H], event, hook)."""
        self._refuse(use_logfmt=use_logfmt,
                     combine_wait_recv_cost_stats=combine_wait_recv_cost_stats is not None)
        assert not (async_finish and return_recv_hook), "give async_finish or return_recv_hook"
        y = self.get_next_low_latency_combine_buffer(handle) if zero_copy else x
        with self._working(None, async_finish, False, (y, topk_weights)) as (stream, finish):
            home = handle.layer.combine(y, handle.native, topk_weights=topk_weights, out=out,
                                        stream=stream, send_only=return_recv_hook)
            hook = None
            if return_recv_hook:
                hook = self._hook(handle.layer, handle.native, lambda: None)
            return home, finish(home), hook

    def get_next_low_latency_combine_buffer(self, handle: "_Handle") -> torch.Tensor:
        """[L, R*M, H] bf16, the same memory for every handle of these sizes: what is written there is
        combined with `zero_copy`."""
        source_tokens, _, most, hidden, experts = handle
        key = (most, hidden, experts)
        if key not in self._in_place:
            self._in_place[key] = torch.empty(*source_tokens.shape, hidden, dtype=torch.bfloat16,
                                              device=source_tokens.device)
        return self._in_place[key]

    # Masks: no rank is ever masked here yet -------------------------------------------------------

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Who is masked: nobody."""
        mask_status.zero_()

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmasks all."""

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        self._refuse(mask=mask)

    # Inside ---------------------------------------------------------------------------------------

    @staticmethod
    def _refuse(**asked: bool) -> None:
        for name, given in asked.items():
            if given:
                raise NotImplementedError(f"{name} is not supported by expertwire's deep_ep")

    def _layer(self, sizes: _Sizes) -> LowLatency:
        if self._low_latency is None or not self._made_for.covers(sizes):
            if on_cuda() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the first low-latency call of a larger shape makes memory, which a capture does "
                    "not allow: make one such call before the capture, on all ranks")
            self._made_for = self._made_for.grown(sizes)
            hidden, tokens, experts, top_k = self._made_for.all
            self._low_latency = LowLatency(self.communicator, hidden=hidden, experts=experts,
                                           top_k=top_k, max_tokens=tokens, lanes=self._LANES)
        return self._low_latency

    @staticmethod
    def _hook(layer: LowLatency, native: Any, arrived: Callable[[], None]) -> Callable[[], None]:
        def receive() -> None:
            layer.receive(native, torch.cuda.current_stream() if on_cuda() else None)
            arrived()

        return receive

    def _close_low_latency(self) -> None:
        if self._low_latency is not None:
            self._low_latency.close()
            self._low_latency = None


class _Handle(tuple):
    """The elements that callers index, expertwire's handle, and the object that it is of."""

    native: Any
    layer: LowLatency
