"""A Mixture-of-Experts layer over a few ranks, on a laptop: python examples/moe_layer.py"""

import torch

import expertwire

HIDDEN, EXPERTS, TOP_K, RANKS = 64, 8, 2, 2


def layer(communicator):
    local = EXPERTS // communicator.size
    random = torch.Generator().manual_seed(communicator.rank)  # ranks are threads here
    x = torch.randn(5, HIDDEN, generator=random).bfloat16()
    weights, chosen = torch.randn(5, EXPERTS, generator=random).softmax(1).topk(TOP_K)

    with expertwire.HighThroughput(communicator, hidden=HIDDEN, experts=EXPERTS, top_k=TOP_K,
                                   max_tokens=5) as layer:
        sent = layer.dispatch(x, chosen, weights)
        y = torch.zeros_like(sent.x)
        for e in range(local):  # expert e of this rank multiplies by 1, 2, 3, ...
            here = (sent.topk_weights * (sent.topk_experts == e)).sum(1, keepdim=True)
            y += (here * sent.x * (communicator.rank * local + e + 1)).bfloat16()
        out = layer.combine(y, sent.handle).out

    want = x.float() * ((chosen + 1) * weights).sum(1, keepdim=True)
    return (f"rank {communicator.rank}: {len(sent.x)} rows came, "
            f"largest difference {(out - want).abs().max() / want.abs().max():.1%}")


if __name__ == "__main__":
    for line in expertwire.run_in_process(RANKS, layer):
        print(line)
