"""`ElasticBuffer` and `EPBuffer` as vLLM, SGLang and torchtitan call them, against plain torch."""

import gc
import weakref

import oracle
import pytest
import torch
from thread_ranks import on_ranks

import expertwire as ew
from expertwire.deep_ep import ElasticBuffer, EPBuffer

RANKS = 3
SHAPE = dict(hidden=128, experts=12, top_k=3, max_tokens=9)
EXPERTS, LOCAL = SHAPE["experts"], SHAPE["experts"] // RANKS
KINDS = [ElasticBuffer, EPBuffer]


def draw(step, **changes):
    return [oracle.draw(rank, step, **{**SHAPE, **changes}) for rank in range(RANKS)]


def aligned(count, alignment):
    return (count + alignment - 1) // alignment * alignment


def groups(inputs, rank, alignment):
    """(source, token, selection, local expert) of the rows of `rank`, None for one that pads."""
    rows = []
    for e in range(LOCAL):
        for source, token in oracle.expert_major(inputs, rank * LOCAL + e):
            k = inputs[source].topk_idx[token].tolist().index(rank * LOCAL + e)
            rows.append((source, token, k, e))
        rows += [None] * (-len(rows) % alignment)
    return rows


def experts_on(rows, due, rank, weights):
    """What an engine makes of expanded rows: it weights them itself, in the row type."""
    y = torch.full_like(rows, float("nan"))
    for i, at in enumerate(due):
        if at is not None:
            y[i] = (oracle.expert(rank * LOCAL + at[3], rows[i]).float() * weights[i]).to(rows.dtype)
    return y


def expanded_home(inputs, mine, bias=None):
    """The sum of what `experts_on` makes: over the experts of a rank, rounded, then over ranks."""
    out = torch.empty_like(mine.x)
    for token in range(len(mine.x)):
        acc = bias[token].float() if bias is not None else torch.zeros(mine.x.shape[1])
        for rank in range(RANKS):
            part = None
            for k, e in enumerate(mine.topk_idx[token].tolist()):
                if e < 0 or e // LOCAL != rank:
                    continue
                made = (oracle.expert(e, mine.x[token]).float() * mine.topk_weights[token, k]).to(
                    mine.x.dtype)
                part = made.float() if part is None else part + made.float()
            if part is not None:
                acc = acc + part.to(mine.x.dtype).float()
        out[token] = acc.to(mine.x.dtype)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("alignment", [1, 16])
def test_expand(kind, sync, alignment):
    """SGLang's decode and vLLM's prefill: grouped rows, with and without a synchronisation."""

    def body(buffer, rank):
        for step in range(6):
            inputs = draw(step)
            mine = inputs[rank]
            stats = torch.zeros(LOCAL, dtype=torch.int32)
            rows, idx, weights, handle, event = buffer.dispatch(
                mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, num_experts=EXPERTS,
                expert_alignment=alignment, do_expand=True, do_cpu_sync=sync, do_zero_padding=True,
                cumulative_local_expert_recv_stats=stats)
            due = groups(inputs, rank, alignment)
            assert idx is None and event.event is None
            counts = [len(oracle.expert_major(inputs, rank * LOCAL + e)) for e in range(LOCAL)]
            assert stats.tolist() == handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
            if sync:
                assert len(rows) == len(due) == handle.num_expanded_tokens
                assert handle.num_recv_tokens_per_expert_list == [aligned(c, alignment) for c in counts]
                assert handle.num_recv_tokens == len(oracle.token_major(inputs, rank, EXPERTS))
            else:
                assert len(rows) == aligned(
                    RANKS * SHAPE["max_tokens"] * 3 + LOCAL * (alignment - 1), alignment)
                assert handle.num_recv_tokens_per_expert_list == []
            starts = [sum(aligned(c, alignment) for c in counts[:e]) for e in range(LOCAL)]
            assert handle.psum_num_recv_tokens_per_expert.tolist() == [
                start + count for start, count in zip(starts, counts)]
            tokens = oracle.token_major(inputs, rank, EXPERTS)
            assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == [
                sum(s <= source for s, _ in tokens) for source in range(RANKS)]
            assert weights.shape == (len(rows),)
            for i, at in enumerate(due):
                if at is None:
                    assert not rows[i].any() and weights[i] == 0
                else:
                    assert torch.equal(rows[i], inputs[at[0]].x[at[1]])
                    assert weights[i] == inputs[at[0]].topk_weights[at[1], at[2]]
            bias = torch.randn(mine.x.shape).to(mine.x.dtype)
            home, home_weights, _ = buffer.combine(
                experts_on(rows, due, rank, weights), handle, topk_weights=weights,
                bias=bias if step % 2 else None)
            assert torch.equal(home, expanded_home(inputs, mine, bias if step % 2 else None))
            assert torch.equal(home_weights, torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0))
            # Again with the same routing, other rows.
            again, ids, none, second, _ = buffer.dispatch(mine.x + 1, handle=handle)
            assert ids is None and none is None and second.do_expand
            for i, at in enumerate(due):
                if at is not None:
                    assert torch.equal(again[i], inputs[at[0]].x[at[1]] + 1)

    on_ranks(RANKS, body, kind, num_max_tokens_per_rank=SHAPE["max_tokens"], hidden=128, num_topk=3)


@pytest.mark.parametrize("sync", [True, False])
def test_token_major(sync):
    """vLLM's decode (no synchronisation) and SGLang's prefill."""

    def body(buffer, rank):
        for step in range(6):
            inputs = draw(step)
            mine = inputs[rank]
            rows, idx, weights, handle, _ = buffer.dispatch(
                x=mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights,
                num_experts=EXPERTS, num_max_tokens_per_rank=16, expert_alignment=8, do_expand=False,
                do_cpu_sync=sync, async_with_compute_stream=False)
            due = oracle.token_major(inputs, rank, EXPERTS)
            counts = [len(oracle.expert_major(inputs, rank * LOCAL + e)) for e in range(LOCAL)]
            assert len(rows) == (len(due) if sync else RANKS * 16)
            assert idx.dtype == torch.int64 and not handle.do_expand
            assert int(handle.psum_num_recv_tokens_per_scaleup_rank[-1]) == len(due)
            assert bool(handle.num_recv_tokens_per_expert_list) == sync
            assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
            assert handle.psum_num_recv_tokens_per_expert.tolist() == torch.tensor(
                [aligned(c, 8) for c in counts]).cumsum(0).tolist()
            assert (idx[len(due):] == -1).all() and (weights[len(due):] == 0).all()
            y = torch.zeros_like(rows)
            for row, (source, token) in enumerate(due):
                assert torch.equal(rows[row], inputs[source].x[token])
                chosen = inputs[source].topk_idx[token]
                here = (chosen >= 0) & (chosen // LOCAL == rank)
                assert torch.equal(idx[row], torch.where(here, chosen % LOCAL, -1))
                y[row] = oracle.partials(inputs[source], token, EXPERTS, RANKS, oracle.expert)[
                    sorted({e // LOCAL for e in chosen.tolist() if e >= 0}).index(rank)]
            home, none, _ = buffer.combine(x=y, handle=handle, topk_weights=None,
                                           async_with_compute_stream=False)
            assert none is None
            assert torch.equal(home, oracle.combine(mine, EXPERTS, RANKS, oracle.expert))

    on_ranks(RANKS, body, ElasticBuffer)


def test_fp8_scales_by_columns():
    def body(buffer, rank):
        inputs = draw(4, hidden=256)
        mine = inputs[rank]
        codes = mine.x.to(torch.float8_e4m3fn)
        scales = torch.rand(len(codes), 2)
        every = [(i.x.to(torch.float8_e4m3fn), i) for i in inputs]
        (rows, sf), _, weights, handle, _ = buffer.dispatch(
            (codes, scales), mine.topk_idx, mine.topk_weights, num_experts=EXPERTS, do_expand=True,
            expert_alignment=4, use_tma_aligned_col_major_sf=True)
        assert sf.stride() == (1, aligned(len(rows), 4))
        for i, at in enumerate(groups(inputs, rank, 4)):
            if at is not None:
                assert torch.equal(rows[i].view(torch.uint8), every[at[0]][0][at[1]].view(torch.uint8))
                if at[0] == rank:
                    assert torch.equal(sf[i], scales[at[1]])

    on_ranks(RANKS, body, ElasticBuffer, num_max_tokens_per_rank=9)


def test_refusals_say_what_is_wanted():
    def body(buffer, rank):
        mine = draw(1)[rank]
        given = dict(topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, num_experts=EXPERTS)
        with pytest.raises(AssertionError, match="num_max_tokens_per_rank"):
            buffer.dispatch(mine.x, **given, do_cpu_sync=False)
        with pytest.raises(NotImplementedError, match="num_max_tokens_per_rank"):
            buffer.dispatch(mine.x, **given, do_cpu_sync=False, do_expand=True,
                            num_max_tokens_per_rank=9)
        with pytest.raises(NotImplementedError, match="float32"):
            buffer.dispatch((mine.x.to(torch.float8_e4m3fn),
                             torch.zeros(len(mine.x), 1, dtype=torch.int32)), **given)
        with pytest.raises(TypeError, match="num_worst_tokens"):
            buffer.dispatch(mine.x, **given, num_worst_tokens=3)
        with pytest.raises(ew.InvalidArgument, match="expert_alignment is 1000"):
            buffer.dispatch(mine.x, **given, do_expand=True, expert_alignment=1000)
        if isinstance(buffer, EPBuffer):
            with pytest.raises(NotImplementedError, match="lb_"):
                buffer.lb_prefetch_weights(None)
            with pytest.raises(AssertionError, match="defer_epilogue"):
                buffer.dispatch(mine.x, **given, defer_epilogue=True)
        assert buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=3) % 2 == 0
        buffer.barrier()

    for kind in KINDS:
        on_ranks(RANKS, body, kind)


def test_dropped_without_destroy():
    gone = []

    def body(buffer, rank):
        buffer.barrier()
        gone.append(weakref.ref(buffer))
        buffer.destroy = lambda: None

    on_ranks(2, body, ElasticBuffer)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
