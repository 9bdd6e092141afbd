"""What calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional

Array = Any
"""An array of torch, NumPy or CuPy: of the library that the inputs are of."""


@dataclass
class LowLatencyDispatch:
    """Rows by local expert: `x[L, R*M, H]`, packed at the front, by source rank, then token."""

    x: Array  #: [L, R*M, H]; rows past a count are left as they were
    tokens_per_expert: Array  #: int32 [L]
    ranges: Array  #: int32 [L, R, 2]: rows from each source, and the first
    source_tokens: Array  #: int32 [L, R*M]: index of the token at its source
    scales: Optional[Array]  #: fp32 [L, R*M, ceil(H/128)] of fp8 rows
    handle: Any  #: for combine and receive


@dataclass
class HighThroughputDispatch:
    """Token-major: one row per (token, this rank), by source rank, then token. Expert-major: one per
    selection, grouped by local expert, in each group in the same order."""

    x: Array  #: [N, H]
    source_tokens: Array  #: int32 [N]: index of the token at its source; -1: nobody's row
    topk_experts: Array  #: int32 [N, K]: local expert of each selection, -1 if not here; expert-major [N]
    topk_weights: Array  #: fp32 [N, K]: its weight, 0 if not here; expert-major [N]
    scales: Optional[Array]  #: fp32 [N, ceil(H/128)] of fp8 rows
    needed_rows: Array  #: int32 [1]: rows that came, also those past a capacity
    source_offsets: Array  #: int32 [R + 1]: tokens from the ranks before each; at last, all
    expert_offsets: Optional[Array]  #: expert-major, int32 [L + 1]: rows of the experts before each
    group_offsets: Optional[Array]  #: the same with rows that pad: where groups begin; [1:] their ends
    rows_per_source: List[int]  #: [R], if the host knows them
    rows_per_expert: List[int]  #: [L], the same
    handle: Any  #: for combine, a cached dispatch, and release


@dataclass
class HighThroughputCombine:
    out: Array  #: [T, H]
    topk_weights: Optional[Array]  #: fp32 [T, K], if weights were brought home


@dataclass
class DispatchLayout:
    """Where tokens go, each counted once a rank and a node."""

    tokens_per_rank: List[int]  #: [R]
    tokens_per_node: List[int]  #: [N]
    tokens_per_expert: List[int]  #: [E] selections
    is_token_in_rank: bytes  #: [T, R], 0 or 1
    invalid_ids: int  #: ids out of range; they count as -1


@dataclass
class Status:
    """What an object has noticed since it was made."""

    invalid_expert_ids: int  #: taken as "no selection"
    first_invalid_id: str  #: "topk_idx[3, 1] = 999"
    dropped_rows: int  #: low latency: rows past what an expert's output has room for
    error: Optional[Exception]  #: after which the object cannot be used any more

    def check(self) -> None:
        if self.error is not None:
            raise self.error
