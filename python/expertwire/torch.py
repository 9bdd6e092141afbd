"""Dispatch and combine with gradients, and a layer that is made of them. Needs torch.

The backward pass of a dispatch is a combine, and that of a combine a dispatch with the same routing,
so both are collective: all ranks run them in the same order, as torch does if they build the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import nn

from . import Communicator, HighThroughput


def _stream(tensor: torch.Tensor) -> Any:
    """Where torch would run what it does with a tensor."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


@dataclass
class Dispatched:
    """N rows by source rank, then token; `x` and `topk_weights` have gradients."""

    x: torch.Tensor  #: [N, H]
    topk_experts: torch.Tensor  #: int32 [N, K]: local expert of each selection, -1 if not here
    topk_weights: torch.Tensor  #: fp32 [N, K]: its weight, 0 if not here
    source_tokens: torch.Tensor  #: int32 [N]: index of the token at its source
    rows_per_expert: List[int]  #: selections of each local expert
    handle: Any


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: HighThroughput, sent: Any, x: torch.Tensor,
                topk_weights: torch.Tensor):
        """What was `sent` came from `x` and `topk_weights`."""
        ctx.layer, ctx.handle = layer, sent.handle
        return sent.x, sent.topk_weights

    @staticmethod
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor):
        home = ctx.layer.combine(grad_x.contiguous(), ctx.handle,
                                 topk_weights=grad_weights.contiguous(), stream=_stream(grad_x))
        return None, None, home.out, home.topk_weights


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: HighThroughput, handle: Any, y: torch.Tensor,
                bias: Optional[torch.Tensor]):
        ctx.layer, ctx.handle, ctx.biased = layer, handle, bias is not None
        given = None if bias is None else bias.detach().contiguous()
        return layer.combine(y.detach().contiguous(), handle, bias=given, stream=_stream(y)).out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        sent = ctx.layer.dispatch(grad.contiguous(), cached=ctx.handle, stream=_stream(grad))
        return None, None, sent.x, grad if ctx.biased else None


def dispatch(layer: HighThroughput, x: torch.Tensor, topk_idx: torch.Tensor,
             topk_weights: torch.Tensor, *, experts: int = 0) -> Dispatched:
    """Sends `x` [T, H] to the ranks of the experts that `topk_idx` [T, K] (int32 or int64, -1: none)
    names, with `topk_weights` fp32 [T, K]. `experts` as in HighThroughput.dispatch(). On the caller's
    current stream; the host waits for the counts."""
    sent = layer.dispatch(x.detach().contiguous(), topk_idx.contiguous(),
                          topk_weights.detach().contiguous(), experts=experts, stream=_stream(x))
    rows, weights = _Dispatch.apply(layer, sent, x, topk_weights)
    return Dispatched(rows, sent.topk_experts, weights, sent.source_tokens,
                      list(sent.rows_per_expert), sent.handle)


def combine(layer: HighThroughput, y: torch.Tensor, dispatched: Dispatched,
            bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Brings the rows `y` [N, H] home: [T, H], `bias` [T, H] and the rows of each token, added in fp32
    over ascending ranks. On the caller's current stream."""
    return _Combine.apply(layer, dispatched.handle, y, bias)


class MoELayer(nn.Module):
    """A reference Mixture-of-Experts layer with its experts spread over the ranks, to read and to
    compare with: `x` [T, H] to [T, H], each token through `top_k` of `experts`.

    Rank r holds experts r*L to (r+1)*L - 1, made by `expert(number)`. The router is the caller's to keep
    equal on all ranks, and its gradient to sum over them; those of experts are complete. `layer` may serve
    several of these.
    """

    def __init__(self, communicator: Communicator, layer: HighThroughput, hidden: int, experts: int,
                 top_k: int, expert: Callable[[int], nn.Module]) -> None:
        super().__init__()
        local = experts // communicator.size
        self.layer, self.all_experts, self.top_k = layer, experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        first = communicator.rank * local
        self.experts = nn.ModuleList(expert(first + e) for e in range(local))

    def route(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts of each token, [T, K]."""
        return self.router(x).float().softmax(1).topk(self.top_k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        sent = dispatch(self.layer, x, chosen, weights, experts=self.all_experts)
        y = torch.zeros_like(sent.x)
        for e, expert in enumerate(self.experts):
            here = (sent.topk_experts == e)
            rows = here.any(1).nonzero().squeeze(1)
            w = (sent.topk_weights * here).sum(1)[rows].unsqueeze(1).to(sent.x.dtype)
            y = y.index_add(0, rows, w * expert(sent.x[rows]))
        return combine(self.layer, y, sent)
