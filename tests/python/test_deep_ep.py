"""`deep_ep` on expertwire: calls as the engines make them, against the oracle in plain torch."""

import gc
import os
import pathlib
import subprocess
import sys
import threading
import weakref

import oracle
import pytest
import torch

import expertwire as ew
from expertwire.deep_ep import Buffer, Config, EventHandle, EventOverlap
from expertwire.deep_ep import utils
from thread_ranks import ThreadComm, on_ranks

RANKS = 3
SHAPE = dict(hidden=128, experts=12, top_k=3, max_tokens=9)


def draw(step, **changes):
    return [oracle.draw(rank, step, **{**SHAPE, **changes}) for rank in range(RANKS)]


def layout_of(buffer, mine, experts=SHAPE["experts"]):
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
        mine.topk_idx, experts)
    assert per_rdma_rank is None and event.event is None
    return dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)


def check_rows(received, rank, inputs, experts=SHAPE["experts"]):
    rows, idx, weights = received
    local = experts // RANKS
    due = oracle.token_major(inputs, rank, experts)
    for row, (source, token) in enumerate(due):
        assert torch.equal(rows[row], inputs[source].x[token])
        chosen = inputs[source].topk_idx[token]
        here = (chosen >= 0) & (chosen // local == rank)
        assert torch.equal(idx[row], torch.where(here, chosen % local, -1))
        assert torch.equal(weights[row],
                           torch.where(here, inputs[source].topk_weights[token], 0.0))
    return due


def test_layout():
    inputs = draw(1)

    def body(buffer, rank):
        mine = inputs[rank]
        given = layout_of(buffer, mine)
        local = SHAPE["experts"] // RANKS
        for token, chosen in enumerate(mine.topk_idx.tolist()):
            ranks = {expert // local for expert in chosen if expert >= 0}
            assert given["is_token_in_rank"][token].tolist() == [r in ranks for r in range(RANKS)]
        assert given["num_tokens_per_rank"].tolist() == given["is_token_in_rank"].sum(0).tolist()
        assert given["num_tokens_per_expert"].tolist() == [
            int((mine.topk_idx == e).sum()) for e in range(SHAPE["experts"])]
        assert all(given[k].dtype == torch.int32
                   for k in ("num_tokens_per_rank", "num_tokens_per_expert"))

    on_ranks(RANKS, body)


@pytest.mark.parametrize("async_finish", [False, True])
def test_vllm_prefill(async_finish):
    """get_dispatch_layout, dispatch and combine by keyword, with an event."""

    def body(buffer, rank):
        for step in range(8):
            inputs = draw(step)
            mine = inputs[rank]
            previous = Buffer.capture()
            given = layout_of(buffer, mine)
            received = buffer.dispatch(
                x=mine.x, handle=None, **given, topk_idx=mine.topk_idx,
                topk_weights=mine.topk_weights, expert_alignment=1,
                config=Buffer.get_dispatch_config(RANKS), previous_event=previous,
                async_finish=async_finish, allocate_on_comm_stream=False)
            rows, idx, weights, counts, handle, event = received
            assert (event.event is not None) == async_finish
            if event.event is not None:
                event.current_stream_wait()
            due = check_rows((rows, idx, weights), rank, inputs)
            assert len(rows) == len(due) and idx.dtype == torch.int64
            local = SHAPE["experts"] // RANKS
            assert counts == [len(oracle.expert_major(inputs, rank * local + e))
                              for e in range(local)]
            ends = handle[0][:, rank].tolist()
            assert ends == [sum(s <= source for s, _ in due) for source in range(RANKS)]
            assert handle[3].tolist() == [token for _, token in due]
            y = torch.zeros_like(rows)
            for row, (source, token) in enumerate(due):
                y[row] = oracle.partials(inputs[source], token, SHAPE["experts"], RANKS,
                                         oracle.expert)[
                    sorted({e // local for e in inputs[source].topk_idx[token].tolist()
                            if e >= 0}).index(rank)]
            home, home_weights, event = buffer.combine(
                x=y, handle=handle, topk_weights=None, config=None, previous_event=previous,
                async_finish=async_finish, allocate_on_comm_stream=False)
            assert home_weights is None
            assert torch.equal(home, oracle.combine(mine, SHAPE["experts"], RANKS, oracle.expert))

    on_ranks(RANKS, body)


def test_megatron_forward_and_backward():
    """Handles live until backward: combine's backward is a cached dispatch, dispatch's a combine that
    brings the gradients of the weights home."""

    def body(buffer, rank):
        batches = []
        for step in range(4):
            inputs = draw(step)
            mine = inputs[rank]
            given = layout_of(buffer, mine)
            received = buffer.dispatch(mine.x, topk_idx=mine.topk_idx,
                                       topk_weights=mine.topk_weights, **given,
                                       previous_event=EventOverlap(EventHandle()),
                                       async_finish=True, allocate_on_comm_stream=True)
            batches.append((inputs, received))
        for inputs, (rows, _, weights, _, handle, _) in reversed(batches):
            mine = inputs[rank]
            again, *nothing, event = buffer.dispatch(mine.x, handle=handle)
            assert torch.equal(again, rows) and nothing == [None] * 4 and event.event is None
            grad, grad_weights, _ = buffer.combine(rows, handle, topk_weights=weights.float())
            reached = (mine.topk_idx >= 0)
            assert torch.equal(grad_weights, torch.where(reached, mine.topk_weights, 0.0))
            copies = torch.tensor([len({e // 4 for e in chosen if e >= 0})
                                   for chosen in mine.topk_idx.tolist()])
            want = torch.stack([sum([row.float()] * int(n), torch.zeros(SHAPE["hidden"]))
                                for row, n in zip(mine.x, copies)]) if len(copies) else grad.float()
            assert torch.equal(grad, want.to(grad.dtype))

    on_ranks(RANKS, body)


def test_worst_tokens_alignment_bias_and_fp8():
    def body(buffer, rank):
        inputs = draw(2)
        mine = inputs[rank]
        given = layout_of(buffer, mine)
        worst = RANKS * SHAPE["max_tokens"] + 3
        rows, idx, weights, counts, handle, _ = buffer.dispatch(
            mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, **given,
            num_worst_tokens=worst)
        due = check_rows((rows, idx, weights), rank, inputs)
        assert len(rows) == worst and counts == []
        assert bool((idx[len(due):] == -1).all()) and bool((weights[len(due):] == 0).all())

        _, _, _, counts, handle, _ = buffer.dispatch(
            mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights, **given,
            expert_alignment=128)
        assert counts == [(len(oracle.expert_major(inputs, rank * 4 + e)) + 127) // 128 * 128
                          for e in range(4)]
        zeros = torch.zeros(len(due), SHAPE["hidden"], dtype=torch.bfloat16)
        bias = torch.randn_like(mine.x)
        assert torch.equal(buffer.combine(zeros, handle, bias=bias)[0], bias)
        both = buffer.combine(zeros, handle, bias=(bias, bias))[0]
        assert torch.equal(both, (bias.float() * 2).to(bias.dtype))

        fp8 = mine.x.to(torch.float8_e4m3fn)
        every_scale = [torch.rand(1, len(i.x), generator=torch.Generator().manual_seed(s)).T
                       for s, i in enumerate(inputs)]
        scales = every_scale[rank]  # column-major, as callers give them
        (rows8, scales8), *_ = buffer.dispatch((fp8, scales), topk_idx=mine.topk_idx,
                                               topk_weights=mine.topk_weights, **given)
        for row, (source, token) in enumerate(due):
            assert torch.equal(rows8[row].view(torch.uint8),
                               inputs[source].x[token].to(torch.float8_e4m3fn).view(torch.uint8))
            assert torch.equal(scales8[row], every_scale[source][token])

    on_ranks(RANKS, body)


def test_dispatch_by_ranks_alone():
    inputs = draw(0)

    def body(buffer, rank):
        mine = inputs[rank]
        rows, idx, weights, counts, handle, _ = buffer.dispatch(mine.x, **layout_of(buffer, mine))
        due = oracle.token_major(inputs, rank, SHAPE["experts"])
        assert idx is None and weights is None and counts == []
        assert torch.equal(rows, torch.stack([inputs[s].x[t] for s, t in due]))

    on_ranks(RANKS, body)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_low_latency(hook, use_fp8):
    """As vLLM and SGLang decode: positional arguments, hooks, out=, statistics; sizes change."""
    local = SHAPE["experts"] // RANKS

    def body(buffer, rank):
        stats = torch.zeros(local, dtype=torch.int32)
        total = torch.zeros(local, dtype=torch.int32)
        for step in range(6):
            most = SHAPE["max_tokens"] + step % 3
            inputs = draw(step)
            mine = inputs[rank]
            rows, counts, handle, event, receive = buffer.low_latency_dispatch(
                mine.x, mine.topk_idx, most, SHAPE["experts"],
                cumulative_local_expert_recv_stats=stats, use_fp8=use_fp8, async_finish=False,
                return_recv_hook=hook)
            assert event.event is None and (receive is not None) == hook
            if hook:
                receive()
            src_info, layout_range, m, hidden, experts = handle
            assert (m, hidden, experts) == (most, SHAPE["hidden"], SHAPE["experts"])
            y = torch.zeros(local, RANKS * most, hidden, dtype=torch.bfloat16)
            if use_fp8:
                rows, scales = rows
                assert scales.shape == (local, RANKS * most, 1) and scales.stride(1) == 1
            for e in range(local):
                due = oracle.expert_major(inputs, rank * local + e)
                total[e] += len(due)
                assert int(counts[e]) == len(due)
                assert src_info[e, :len(due)].tolist() == [token for _, token in due]
                for source in range(RANKS):
                    packed = int(layout_range[e, source])
                    mine_of = [i for i, (s, _) in enumerate(due) if s == source]
                    assert packed & 0xFFFFFFFF == len(mine_of)
                    assert not mine_of or packed >> 32 == mine_of[0]
                for i, (source, token) in enumerate(due):
                    row = rows[e, i].float() * (scales[e, i] if use_fp8 else 1)
                    x = inputs[source].x[token]
                    if use_fp8:
                        assert (row - x.float()).abs().max() <= x.float().abs().max() / 16
                    else:
                        assert torch.equal(row.to(torch.bfloat16), x)
                    y[e, i] = oracle.expert(rank * local + e, x)
            zero_copy = step % 2 == 1
            if zero_copy:
                place = buffer.get_next_low_latency_combine_buffer(handle)
                place.copy_(y)
            out = torch.empty_like(mine.x)
            home, event, receive = buffer.low_latency_combine(
                y, mine.topk_idx, mine.topk_weights, handle, zero_copy=zero_copy,
                async_finish=False, return_recv_hook=hook, out=out)
            if hook:
                receive()
            assert home is out and event.event is None
            assert torch.equal(out, oracle.combine(mine, SHAPE["experts"], RANKS, oracle.expert))
        assert torch.equal(stats, total)

    on_ranks(RANKS, body, low_latency_mode=True)


def test_both_modes_in_one_buffer_and_two_batches_in_flight():
    def body(buffer, rank):
        inputs = [draw(1), draw(2)]
        sent = []
        for batch in inputs:
            mine = batch[rank]
            sent.append(buffer.low_latency_dispatch(mine.x, mine.topk_idx, 9, SHAPE["experts"],
                                                    use_fp8=False, return_recv_hook=True))
        buffer.clean_low_latency_buffer(9, SHAPE["hidden"], SHAPE["experts"])
        for batch, (rows, counts, handle, _, receive) in zip(inputs, sent):
            mine = batch[rank]
            receive()
            home, _, _ = buffer.low_latency_combine(rows.clone(), mine.topk_idx,
                                                    mine.topk_weights, handle)
            want = oracle.combine(mine, SHAPE["experts"], RANKS, lambda e, row: row)
            assert torch.equal(home, want)
        mine = inputs[0][rank]
        rows, _, _, _, handle, _ = buffer.dispatch(
            mine.x, topk_idx=mine.topk_idx, topk_weights=mine.topk_weights,
            **layout_of(buffer, mine))
        buffer.combine(rows, handle)

    on_ranks(RANKS, body)


def test_what_is_not_there_is_named():
    def body(buffer, rank):
        x = torch.zeros(1, 128, dtype=torch.bfloat16)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        for name in ("round_scale", "use_ue8m0"):
            with pytest.raises(NotImplementedError, match=name):
                buffer.low_latency_dispatch(x, ids, 4, 3, **{name: True})
        with pytest.raises(TypeError, match="use_nvfp4"):
            buffer.low_latency_dispatch(x, ids, 4, 3, use_nvfp4=True)
        with pytest.raises(NotImplementedError, match="mask"):
            buffer.low_latency_update_mask_buffer(0, True)
        with pytest.raises(NotImplementedError, match="get_local_buffer_tensor"):
            buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
        status = torch.ones(RANKS, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * RANKS
        with pytest.raises(NotImplementedError, match="int32"):
            buffer.dispatch((x, torch.zeros(1, 1, dtype=torch.int32)), topk_idx=ids,
                            topk_weights=torch.ones(1, 1),
                            **layout_of(buffer, oracle.Inputs(x, ids, None), 3))

    on_ranks(RANKS, body)


def test_sizes_are_answered_for_every_number_of_ranks():
    """As Megatron asks before it makes a buffer."""
    for ranks in (1, 3, 7, 24, 100):
        for config in (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)):
            assert config.get_nvl_buffer_size_hint(14336, ranks) % 128 == 0
            assert config.get_nvl_buffer_size_hint(14336, ranks) > 0
            assert config.get_rdma_buffer_size_hint(14336, ranks) == 0
    assert Config(24, 6, 256).num_sms == 24 and Config(24, 6, 256, 6, 128).num_sms == 24
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) < 200e6
    before = Buffer.num_sms
    Buffer.set_num_sms(24)
    assert Buffer.get_dispatch_config(2).num_sms == 24
    Buffer.set_num_sms(before)
    assert utils.EventOverlap is EventOverlap and utils.EventHandle is EventHandle


def test_a_buffer_may_be_dropped():
    def body(buffer, rank):
        kept.append(weakref.ref(Buffer(None, comm=ThreadComm(0, [None], threading.Barrier(1)))))

    kept = []
    gc.disable()  # it is no part of a cycle
    try:
        body(None, 0)
        assert kept[0]() is None
    finally:
        gc.enable()


SCRIPT = """
import torch
import torch.distributed as dist
import deep_ep
from deep_ep import Buffer
from deep_ep.utils import EventOverlap
import deep_ep.buffer

dist.init_process_group("gloo")
buffer = Buffer(dist.group.WORLD, 1 << 20, 0)
ids = torch.tensor([[0, 3], [2, -1]]) if dist.get_rank() == 0 else torch.tensor([[1, -1]])
x = torch.arange(len(ids) * 64).reshape(len(ids), 64).to(torch.bfloat16) + dist.get_rank()
ranks, _, experts, inside, event = buffer.get_dispatch_layout(ids, 4)
rows, idx, weights, counts, handle, event = buffer.dispatch(
    x, num_tokens_per_rank=ranks, is_token_in_rank=inside, num_tokens_per_expert=experts,
    topk_idx=ids, topk_weights=torch.ones(ids.shape))
home, _, _ = buffer.combine(rows, handle)
copies = torch.tensor([2, 1]) if dist.get_rank() == 0 else torch.tensor([1])
assert torch.equal(home, x * copies[:, None])
assert counts == ([1, 1] if dist.get_rank() == 0 else [1, 1]), counts
print("rank", dist.get_rank(), "ok", deep_ep.__version__)
dist.destroy_process_group()  # gloo's threads may abort a process that ends without
"""


def test_a_script_runs_unchanged(tmp_path, unused_port):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    jobs = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=str(unused_port))
        jobs.append(subprocess.Popen(
            [sys.executable, "-m", "expertwire.deep_ep", "run", str(script)], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for rank, job in enumerate(jobs):
        out, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
        assert f"rank {rank} ok" in out


def test_install_never_replaces_another(tmp_path):
    """In a folder that stands for site-packages."""
    code = ("import pathlib, sys; sys.path.insert(0, %r); sys.argv = ['deep_ep', %r]\n"
            "import expertwire.deep_ep.__main__ as command\n"
            "command._shim = lambda: pathlib.Path(sys.path[0]) / 'deep_ep.py'\n"
            "sys.exit(command.main())")

    def call(what):
        return subprocess.run([sys.executable, "-c", code % (str(tmp_path), what)],
                              capture_output=True, text=True)

    assert call("install").returncode == 0
    use = subprocess.run(
        [sys.executable, "-c", "import deep_ep, deep_ep.utils; print(deep_ep.Buffer.__module__)"],
        env=dict(os.environ, PYTHONPATH=str(tmp_path)), capture_output=True, text=True, check=True)
    assert use.stdout.strip() == "expertwire.deep_ep.buffer"
    assert call("install").returncode == 0
    assert call("uninstall").returncode == 0 and not list(pathlib.Path(tmp_path).glob("deep_ep*.py"))
    assert call("uninstall").returncode == 1
    (tmp_path / "deep_ep.py").write_text("theirs = True\n")
    refused = call("install")
    assert refused.returncode == 1 and "uninstall it first" in refused.stderr
    assert call("uninstall").returncode == 1 and (tmp_path / "deep_ep.py").exists()
