"""The log-sum-exp of every algorithm, and its gradient, against dense attention in fp64."""

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import build_attention
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.topology import CPTopology
from unit_tests.dense import causal_mask
from unit_tests.ring_cases import case_on, grid_name, virtual_attention
from unit_tests.ulysses_cases import inputs, shard_of

GRIDS = [
    CPTopology(),
    CPTopology(ulysses=3),
    CPTopology(inner=3),
    CPTopology(outer=2, inner=2),
    CPTopology(inner=2, ulysses=2),
]


def dense_with_lse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    repeats = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeats, 1).mT / q.size(-1) ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    # A row that sees no key is not NaN, and has no gradient.
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    lse = scores.masked_fill(dead, 0.0).logsumexp(dim=-1).masked_fill(dead[..., 0], -torch.inf)
    probs = (scores - lse.masked_fill(dead[..., 0], 0.0).unsqueeze(-1)).exp().masked_fill(dead, 0.0)
    return probs @ v.repeat_interleave(repeats, 1), lse


@pytest.mark.parametrize("mask", ["causal", "full", "per head"])
@pytest.mark.parametrize("topology", GRIDS, ids=grid_name)
@pytest.mark.parametrize("value_head_size", [8, 12])
def test_log_sum_exp_and_its_gradient_are_those_of_dense_attention(topology, mask, value_head_size):
    case = case_on(topology, mask=mask, heads=4, kv_heads=2, batch=2, value_head_size=value_head_size, overlap=True)
    q, k, v, dout, visible = inputs(case)
    visible = causal_mask(q.size(2)) if mask == "causal" else visible
    dlse = torch.randn(q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = dense_with_lse(*whole, visible)
    seen = lse > -torch.inf
    exact = [out, lse, *torch.autograd.grad((out * dout).sum() + (lse * dlse)[seen].sum(), whole)]
    world = VirtualWorld(case.size)

    def on_rank(rank: int) -> list[Tensor]:
        shards = [shard_of(case, x, rank).requires_grad_() for x in (q, k, v)]
        rows = None
        if visible is not None and mask != "causal":
            rows = case.sequence_layout.shard(visible, rank, dim=-2)
        out, lse = virtual_attention(case, world, rank).with_lse(*shards, visible=rows)
        of_lse = shard_of(case, dlse.unsqueeze(-1), rank).squeeze(-1).masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad((out, lse), shards, (shard_of(case, dout, rank), of_lse))
        return [out, lse, *grads]

    for rank, actual in enumerate(world.run(on_rank)):
        for name, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, strict=True):
            expected = shard_of(case, theirs.unsqueeze(-1) if theirs.dim() == 3 else theirs, rank)
            expected = expected.squeeze(-1) if theirs.dim() == 3 else expected
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12, msg=f"{name} of rank {rank}")


def test_a_loss_of_the_log_sum_exp_alone_has_gradients_and_one_without_gradients_sends_no_more():
    attention = build_attention(ContextParallelConfig())
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lse = attention.with_lse(q, k, v)[1]
    exact = dense_with_lse(q, k, v, causal_mask(6))[1]
    for mine, theirs in zip(
        torch.autograd.grad(lse.sum(), (q, k)), torch.autograd.grad(exact.sum(), (q, k)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        out, plain = attention.with_lse(q, k, v)
    assert torch.equal(out, attention(q, k, v))
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-12)


def test_an_empty_batch_has_an_empty_log_sum_exp():
    q = torch.zeros(0, 2, 6, 8, requires_grad=True)
    out, lse = build_attention(ContextParallelConfig()).with_lse(q, q, q)
    assert (out.shape, lse.shape) == ((0, 2, 6, 8), (0, 2, 6))
    (out.sum() + lse.sum()).backward()
    assert q.grad.shape == q.shape
