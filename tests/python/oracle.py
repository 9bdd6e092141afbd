"""Dispatch and combine in plain torch, from the inputs of all ranks; nothing of expertwire."""

from dataclasses import dataclass

import torch


@dataclass
class Inputs:
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def draw(rank, step, *, hidden, experts, top_k, max_tokens, dtype=torch.bfloat16, masked=0.2):
    """Ragged batches, some of them empty; distinct experts a token, some selections masked."""
    g = torch.Generator().manual_seed(1000 * step + rank)
    tokens = int(torch.randint(0, max_tokens + 1, (), generator=g)) if step % 4 else max_tokens
    if step % 5 == 3 and rank == 0:
        tokens = 0
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    idx = torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k]
    idx = torch.where(torch.rand(tokens, top_k, generator=g) < masked, -1, idx)
    return Inputs(x, idx.contiguous(), torch.rand(tokens, top_k, generator=g))


def token_major(inputs, rank, experts):
    """(source, token) of the rows that `rank` gets, in order."""
    local = experts // len(inputs)
    return [(source, token) for source, all_of in enumerate(inputs)
            for token in range(len(all_of.x))
            if bool(((all_of.topk_idx[token] // local == rank)
                     & (all_of.topk_idx[token] >= 0)).any())]


def expert_major(inputs, expert):
    """(source, token) of the rows that an expert gets, in order."""
    return [(source, token) for source, all_of in enumerate(inputs)
            for token in range(len(all_of.x)) if bool((all_of.topk_idx[token] == expert).any())]


def fma(acc, w, y):
    """fp32 with one rounding."""
    return (acc.double() + w.double() * y.double()).float()


def partials(mine, token, experts, ranks, output_of):
    """What the ranks of a token make of it, ascending: fma in top-k order, rounded to the row type."""
    local = experts // ranks
    sums = []
    for rank in range(ranks):
        acc = None
        for k, expert in enumerate(mine.topk_idx[token].tolist()):
            if expert < 0 or expert // local != rank:
                continue
            acc = torch.zeros(mine.x.shape[1]) if acc is None else acc
            acc = fma(acc, mine.topk_weights[token, k], output_of(expert, mine.x[token]))
        if acc is not None:
            sums.append(acc.to(mine.x.dtype))
    return sums


def combine(mine, experts, ranks, output_of, bias=None):
    """The sum over ascending ranks in fp32, with the bias as initial value."""
    out = torch.empty_like(mine.x)
    for token in range(len(mine.x)):
        acc = bias[token].float() if bias is not None else torch.zeros(mine.x.shape[1])
        for part in partials(mine, token, experts, ranks, output_of):
            acc = acc + part.float()
        out[token] = acc.to(mine.x.dtype)
    return out


def expert(number, row):
    """A stand-in expert whose output says which expert it was."""
    return (row.float() * (1 + number / 16)).to(row.dtype)
