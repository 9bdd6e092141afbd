"""`ElasticBuffer` and `EPHandle`, the second generation of DeepEP's API, and `EPBuffer`, the third."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, List, Optional, Tuple

import torch

from .. import HighThroughput
from ._events import EventHandle, EventOverlap, on_cuda
from ._group import MOST_TOP_K, GroupPart, Rows, plain_scales

_DEFAULT_SMS = 24


@dataclass
class EPHandle:
    """The routing of a dispatch. Lists and counts of the host are empty, or the most there can be, where
    the dispatch did not wait for them."""

    native: Any
    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Optional[torch.Tensor] = None
    num_recv_tokens: int = 0  #: tokens that came
    num_expanded_tokens: int = 0  #: rows of an expanded output, those that pad included
    #: rounded up to the alignment
    num_recv_tokens_per_expert_list: List[int] = field(default_factory=list)
    psum_num_recv_tokens_per_scaleup_rank: Optional[torch.Tensor] = None  #: int32 [R], inclusive
    #: int32 [L]. Expanded: where the rows of each expert end, before those that pad. Else the inclusive
    #: sums of counts rounded up to the alignment.
    psum_num_recv_tokens_per_expert: Optional[torch.Tensor] = None
    num_unaligned_recv_tokens_per_expert: Optional[torch.Tensor] = None  #: int32 [L]


def _aligned(counts: Any, alignment: int) -> Any:
    return (counts + alignment - 1) // alignment * alignment


def _column_major(scales: torch.Tensor) -> torch.Tensor:
    """The same values, rows side by side in memory, columns a multiple of 16 bytes apart, as TMA reads
    them."""
    rows, columns = scales.shape
    memory = torch.zeros(columns, _aligned(rows, 4), dtype=scales.dtype, device=scales.device)
    memory[:, :rows] = scales.t()
    return memory.t()[:rows]


class ElasticBuffer(GroupPart):
    """Dispatch and combine of one group of ranks, made collectively.

    `group` is a torch process group of any backend, or `comm` an mpi4py communicator. Sizes are hints, but for `num_max_tokens_per_rank`,
    which bounds what dispatches without a synchronisation of the host may bring. All ranks make the
    same calls in the same order. Not destroyed, it waits for nobody when it is dropped.
    """

    def __init__(self, group: Any, num_bytes: Optional[int] = None, num_cpu_bytes: int = 0,
                 num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
                 use_fp8_dispatch: bool = False, deterministic: bool = False,
                 allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
                 prefer_overlap_with_compute: bool = True, sl_idx: Optional[int] = 3,
                 num_allocated_qps: int = 0, num_cpu_timeout_secs: int = 300,
                 num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
                 comm: Any = None) -> None:
        self._join(group, comm)
        self.rank_idx, self.num_ranks = self.rank, self.group_size
        self.scaleup_rank_idx, self.scaleout_rank_idx = self.rank, 0
        self.num_scaleup_ranks = self.num_nvlink_ranks = self.group_size
        self.num_scaleout_ranks = self.num_rdma_ranks = 1
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_allocated_qps = num_allocated_qps
        self.explicitly_destroy = explicitly_destroy
        self._timeout = float(max(num_cpu_timeout_secs, num_gpu_timeout_secs))
        self._high_throughput = self._make_high_throughput(num_max_tokens_per_rank)
        self.num_bytes = num_bytes or self._bytes_of(
            self.group_size, num_max_tokens_per_rank, hidden, num_topk)

    def destroy(self) -> None:
        """Local: waits for what was called, and for no other rank."""
        self._high_throughput.close()
        self.communicator.close()

    @property
    def runtime(self) -> "ElasticBuffer":
        return self

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    @staticmethod
    def get_buffer_size_hint(group: Any, num_max_tokens_per_rank: int, hidden: int = 0,
                             num_topk: int = 0, use_fp8_dispatch: bool = False,
                             allow_hybrid_mode: bool = True,
                             allow_multiple_reduction: bool = True) -> int:
        """Bytes that a buffer for rows of `hidden` elements of bf16 needs of every rank; rings do not
        grow with tokens."""
        return ElasticBuffer._bytes_of(group.size(), num_max_tokens_per_rank, hidden, num_topk)

    @staticmethod
    def _bytes_of(ranks: int, most: int, hidden: int, top_k: int) -> int:
        return HighThroughput.memory_bytes(ranks, hidden=_aligned(max(hidden, 8), 8), experts=ranks,
                                           top_k=top_k or MOST_TOP_K, max_tokens=most)

    def get_theoretical_num_sms(self, num_experts: Optional[int] = None,
                                num_topk: Optional[int] = None, **_: Any) -> int:
        """SMs of an operation that is given none: as many as the wire needs."""
        if not on_cuda():
            return _DEFAULT_SMS
        every = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        return max(4, min(_DEFAULT_SMS, every) // 2 * 2)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        return num_sms + 1

    def get_physical_domain_size(self) -> Tuple[int, int]:
        """Ranks between nodes, and in one."""
        return 1, self.group_size

    get_logical_domain_size = get_physical_domain_size

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False,
                sequential: bool = True) -> None:
        """The host waits until all ranks have come, and what their streams had to do then is done."""
        if on_cuda():
            torch.cuda.current_stream().synchronize()
        self.communicator.barrier()

    # Dispatch -------------------------------------------------------------------------------------

    def dispatch(self, x: Rows, topk_idx: Optional[torch.Tensor] = None,
                 topk_weights: Optional[torch.Tensor] = None,
                 cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                 num_experts: Optional[int] = None, num_max_tokens_per_rank: Optional[int] = None,
                 expert_alignment: Optional[int] = None, num_sms: int = 0, num_qps: int = 0,
                 previous_event: Any = None, previous_event_before_epilogue: Any = None,
                 async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
                 handle: Optional[EPHandle] = None, do_handle_copy: bool = True,
                 do_cpu_sync: Optional[bool] = None, do_expand: bool = False,
                 do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False):
        """As DeepEP's. Rows are token-major, or with `do_expand` grouped by local expert, one per
        selection, groups padded with zeros to `expert_alignment`. Without `do_cpu_sync` the output has
        the most rows there can be, and those behind the last that came have ids of -1. With `handle` its
        routing is taken again. Returns (rows, ids or None, weights or None, handle, event)."""
        rows, scales = x if isinstance(x, tuple) else (x, None)
        scales = None if scales is None else plain_scales(scales)
        if previous_event is None:
            previous_event = previous_event_before_epilogue
        with self._working(previous_event, async_with_compute_stream, allocate_on_comm_stream,
                           (rows, scales, topk_idx, topk_weights)) as (stream, finish):
            options = dict(x_scales=scales, stream=stream, timeout=self._timeout,
                           sms=num_sms if on_cuda() else 0)
            if handle is not None:
                assert topk_idx is None, "a cached dispatch takes its routing from the handle"
                sent = self._high_throughput.dispatch(
                    rows.contiguous(), None, topk_weights, cached=handle.native, **options)
                made = self._again(handle, sent)
            else:
                assert topk_idx is not None and num_experts is not None, \
                    "give topk_idx and num_experts, or a handle"
                alignment, sync = expert_alignment or 1, do_cpu_sync is None or do_cpu_sync
                most = num_max_tokens_per_rank or self.num_max_tokens_per_rank
                if do_expand:
                    options.update(layout="expert_major", expert_alignment=alignment)
                if not sync:
                    options["capacity"] = self._worst_rows(
                        most, num_experts, topk_idx.shape[1], alignment, do_expand)
                sent = self._high_throughput.dispatch(
                    rows.contiguous(), topk_idx.contiguous(), topk_weights, experts=num_experts,
                    **options)
                made = self._handle(sent, topk_idx, EPHandle(
                    native=sent.handle, do_expand=do_expand, num_experts=num_experts,
                    expert_alignment=alignment, num_max_tokens_per_rank=most, num_sms=num_sms), sync)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(made.num_unaligned_recv_tokens_per_expert)
            ids = None
            if not made.do_expand:
                ids = sent.topk_experts.to(made.topk_idx.dtype)
            weights = sent.topk_weights if topk_weights is not None else None
            received = sent.x
            if scales is not None:
                columns = use_tma_aligned_col_major_sf
                received = (sent.x, _column_major(sent.scales) if columns else sent.scales)
            return received, ids, weights, made, finish(sent.x, sent.scales, ids, weights)

    def _worst_rows(self, most: int, experts: int, top_k: int, alignment: int, expand: bool) -> int:
        assert most > 0, "without do_cpu_sync give num_max_tokens_per_rank, here or to the buffer"
        if self.num_max_tokens_per_rank == 0 and expand:
            raise NotImplementedError("do_expand without do_cpu_sync needs a buffer that was made with "
                                      "num_max_tokens_per_rank")
        if not expand:
            return self.group_size * most
        local = experts // self.group_size
        rows = self.group_size * most * min(top_k, local)
        return _aligned(rows + local * (alignment - 1), alignment)

    def _handle(self, sent: Any, topk_idx: torch.Tensor, made: EPHandle, sync: bool) -> EPHandle:
        """Fills in what a dispatch has brought. The host looks at no count unless it waited for them."""
        alignment = made.expert_alignment
        if made.do_expand:
            unaligned = sent.expert_offsets[1:] - sent.expert_offsets[:-1]
            ends = sent.group_offsets[:-1] + unaligned
        else:
            unaligned = self._count(sent.topk_experts, made.num_experts // self.group_size)
            ends = _aligned(unaligned, alignment).cumsum(0, dtype=torch.int32)
        made.topk_idx = topk_idx.clone()
        made.num_recv_tokens = (sum(sent.rows_per_source) if sync
                                else self.group_size * made.num_max_tokens_per_rank)
        made.num_expanded_tokens = len(sent.x) if made.do_expand else 0
        if sync:
            made.num_recv_tokens_per_expert_list = [
                _aligned(count, alignment) for count in sent.rows_per_expert]
        made.psum_num_recv_tokens_per_scaleup_rank = sent.source_offsets[1:]
        made.psum_num_recv_tokens_per_expert = ends
        made.num_unaligned_recv_tokens_per_expert = unaligned
        return made

    @staticmethod
    def _count(experts: torch.Tensor, local: int) -> torch.Tensor:
        """Selections of each local expert [L], on the device."""
        chosen = torch.where(experts >= 0, experts, local).flatten().long()
        counts = torch.zeros(local + 1, dtype=torch.int32, device=experts.device)
        return counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))[:local]

    @staticmethod
    def _again(handle: EPHandle, sent: Any) -> EPHandle:
        return replace(handle, native=sent.handle)

    # Combine --------------------------------------------------------------------------------------

    def combine(self, x: torch.Tensor, handle: EPHandle,
                topk_weights: Optional[torch.Tensor] = None, bias: Any = None, num_sms: int = 0,
                num_qps: int = 0, previous_event: Any = None,
                previous_event_before_epilogue: Any = None, async_with_compute_stream: bool = False,
                allocate_on_comm_stream: bool = False):
        """Sums the rows of each token, not weighted: an expanded dispatch's over the experts of a rank
        first, rounded, then over ascending ranks in fp32; `bias`, one or two [T, H], is the initial
        value (two are rounded once to the type of x before). `topk_weights`, [N, K] or, expanded, [N],
        come home. Returns (rows [T, H], weights [T, K] or None, event)."""
        if isinstance(bias, tuple):
            given = [b for b in bias if b is not None]
            bias = sum((b.float() for b in given[1:]), given[0].float()).to(x.dtype) if given else None
        if previous_event is None:
            previous_event = previous_event_before_epilogue
        with self._working(previous_event, async_with_compute_stream, allocate_on_comm_stream,
                           (x, topk_weights, bias)) as (stream, finish):
            home = self._high_throughput.combine(
                x.contiguous(), handle.native, topk_weights=topk_weights, bias=bias, stream=stream,
                timeout=self._timeout, sms=num_sms if on_cuda() else 0)
            return home.out, home.topk_weights, finish(home.out, home.topk_weights)


class EPBuffer(ElasticBuffer):
    """The third generation: the second with other arguments. There is no epilogue to defer: what
    `defer_epilogue` asks for has happened when the event has. Copies of busy experts are not made."""

    def __init__(self, group: Any, num_bytes: Optional[int] = None, num_max_tokens_per_rank: int = 0,
                 hidden: int = 0, num_topk: int = 0, use_fp8_dispatch: bool = False,
                 lb_allocation_plan_or_num_bytes: Any = 0, deterministic: bool = False,
                 allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
                 prefer_overlap_with_compute: bool = True, sl_idx: Optional[int] = None,
                 num_allocated_qps: int = 0, num_cpu_timeout_secs: int = 300,
                 num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
                 comm: Any = None) -> None:
        if lb_allocation_plan_or_num_bytes:
            self.lb_prefetch_weights()
        super().__init__(group, num_bytes, num_max_tokens_per_rank=num_max_tokens_per_rank,
                         hidden=hidden, num_topk=num_topk, use_fp8_dispatch=use_fp8_dispatch,
                         num_allocated_qps=num_allocated_qps,
                         num_cpu_timeout_secs=num_cpu_timeout_secs,
                         num_gpu_timeout_secs=num_gpu_timeout_secs,
                         explicitly_destroy=explicitly_destroy, comm=comm)

    def dispatch(self, x: Rows, topk_idx: Optional[torch.Tensor] = None,
                 topk_weights: Optional[torch.Tensor] = None,
                 cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                 num_experts: Optional[int] = None, num_max_tokens_per_rank: Optional[int] = None,
                 expert_alignment: Optional[int] = None, num_sms: int = 0, num_qps: int = 0,
                 previous_event: Any = None, async_with_compute_stream: bool = False,
                 allocate_on_comm_stream: bool = False, handle: Optional[EPHandle] = None,
                 do_handle_copy: bool = False, do_cpu_sync: Optional[bool] = None,
                 do_expand: bool = False, do_zero_padding: bool = False,
                 use_tma_aligned_col_major_sf: bool = False, defer_epilogue: bool = False):
        """As ElasticBuffer.dispatch()."""
        assert not do_handle_copy, "do_handle_copy must be False"
        assert not defer_epilogue or async_with_compute_stream, \
            "defer_epilogue needs async_with_compute_stream"
        return super().dispatch(
            x, topk_idx, topk_weights, cumulative_local_expert_recv_stats, num_experts,
            num_max_tokens_per_rank, expert_alignment, num_sms, num_qps, previous_event,
            async_with_compute_stream=async_with_compute_stream,
            allocate_on_comm_stream=allocate_on_comm_stream, handle=handle, do_cpu_sync=do_cpu_sync,
            do_expand=do_expand, do_zero_padding=do_zero_padding,
            use_tma_aligned_col_major_sf=use_tma_aligned_col_major_sf)

    def combine(self, x: torch.Tensor, handle: EPHandle,
                topk_weights: Optional[torch.Tensor] = None, bias: Any = None, num_sms: int = 0,
                num_qps: int = 0, previous_event: Any = None, async_with_compute_stream: bool = False,
                allocate_on_comm_stream: bool = False, defer_epilogue: bool = False):
        """As ElasticBuffer.combine()."""
        assert not defer_epilogue or async_with_compute_stream, \
            "defer_epilogue needs async_with_compute_stream"
        return super().combine(x, handle, topk_weights, bias, num_sms, num_qps, previous_event,
                               async_with_compute_stream=async_with_compute_stream,
                               allocate_on_comm_stream=allocate_on_comm_stream)

    def lb_prefetch_weights(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("copies of busy experts (lb_*): expertwire makes none")

    lb_reduce_grads = lb_prefetch_weights
