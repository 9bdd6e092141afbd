"""The package expertwire over arrays of torch and NumPy, every value against plain torch."""

import gc
import pathlib
import pickle
import subprocess
import sys
import threading
import time
import weakref

import numpy
import oracle
import pytest
import torch

import expertwire as ew

SHAPE = dict(hidden=64, experts=12, top_k=3, max_tokens=9)


def all_inputs(ranks, step, **changes):
    return [oracle.draw(rank, step, **{**SHAPE, **changes}) for rank in range(ranks)]


def as_numpy(inputs):
    return [a.numpy() for a in (inputs.x, inputs.topk_idx, inputs.topk_weights)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_latency(ranks, dtype):
    def body(c):
        with ew.LowLatency(c, dtype=dtype, lanes=2, **SHAPE) as ll:
            for step in range(7):
                inputs = all_inputs(ranks, step, dtype=dtype)
                mine = inputs[c.rank]
                late = step % 2 == 1  # weights come with combine
                sent = ll.dispatch(mine.x, mine.topk_idx, None if late else mine.topk_weights,
                                   send_only=step == 2)
                if step == 2:
                    ll.receive(sent.handle)
                local = SHAPE["experts"] // ranks
                y = torch.full_like(sent.x, float("nan"))
                for e in range(local):
                    number = c.rank * local + e
                    due = oracle.expert_major(inputs, number)
                    assert int(sent.tokens_per_expert[e]) == len(due)
                    for row, (source, token) in enumerate(due):
                        assert torch.equal(sent.x[e, row], inputs[source].x[token])
                        assert int(sent.source_tokens[e, row]) == token
                        y[e, row] = oracle.expert(number, sent.x[e, row])
                    for source in range(ranks):
                        rows, first = sent.ranges[e, source].tolist()
                        assert rows == sum(s == source for s, _ in due)
                        assert rows == 0 or due[first][0] == source
                bias = torch.randn(mine.x.shape).to(dtype) if step % 3 == 0 else None
                out = ll.combine(y, sent.handle, bias=bias,
                                 topk_weights=mine.topk_weights if late else None)
                assert torch.equal(
                    out, oracle.combine(mine, SHAPE["experts"], ranks, oracle.expert, bias))
            assert ll.status().error is None

    ew.run_in_process(ranks, body)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_high_throughput(ranks, pool, dtype):
    local = SHAPE["experts"] // ranks

    def body(c):
        pool_rows = ew.EVERY_ROW if pool else 0
        with ew.HighThroughput(c, dtype=dtype, pool_rows=pool_rows, ring_frames=2, **SHAPE) as ht:
            for step in range(6):
                inputs = all_inputs(ranks, step, dtype=dtype)
                mine = inputs[c.rank]
                due = oracle.token_major(inputs, c.rank, SHAPE["experts"])
                capacity = min(len(due) + 2, 9 * ranks) if step % 3 == 2 else None
                sent = ht.dispatch(mine.x, mine.topk_idx, mine.topk_weights, pool=pool,
                                   capacity=capacity)
                assert int(sent.needed_rows[0]) == len(due)
                assert len(sent.x) == (len(due) if capacity is None else capacity)
                y = torch.zeros_like(sent.x)
                for row, (source, token) in enumerate(due):
                    ids = inputs[source].topk_idx[token]
                    here = (ids >= 0) & (ids // local == c.rank)
                    assert torch.equal(sent.x[row], inputs[source].x[token])
                    assert int(sent.source_tokens[row]) == token
                    assert torch.equal(sent.topk_experts[row],
                                       torch.where(here, ids % local, -1).int())
                    assert torch.equal(sent.topk_weights[row],
                                       torch.where(here, inputs[source].topk_weights[token], 0.0))
                    acc = torch.zeros(SHAPE["hidden"])
                    for k in range(SHAPE["top_k"]):
                        if here[k]:
                            acc = oracle.fma(acc, sent.topk_weights[row, k],
                                             oracle.expert(int(ids[k]), sent.x[row]))
                    y[row] = acc.to(dtype)
                home = ht.combine(y, sent.handle, topk_weights=sent.topk_weights.clone())
                assert torch.equal(home.out,
                                   oracle.combine(mine, SHAPE["experts"], ranks, oracle.expert))
                assert torch.equal(home.topk_weights,
                                   torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0))
                again = ht.dispatch(mine.x, cached=sent.handle)
                assert len(again.x) == len(sent.x)
                assert torch.equal(again.x[:len(due)], torch.stack(
                    [inputs[s].x[t] for s, t in due]) if due else again.x[:0])

    ew.run_in_process(ranks, body)


def test_numpy_arrays_come_back_as_numpy():
    def body(c):
        inputs = all_inputs(2, 1, dtype=torch.float32)
        x, ids, weights = as_numpy(inputs[c.rank])
        with ew.LowLatency(c, dtype="float32", **SHAPE) as ll:
            sent = ll.dispatch(x, ids, weights)
            assert isinstance(sent.x, numpy.ndarray) and sent.x.dtype == numpy.float32
            out = ll.combine(sent.x.copy(), sent.handle)
            want = oracle.combine(inputs[c.rank], SHAPE["experts"], 2, lambda e, row: row)
            assert numpy.array_equal(out, want.numpy())
        with ew.HighThroughput(c, dtype=numpy.dtype("float32"), pool_rows=ew.EVERY_ROW, **SHAPE) as ht:
            sent = ht.dispatch(x, ids, weights, pool=True)
            assert isinstance(sent.x, numpy.ndarray)
            ht.release(sent.handle)

    ew.run_in_process(2, body)


def test_fp8_rows_and_scales():
    shape = {**SHAPE, "hidden": 256}

    def body(c):
        inputs = all_inputs(2, 4, hidden=256)
        mine = inputs[c.rank]
        with ew.LowLatency(c, **shape) as ll:
            sent = ll.dispatch(mine.x, mine.topk_idx, cast_to_fp8=True)
            assert sent.x.dtype == torch.float8_e4m3fn and sent.scales.shape[-1] == 2
            for e in range(6):
                for row, (source, token) in enumerate(
                        oracle.expert_major(inputs, c.rank * 6 + e)):
                    want = inputs[source].x[token].float().view(2, 128)
                    most = want.abs().amax(1).clamp(1e-4)
                    assert torch.equal(sent.scales[e, row], most / 448)
                    up = torch.full_like(most, 448) / most  # `448 / most` is rounded twice
                    codes = (want * up[:, None]).to(torch.float8_e4m3fn)
                    assert torch.equal(sent.x[e, row].view(2, 128).float(), codes.float())

    ew.run_in_process(2, body)


def test_outputs_and_allocator_of_the_caller():
    def body(c):
        mine = all_inputs(2, 0)[c.rank]
        asked = []

        def give(name, dtype, shape):
            asked.append((name, dtype, shape))
            return torch.empty(shape, dtype=getattr(torch, {"bf16": "bfloat16"}.get(dtype, dtype)))

        with ew.LowLatency(c, **SHAPE) as ll:
            first = ll.dispatch(mine.x, mine.topk_idx, allocator=give)
            assert ("x", "bf16", (6, 18, 64)) in asked and len(asked) == 4
            given = dict(x=first.x, tokens_per_expert=first.tokens_per_expert, ranges=first.ranges,
                         source_tokens=first.source_tokens)
            second = ll.dispatch(mine.x, mine.topk_idx, out=given)
            assert second.x is first.x
            out = torch.empty_like(mine.x)
            assert ll.combine(second.x.clone(), second.handle, out=out) is out
            ll.combine(first.x.clone(), first.handle)

            def wrong(name, dtype, shape):
                return torch.empty((3,), dtype=torch.int32)

            with pytest.raises(ew.InvalidArgument, match="the allocator gave int32"):
                ll.dispatch(mine.x, mine.topk_idx, allocator=wrong)

            def raises(name, dtype, shape):
                raise KeyError("out of memory here")

            with pytest.raises(KeyError, match="out of memory here"):
                ll.dispatch(mine.x, mine.topk_idx, allocator=raises)
            ll.combine(ll.dispatch(mine.x, mine.topk_idx).x.clone(), second.handle)  # goes on

    ew.run_in_process(2, body)


@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(4, 64, dtype=torch.float64)), "x has dtype float64"),
    (dict(x=torch.zeros(4, 128).bfloat16()[:, ::2]), "strides"),
    (dict(x="rows"), "x is a str"),
    (dict(topk_idx=torch.zeros(3, 3, dtype=torch.int64)), r"topk_idx is int64 \[3, 3\]"),
    (dict(topk_weights=torch.zeros(4, 3).half()), "topk_weights is fp16"),
    (dict(out={"y": None}), "out has 'y'; its names are x, tokens_per_expert"),
    (dict(timeout=-1.0), "timeout is -1"),
    (dict(stream="left"), "stream must be"),
    (dict(experts="many"), "experts is 'many'; it must be an integer"),
    (dict(sms=2**40), "sms is 1099511627776; it must be an integer that fits"),
    (dict(out=[1, 2]), "out is a list; it must be a dict"),
])
def test_bad_arguments_are_named_and_change_nothing(change, words):
    def body(c):
        arguments = dict(x=torch.zeros(4, 64).bfloat16(), topk_idx=torch.arange(3).repeat(4, 1))
        with ew.LowLatency(c, **SHAPE) as ll:
            with pytest.raises(ew.InvalidArgument, match=words):
                ll.dispatch(**{**arguments, **change})
            with pytest.raises(ew.InvalidArgument, match="handle is a str"):
                ll.combine(arguments["x"], "handle")
            sent = ll.dispatch(**arguments)
            assert sent.tokens_per_expert.tolist()[:4] == [4, 4, 4, 0]

    ew.run_in_process(1, body)


def test_errors_have_fields_and_can_be_pickled():
    def body(c):
        ll = ew.LowLatency(c, **SHAPE)
        if c.rank == 1:
            time.sleep(0.05)
            return
        with pytest.raises(ew.PeerLost) as caught:
            ll.dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 3, dtype=torch.int64))
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.rank, again.peer, str(again)) == (0, 1, str(caught.value))
        assert again.phase != ""
        assert isinstance(ll.status().error, ew.PeerLost)
        with pytest.raises(ew.FailedEarlier):
            ll.dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 3, dtype=torch.int64))

    ew.run_in_process(2, body)


def test_waits_let_other_threads_run():
    """A rank that waits for another holds no lock of the interpreter."""
    ticks = []

    def body(c):
        with ew.LowLatency(c, **SHAPE) as ll:
            if c.rank == 1:
                for _ in range(20):
                    ticks.append(time.monotonic())
                    time.sleep(0.005)
            ll.dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 3, dtype=torch.int64))

    ew.run_in_process(2, body)
    assert len(ticks) == 20


def test_closed_objects_say_so_and_objects_may_be_dropped():
    def body(c):
        before = threading.active_count()
        for _ in range(30):
            ll = ew.LowLatency(c, **SHAPE)
            ht = ew.HighThroughput(c, **SHAPE)
        ll.close()
        ll.close()
        with pytest.raises(ew.InvalidUsage, match="closed"):
            ll.status()
        del ht, ll
        gc.collect()
        assert threading.active_count() <= before

    ew.run_in_process(2, body)


def test_objects_may_be_left_to_the_end_of_the_program():
    text = """
import torch, expertwire as ew
c = ew.Communicator.from_all_gather(0, 1, lambda mine: [mine])
ht = ew.HighThroughput(c, hidden=64, experts=2, top_k=1, max_tokens=8,
                       pool_rows=8)
sent = ht.dispatch(torch.zeros(2, 64).bfloat16(), torch.zeros(2, 1, dtype=torch.int64), pool=True)
"""
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert said.stdout + said.stderr == ""


def test_every_class_of_error_says_its_message_and_fields():
    kinds = [ew.CapacityError, ew.FailedEarlier, ew.InvalidArgument, ew.InvalidUsage, ew.Mismatch,
             ew.PeerLost, ew.Refused, ew.SystemFailure, ew.Timeout, ew.Unsupported]
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("a message", 1, 2, "counts")))
        assert type(error) is kind and isinstance(error, ew.Error)
        assert (str(error), error.rank, error.peer, error.phase) == ("a message", 1, 2, "counts")


def test_read_only_arrays_are_read_only():
    def body(c):
        x, ids, weights = as_numpy(all_inputs(1, 4, dtype=torch.float32)[0])
        out = numpy.empty_like(x)
        for array in (x, ids, weights, out):
            array.flags.writeable = False
        with ew.LowLatency(c, dtype="float32", **SHAPE) as ll:
            sent = ll.dispatch(x, ids, weights)
            with pytest.raises(ew.InvalidArgument, match="out is read-only"):
                ll.combine(sent.x.copy(), sent.handle, out=out)
            ll.combine(sent.x.copy(), sent.handle)

    ew.run_in_process(1, body)


def test_what_is_queued_keeps_its_arrays():
    def body(c):
        queue = ew.Queue()
        with ew.LowLatency(c, **SHAPE) as ll:
            for step in range(20):
                mine = all_inputs(2, 4 * step)[c.rank]
                out = torch.empty_like(mine.x)
                sent = ll.dispatch(mine.x.clone(), mine.topk_idx.clone(), mine.topk_weights.clone(),
                                   stream=queue)
                ll.combine(sent.x, sent.handle, out=out, stream=queue)
                del sent
                torch.full((1 << 12,), float("nan"))  # takes what has been let go
                if step % 2:
                    queue.synchronize()
                    assert torch.equal(out, oracle.combine(mine, 12, 2, lambda e, row: row))
        del queue

    ew.run_in_process(2, body)


@pytest.mark.parametrize("queued", [False, True])
def test_halves_keep_their_arrays(queued):
    def body(c):
        queue = ew.Queue() if queued else None
        with ew.LowLatency(c, **SHAPE) as ll:
            for step in range(0, 40, 4):
                mine = all_inputs(2, step)[c.rank]
                sent = ll.dispatch(mine.x.clone(), mine.topk_idx.clone(), mine.topk_weights.clone(),
                                   stream=queue, send_only=True)
                handle, x = sent.handle, weakref.ref(sent.x)
                del sent
                gc.collect()
                assert x() is not None
                ll.receive(handle, queue)
                if queued:
                    queue.synchronize()
                assert ll._open == []
                sent = ll.dispatch(mine.x, mine.topk_idx, mine.topk_weights, stream=queue)
                out = ll.combine(sent.x, sent.handle, stream=queue, send_only=True)
                ll.receive(sent.handle, queue)
                if queued:
                    queue.synchronize()
                assert torch.equal(out, oracle.combine(mine, 12, 2, lambda e, row: row))

    ew.run_in_process(2, body)


def test_work_in_a_queue():
    def body(c):
        mine = all_inputs(2, 0)[c.rank]
        queue = ew.Queue()
        with ew.LowLatency(c, **SHAPE) as ll:
            sent = ll.dispatch(mine.x, mine.topk_idx, mine.topk_weights, stream=queue)
            out = ll.combine(sent.x, sent.handle, stream=queue)
            queue.synchronize()
            assert torch.equal(out, oracle.combine(mine, 12, 2, lambda e, row: row))

    ew.run_in_process(2, body)


def test_dispatch_layout():
    ids = torch.tensor([[0, 5, -1], [5, 4, 4], [-1, -1, -1], [9, 0, 1]])
    layout = ew.dispatch_layout(ids, 12, 3)
    assert layout.tokens_per_rank == [2, 2, 1]
    assert layout.tokens_per_expert == [2, 1, 0, 0, 2, 2, 0, 0, 0, 1, 0, 0]
    assert list(layout.is_token_in_rank) == [1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1]
    assert layout.invalid_ids == 0


def test_import_is_light():
    text = ("import sys, time; t = time.perf_counter(); import expertwire; "
            "print(time.perf_counter() - t, 'torch' in sys.modules, 'numpy' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert said.stdout.split()[1:] == ["False", "False"]


def test_settings_of_a_communicator():
    def alone(**settings):
        return ew.Communicator.from_all_gather(0, 1, lambda mine: [mine], **settings)

    with alone(cuda_device=None, arena_bytes=1 << 24, ranks_per_node=1, staged_pairs="all",
               timeout=2.5) as c:
        assert c.timeout == 2.5 and c.nodes == 1 and c.staged_pair is None
    with pytest.raises(TypeError, match="no argument 'arena'; there are cuda_device, arena_bytes"):
        alone(arena=1)


PROGRAM = """
import sys, torch, torch.distributed as dist, expertwire as ew
rank, size, port = map(int, sys.argv[1:])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
with ew.Communicator.from_process_group() as c:
    assert (c.rank, c.size, c.path(1 - rank)[0]) == (rank, size, "mapped")
    with ew.HighThroughput(c, hidden=64, experts=4, top_k=1, max_tokens=8) as ht:
        x = torch.full((3, 64), float(rank)).bfloat16()
        sent = ht.dispatch(x, torch.tensor([[0], [2], [3]]))
        assert sent.rows_per_source == ([1, 1] if rank == 0 else [2, 2]), sent.rows_per_source
        assert torch.equal(ht.combine(sent.x, sent.handle).out, x)
dist.destroy_process_group()
"""


def test_over_a_process_group(unused_port):
    ranks = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), "2", str(unused_port)])
             for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]


def test_the_example_runs():
    path = pathlib.Path(__file__).parents[2] / "examples" / "moe_layer.py"
    said = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    lines = said.stdout.splitlines()
    assert [line[:6] for line in lines] == ["rank 0", "rank 1"]
    assert all(float(line.rsplit(" ", 1)[1].rstrip("%")) < 1 for line in lines)
