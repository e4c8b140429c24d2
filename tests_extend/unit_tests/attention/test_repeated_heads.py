"""K/V heads that kernels are given more than once: sent, kept and saved once each, and their gradients added."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, Recomputation, UlyssesAttention
from mindspeed_cp.attention.repeated_heads import Repetition, added, repeated
from mindspeed_cp.comm import Traffic, VirtualWorld
from mindspeed_cp.testing.rank_pool import LIMIT_S
from mindspeed_cp.topology import CPTopology
from unit_tests.call_cases import run_virtually
from unit_tests.dense import causal_mask, dense_attention
from unit_tests.ring_cases import TRAFFIC, case_on, virtual_attention

TOKENS, SIZE, VALUE_SIZE = 4, 8, 12
"""Of a rank; and head sizes."""
READ_BY_A_RANK = 2
"""K/V heads, of 12 query heads over 3 on two ranks: 0 0 0 0 1 1 | 1 1 2 2 2 2."""


def inputs(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    sizes = ((12, SIZE), (3, SIZE), (3, VALUE_SIZE))
    return [
        torch.randn(1, heads, TOKENS, size, generator=generator, dtype=torch.float64).requires_grad_()
        for heads, size in sizes
    ]


def saved_and_kept(attention: Any, rank: int) -> tuple[int, int]:
    """Bytes of the storages that a call saves for its backward pass, and that it leaves to a recomputation."""
    recomputation, storages = Recomputation(), dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = inputs(rank)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(q, k, v)
    inside = attention.attention
    keeping = replace(attention, attention=replace(inside, ring=replace(inside.ring, recomputation=recomputation)))
    out = recomputation.around(torch.utils.checkpoint.checkpoint)(keeping, q, k, v, use_reentrant=False)
    kept = recomputation.nbytes
    del out
    return sum(storages.values()), kept


def test_a_head_that_is_given_twice_is_saved_and_kept_once():
    world, case = VirtualWorld(2, LIMIT_S), case_on(CPTopology(ulysses=2))
    tokens = 2 * TOKENS
    exchanged = 6 * SIZE + READ_BY_A_RANK * (SIZE + VALUE_SIZE) + 6 * VALUE_SIZE + 6
    came_back = 12 * VALUE_SIZE * TOKENS
    expected = 8 * tokens * exchanged, 8 * (tokens * exchanged + came_back)
    assert world.run(lambda rank: saved_and_kept(virtual_attention(case, world, rank), rank)) == [expected] * 2


@pytest.mark.parametrize("policy", [None, "full"])
def test_a_ring_sends_and_keeps_each_head_once(policy):
    case = case_on(CPTopology(inner=2, ulysses=2), kv_cache_policy=policy)
    world, block = VirtualWorld(4, LIMIT_S), 2 * TOKENS * READ_BY_A_RANK * (SIZE + VALUE_SIZE) * 8

    def on_rank(rank: int) -> tuple[int, int]:
        traffic = {kind: Traffic() for kind in TRAFFIC}
        attention = virtual_attention(case, world, rank, traffic=traffic)
        out, inner = attention(*inputs(rank)), traffic["inner"].bytes_sent
        forward = sum(inner.values())
        out.sum().backward()
        return forward, sum(inner.values()) - forward

    # Of the first group's block the early half is seen, in a ring of two.
    assert world.run(on_rank) == [(block // 2, 0 if policy else block // 2)] * 2 + [(block, 0 if policy else block)] * 2


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("topology", [CPTopology(ulysses=2), CPTopology(inner=2, ulysses=2)], ids=str)
def test_heads_that_are_given_twice_have_the_gradients_of_dense_attention(topology, pieces):
    case = case_on(topology, layout="contiguous", pieces=pieces, tokens=TOKENS)
    shards = [inputs(rank) for rank in range(topology.size)]
    whole = [torch.cat([x.detach() for x in parts], dim=2) for parts in zip(*shards, strict=True)]
    dout = torch.ones(1, 12, TOKENS * topology.size, VALUE_SIZE, dtype=torch.float64)
    exact = dense_attention(*whole, dout, visible=causal_mask(dout.size(2)))

    def on_rank(attention: ContextParallelAttention, rank: int) -> list[Tensor]:
        inside = attention.attention.attention
        assert isinstance(inside, UlyssesAttention) and inside.ring.pieces == pieces
        q, k, v = shards[rank]
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]

    found = [torch.cat(parts, dim=2) for parts in zip(*run_virtually(case, on_rank), strict=True)]
    for actual, expected in zip(found, (exact.out, exact.dq, exact.dk, exact.dv), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_head_are_added_in_fp32():
    x = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    assert added(x, (0, 0, 0)).item() == 258.0
    assert torch.equal(repeated(added(x, (0, 1, 1)), (1, 0)).flatten(), torch.tensor([2.0, 256.0]))
    assert Repetition((0, 0)).gradients() == ()


def test_which_heads_are_repeated_is_copied_to_the_device_once():
    with torch.inference_mode():
        repeated(torch.ones(1, 3, 1, 1), (2, 0, 2, 1))  # What it leaves is for training too.
    x = torch.ones(1, 3, 1, 1, requires_grad=True)
    with mock.patch.object(torch, "tensor", side_effect=AssertionError("a copy")):
        for _ in range(3):
            added(repeated(x, [2, 0, 2, 1]), (2, 0, 2, 1)).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [3.0, 3.0, 6.0]
