"""Gradients of sinks and slopes that are summed over the context-parallel ranks."""

from dataclasses import replace

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms, build_attention, local_attention
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.comm.reduction import all_reduce_numbers
from mindspeed_cp.sharding import SequenceLayout
from unit_tests.call_cases import ALGORITHMS, agreeing_attention
from unit_tests.ring_cases import case_on

HEADS, TOKENS = 4, 16


def gradients(attention, shard, dtype=torch.float64) -> list[torch.Tensor]:
    """Of sinks and slopes."""
    generator = torch.Generator().manual_seed(2)
    q, k, v, dout = (
        shard(torch.randn(2, HEADS, TOKENS, 8, generator=generator, dtype=torch.float64)) for _ in range(4)
    )
    sinks, slopes = (torch.randn(HEADS, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    out = attention(q, k, v, terms=AttentionTerms(sinks=sinks, alibi_slopes=slopes))
    return list(torch.autograd.grad((out * dout).sum(), [sinks, slopes]))


def on_ranks(algorithm: str, function) -> list:
    """What `function(attention, rank, communicator)` gives on each, attention being one that sums."""
    case = case_on(ALGORITHMS[algorithm])
    world = VirtualWorld(case.size, 30.0)

    def on_rank(rank):
        communicator = VirtualCommunicator(world, range(case.size), rank, "parameters")
        attention = replace(agreeing_attention(case, world, rank), parameters=communicator)
        return function(attention, lambda x: case.sequence_layout.shard(x, rank, dim=2)), communicator.traffic

    return world.run(on_rank)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_rank_has_the_whole_gradient_in_one_message(algorithm):
    expected = gradients(local_attention(causal=True), lambda x: x)
    for found, traffic in on_ranks(algorithm, gradients):
        for x, y in zip(expected, found, strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
        assert sum(traffic.bytes_sent.values()) == 8 * all_reduce_numbers(2 * HEADS, 4)


def test_the_sum_is_rounded_once():
    def in_bfloat16(attention, shard):
        return gradients(attention, shard, torch.bfloat16)

    expected = in_bfloat16(local_attention(causal=True), lambda x: x)
    for found, _ in on_ranks("ring", in_bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def over_gloo(group, layout: SequenceLayout) -> list[torch.Tensor]:
    config = case_on(ALGORITHMS["ring"]).config
    attention = build_attention(config, group, reduce_parameters=True)
    return gradients(attention, lambda x: layout.shard(x, attention.attention.attention.rank, dim=2))


def test_over_gloo_every_rank_has_the_bits_of_virtual_ranks(gloo):
    expected = on_ranks("ring", gradients)[0][0]
    for found in gloo.run(4, over_gloo, SequenceLayout(size=4)):
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
