"""Pass-Q in pieces of the heads, and with a bias whose rows travel."""

from dataclasses import replace

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.comm import Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import pass_q_bytes, prefill_plan, prefix_attention, ring_pass_q_attention, take
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.plan import CAUSAL, Band
from mindspeed_cp.program import Transport
from unit_tests.inference.prefill_cases import PrefillCase, assert_new_tokens_equal, attend, dense, inputs, plan_of
from unit_tests.inference.test_prefill import counting


def columns_of(case, bias):
    """A bias of all positions [1 or B, 1 or N, T, T] as wide as the plan's keys; NaN where a sequence has none."""
    plan = plan_of(case)
    columns = bias.new_full((*bias.shape[:3], sum(map(plan.keys.num_tokens, range(case.size)))), torch.nan)
    for sample, (new, cached) in enumerate(list(zip(case.new, case.cached, strict=True))[: bias.size(0)]):
        columns[sample, :, :, : new + cached] = bias[sample, :, :, : new + cached]
    return columns


def on_ranks(case, bias, traffics=None, **settings):
    """What each rank gets with its rows of the bias."""
    plan, whole, world = plan_of(case), inputs(case), VirtualWorld(case.size, 20.0)

    def on_rank(rank):
        mine = [take(x, layout, rank) for x, layout in zip(whole, (plan.queries, plan.keys, plan.keys), strict=True)]
        group = VirtualCommunicator(world, range(case.size), rank, "", traffics and traffics[rank])
        terms = AttentionTerms(bias=take(columns_of(case, bias), plan.queries, rank))
        return prefix_attention(
            *mine, plan=plan, communicator=group if case.size > 1 else None, terms=terms, **settings
        )

    return world.run(on_rank)


def bias_of(case, samples, heads):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(samples, heads, case.length, case.length, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("case", "heads", "pieces", "transport"),
    [
        (PrefillCase(3, (13,), (8,)), 4, 1, Transport.ROTATION),
        (PrefillCase(4, (9, 6, 0), (8, 15, 4)), 4, 2, Transport.ROTATION),
        (PrefillCase(3, (6, 11), (9, 0)), 1, 2, Transport.ROTATION),
        (PrefillCase(4, (16, 16), (0, 0), bands=(Band(2, 0),)), 4, 1, Transport.DIRECT),
        (PrefillCase(2, (5,), (20,), place="last rank"), 1, 1, None),
        (PrefillCase(1, (5,), (20,)), 4, 2, None),
    ],
    ids=["one sequence", "lengths, in pieces", "one for all heads", "window", "one holder", "one rank"],
)
def test_bias_goes_to_the_keys_with_its_queries(case, heads, pieces, transport):
    samples = 1 if len(set(case.new)) == len(set(case.cached)) == 1 else len(case.new)
    bias = bias_of(case, samples, heads)
    states = on_ranks(case, bias, strategy="pass_q", pieces=pieces, transport=transport)
    assert_new_tokens_equal(case, states, dense(case, bias=bias))


def test_bytes_of_a_bias_are_those_of_the_formula():
    case = PrefillCase(4, (9, 6, 1), (8, 15, 4))
    bias, traffics = bias_of(case, 3, 4), [Traffic() for _ in range(4)]
    on_ranks(case, bias, traffics, strategy="pass_q")
    plan, of = plan_of(case), TileCase.of(*inputs(case), TileTerms(1.0))
    for rank, traffic in enumerate(traffics):
        formula = pass_q_bytes(plan, rank, of, batch=3, bias=take(columns_of(case, bias), plan.queries, rank))
        assert formula.bias > 0
        assert traffic.bytes_sent["exchange"] == formula.carried
        assert traffic.bytes_sent["all_to_all"] == formula.home + formula.bias


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_pieces_send_the_bytes_of_the_whole_and_the_same_bits_with_and_without_overlap(pieces):
    found, whole = [], PrefillCase(4, (12, 5), (20, 41), kv_heads=4)
    of = TileCase.of(*inputs(whole), TileTerms(1.0))
    for overlap in False, True:
        settings = {"pieces": pieces, "overlap": overlap, "transport": Transport.ROTATION}
        case, traffics = replace(whole, settings=settings), [Traffic() for _ in range(4)]
        found.append(attend(case, ring_pass_q_attention, counting(traffics)))
        assert_new_tokens_equal(case, found[-1], dense(case))
        for rank, traffic in enumerate(traffics):
            formula = pass_q_bytes(plan_of(case), rank, of, batch=2, transport=Transport.ROTATION)
            assert traffic.bytes_sent.total() == sum(formula)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


def test_states_of_all_but_the_last_piece_leave_before_the_last_step_is_over():
    """What a rank sends is seen in the order of what its kernels compute."""
    told, size, pieces = [], 3, 2

    class Telling(VirtualCommunicator):
        def exchange_all(self, sends, receives):
            if self.rank == 0 and sends and sends[0].content.dim() == 4:
                told.append("home")
            return super().exchange_all(sends, receives)

    from mindspeed_cp.kernels import KERNELS, KernelRegistry

    class Kernel:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def forward(self, q, *others):
            told.append("step")
            return self._inner.forward(q, *others)

    case = PrefillCase(size, (12,), (0,), settings={})
    plan, world = prefill_plan([12], size, bands=CAUSAL), VirtualWorld(size)
    q, k, v = inputs(case)

    def on_rank(rank):
        mine = [take(x, layout, rank) for x, layout in ((q, plan.queries), (k, plan.keys), (v, plan.keys))]
        kernels = KernelRegistry(tuple(Kernel(each) for each in KERNELS.kernels)) if rank == 0 else KERNELS
        ring_pass_q_attention(
            *mine,
            **{"plan": plan, "communicator": Telling(world, range(size), rank, ""), "pieces": pieces},
            **{"kernels": kernels, "transport": Transport.ROTATION},
        )

    world.run(on_rank)
    assert told[-3:] == ["home", "step", "home"]
    assert told.count("home") == pieces
