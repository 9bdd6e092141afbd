"""`Buffer`, the first generation of DeepEP's API, on expertwire's two modes."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ._config import Config
from ._events import EventHandle, EventOverlap, on_cuda
from ._group import MOST_TOP_K, GroupPart, Rows, plain_scales
from ._low_latency import LowLatencyPart

topk_idx_t = torch.int64


class DispatchHandle(tuple):
    """The elements that callers index, and expertwire's handle. Channels are an affair of DeepEP's
    kernels: what counts them is None."""

    native: Any
    rows: int


class Buffer(LowLatencyPart, GroupPart):
    """Dispatch and combine of one group of ranks, made collectively.

    `group` is a torch process group of any backend, or `comm` an mpi4py communicator. Sizes are hints:
    what is needed is made here, and for low latency at the first call of a larger shape, which all
    ranks make alike. Tensors are on the current CUDA device, or, without one, on the host. All ranks
    make the same calls in the same order. Not destroyed, it waits for nobody when it is dropped.
    """

    num_sms: int = 20

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
                 low_latency_mode: bool = False, num_qps_per_rank: int = 24,
                 allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
                 use_fabric: bool = False, explicitly_destroy: bool = False,
                 enable_shrink: bool = False, comm: Any = None) -> None:
        self._join(group, comm)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        self._high_throughput = self._make_high_throughput()
        super().__init__()

    def destroy(self) -> None:
        """Local: waits for what was called, and for no other rank."""
        self._close_low_latency()
        self._high_throughput.close()
        self.communicator.close()

    @property
    def runtime(self) -> "Buffer":
        """What DeepEP's C++ object answers, this does; a reference to itself would be a cycle."""
        return self

    # What callers ask of the class ----------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs of an operation that is given no Config."""
        assert new_num_sms % 2 == 0, "num_sms must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    def get_local_buffer_tensor(self, dtype: torch.dtype, size: Any = None, offset: int = 0,
                                use_rdma_buffer: bool = False) -> torch.Tensor:
        raise NotImplementedError("get_local_buffer_tensor: expertwire's memory has no layout that "
                                  "callers could know")

    @staticmethod
    def _sms(config: Optional[Config]) -> int:
        return (config.num_sms if config is not None else Buffer.num_sms) if on_cuda() else 0

    # Layout ---------------------------------------------------------------------------------------

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int,
                            previous_event: Any = None, async_finish: bool = False,
                            allocate_on_comm_stream: bool = False):
        """Tokens per rank [R], None (ranks are on one host), tokens per expert [E], int32; which token
        goes to which rank, bool [T, R]; and an event. By torch, and on its device: what
        `expertwire.dispatch_layout` counts is on the host."""
        with self._working(previous_event, async_finish, allocate_on_comm_stream,
                           (topk_idx,)) as (_, finish):
            local = num_experts // self.group_size
            valid = topk_idx >= 0
            ranks = torch.where(valid, topk_idx // local, self.group_size)
            chosen = torch.zeros(len(topk_idx), self.group_size + 1, dtype=torch.bool,
                                 device=topk_idx.device)
            chosen.scatter_(1, ranks.long(), True)
            in_rank = chosen[:, :self.group_size].contiguous()
            per_rank = in_rank.sum(0, dtype=torch.int32)
            of_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
            experts = torch.where(valid, topk_idx, num_experts).long().flatten()
            of_expert.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
            per_expert = of_expert[:num_experts].contiguous()
            return per_rank, None, per_expert, in_rank, finish(per_rank, per_expert, in_rank)

    # High throughput ------------------------------------------------------------------------------

    def dispatch(self, x: Rows, handle: Optional[DispatchHandle] = None,
                 num_tokens_per_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
                 is_token_in_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_expert: Optional[torch.Tensor] = None,
                 topk_idx: Optional[torch.Tensor] = None,
                 topk_weights: Optional[torch.Tensor] = None, expert_alignment: int = 1,
                 num_worst_tokens: int = 0, config: Optional[Config] = None,
                 previous_event: Any = None, async_finish: bool = False,
                 allocate_on_comm_stream: bool = False):
        """As DeepEP's. Rows [N, H] by source rank, then token; ids are local, -1 where the expert is on
        another rank. With `num_worst_tokens` nothing is told to the host: so many rows, the tail of
        ids -1, and an empty list. Returns (rows, ids, weights, list, handle, event)."""
        rows, scales = x if isinstance(x, tuple) else (x, None)
        if scales is not None:
            scales = plain_scales(scales)
        inputs = (rows, scales, topk_idx, topk_weights)
        with self._working(previous_event, async_finish, allocate_on_comm_stream,
                           inputs) as (stream, finish):
            options = dict(x_scales=scales, stream=stream, sms=self._sms(config))
            if handle is not None:
                assert topk_idx is None and topk_weights is None, \
                    "a cached dispatch takes its routing from the handle"
                sent = self._high_throughput.dispatch(rows, cached=handle.native, **options)
                return (self._with_scales(sent, scales), None, None, None, None,
                        finish(sent.x, sent.scales))
            routed = topk_idx is not None
            assert routed == (topk_weights is not None), "give topk_idx and topk_weights, or neither"
            assert num_tokens_per_expert is not None and is_token_in_rank is not None, \
                "give what get_dispatch_layout returned, or a handle"
            ids, experts = topk_idx, len(num_tokens_per_expert)
            if not routed:
                ids, experts = self._ids_of_ranks(is_token_in_rank), self.group_size
            if num_worst_tokens > 0:
                assert routed, "num_worst_tokens needs topk_idx"
                options["capacity"] = num_worst_tokens
            sent = self._high_throughput.dispatch(rows, ids.contiguous(), topk_weights,
                                                  experts=experts, **options)
            made = self._handle_of(sent, is_token_in_rank)
            recv_idx = sent.topk_experts.to(topk_idx.dtype) if routed else None
            counts = [] if num_worst_tokens > 0 else [
                (count + expert_alignment - 1) // expert_alignment * expert_alignment
                for count in sent.rows_per_expert]
            recv_weights = sent.topk_weights if routed else None
            return (self._with_scales(sent, scales), recv_idx, recv_weights,
                    counts if routed else [], made,
                    finish(sent.x, sent.scales, recv_idx, recv_weights, made[3]))

    def combine(self, x: torch.Tensor, handle: DispatchHandle,
                topk_weights: Optional[torch.Tensor] = None, bias: Any = None,
                config: Optional[Config] = None, previous_event: Any = None,
                async_finish: bool = False, allocate_on_comm_stream: bool = False):
        """Sums the rows of each token over ascending ranks, in fp32, rounded at the end; `bias`, one or
        two [T, H], is the initial value (two are rounded once to the type of x before). Weights come
        home if they are given. Returns (rows [T, H], weights [T, K] or None, event)."""
        if isinstance(bias, tuple):
            bias = (bias[0].float() + bias[1].float()).to(x.dtype)
        with self._working(previous_event, async_finish, allocate_on_comm_stream,
                           (x, topk_weights, bias)) as (stream, finish):
            home = self._high_throughput.combine(
                x.contiguous(), handle.native, topk_weights=topk_weights, bias=bias, stream=stream,
                sms=self._sms(config))
            return home.out, home.topk_weights, finish(home.out, home.topk_weights)

    internode_dispatch, internode_combine = dispatch, combine

    @staticmethod
    def _with_scales(sent: Any, scales: Optional[torch.Tensor]) -> Rows:
        return sent.x if scales is None else (sent.x, sent.scales)

    def _ids_of_ranks(self, is_token_in_rank: torch.Tensor) -> torch.Tensor:
        """One expert a rank: for a dispatch that is told ranks alone."""
        if self.group_size > MOST_TOP_K:
            raise NotImplementedError(f"a dispatch without topk_idx over more than {MOST_TOP_K} ranks")
        ranks = torch.arange(self.group_size, dtype=torch.int32, device=is_token_in_rank.device)
        return torch.where(is_token_in_rank, ranks, -1).to(torch.int32)

    def _handle_of(self, sent: Any, is_token_in_rank: torch.Tensor) -> DispatchHandle:
        """The first element has, in the column of this rank, where the rows of each source end; what
        other ranks have received is not known here, and -1."""
        ends = torch.full((self.group_size, self.group_size), -1, dtype=torch.int32)
        if len(sent.rows_per_source) > 0:  # else the host has not learnt them, and waits for nothing
            ends[:, self.rank] = torch.tensor(sent.rows_per_source, dtype=torch.int32).cumsum(0)
            ends = ends.to(sent.x.device)
        handle = DispatchHandle((ends, None, None, sent.source_tokens, is_token_in_rank, None))
        handle.native = sent.handle
        return handle
