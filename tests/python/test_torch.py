"""expertwire.torch: values and gradients, against the same layer without ranks."""

import pytest
import torch
from torch import nn

import expertwire as ew
from expertwire.torch import MoELayer, combine, dispatch

HIDDEN, EXPERTS, TOP_K = 32, 12, 3


def expert(number):
    torch.manual_seed(100 + number)
    return nn.Sequential(nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, HIDDEN))


def tokens_of(rank, step):
    g = torch.Generator().manual_seed(10 * step + rank)
    count = 0 if (step, rank) == (2, 0) else 5 + (step + rank) % 4
    return torch.randn(count, HIDDEN, generator=g), torch.randn(count, HIDDEN, generator=g)


class Dense(nn.Module):
    """The same layer in one place."""

    def __init__(self, router):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.router.load_state_dict(router)
        self.experts = nn.ModuleList(expert(e) for e in range(EXPERTS))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(1).topk(TOP_K)
        every = torch.stack([e(x) for e in self.experts], 1)
        picked = every.gather(1, chosen.unsqueeze(2).expand(-1, -1, HIDDEN))
        return (weights.unsqueeze(2) * picked).sum(1)


def loss_of(layer, x, target):
    return ((layer(x) - target) ** 2).sum()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_trained_layer_equals_the_dense_one(ranks):
    torch.manual_seed(1)
    router = nn.Linear(HIDDEN, EXPERTS, bias=False).state_dict()
    local = EXPERTS // ranks
    steps = 5

    dense = Dense(router)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.01)
    grads = []
    for step in range(steps):
        optimizer.zero_grad()
        inputs = [tokens_of(rank, step) for rank in range(ranks)]
        x = torch.cat([a for a, _ in inputs]).requires_grad_()
        loss_of(dense, x, torch.cat([b for _, b in inputs])).backward()
        grads.append((x.grad, dense.router.weight.grad.clone(),
                      [e[0].weight.grad.clone() for e in dense.experts]))
        optimizer.step()

    made = [expert(e) for e in range(EXPERTS)]  # threads share torch's seeds

    def body(c):
        with ew.HighThroughput(c, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K,
                               dtype="float32", ring_frames=2) as exchange:
            layer = MoELayer(c, exchange, HIDDEN, EXPERTS, TOP_K, lambda e: made[e])
            layer.router.load_state_dict(router)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
            for step in range(steps):
                optimizer.zero_grad()
                x, target = tokens_of(c.rank, step)
                x.requires_grad_()
                loss_of(layer, x, target).backward()
                mine = layer.router.weight.grad.numpy().tobytes()
                parts = [torch.frombuffer(bytearray(part), dtype=torch.float32)
                         for part in c.all_gather(mine)]
                layer.router.weight.grad.copy_(sum(parts).reshape(EXPERTS, HIDDEN))
                want_x, want_router, want_experts = grads[step]
                first = sum(len(tokens_of(r, step)[0]) for r in range(c.rank))
                torch.testing.assert_close(x.grad, want_x[first:first + len(x)])
                torch.testing.assert_close(layer.router.weight.grad, want_router)
                for e in range(local):
                    torch.testing.assert_close(layer.experts[e][0].weight.grad,
                                               want_experts[c.rank * local + e])
                optimizer.step()
            for e in range(local):
                torch.testing.assert_close(layer.experts[e][2].weight,
                                           dense.experts[c.rank * local + e][2].weight)
            torch.testing.assert_close(layer.router.weight, dense.router.weight)

    ew.run_in_process(ranks, body)


def test_gradients_of_each_operation():
    """Exact: sums of few values in fp32."""
    def body(c):
        x, _ = tokens_of(c.rank, 1)
        x.requires_grad_()
        idx = torch.randint(-1, EXPERTS, (len(x), 2), generator=torch.Generator().manual_seed(c.rank))
        weights = torch.rand(len(x), 2).requires_grad_()
        bias = torch.randn(len(x), HIDDEN).requires_grad_()
        with ew.HighThroughput(c, hidden=HIDDEN, experts=EXPERTS, top_k=2, dtype="float32") as layer:
            sent = dispatch(layer, x, idx, weights)
            assert not sent.topk_experts.requires_grad and sent.x.requires_grad
            out = combine(layer, sent.x * 2, sent, bias)
            (out * 3).sum().backward(retain_graph=True)
            ranks = [len({e // 4 for e in chosen if e >= 0}) for chosen in idx.tolist()]
            want = torch.tensor(ranks).float().unsqueeze(1) * 6
            assert torch.equal(x.grad, want.expand_as(x))
            assert torch.equal(bias.grad, torch.full_like(bias, 3.0))
            assert torch.equal(weights.grad, torch.zeros_like(weights))
            x.grad = None
            (sent.topk_weights * 5).sum().backward()
            assert torch.equal(weights.grad, torch.where(idx >= 0, 5.0, 0.0))

    ew.run_in_process(3, body)
