"""What other context parallelism leaves out without a word, on every algorithm here: docs/silent_failures.md."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.patches.losses import _divide_by_all_tokens
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band
from unit_tests.call_cases import ALGORITHMS, agreeing_attention, run_virtually
from unit_tests.dealt import Dealt, contiguous, zigzag
from unit_tests.dense import assert_equal_to
from unit_tests.plan_cases import PlanCase
from unit_tests.ring_cases import case_on
from unit_tests.term_cases import TermCase, attend_virtually, dense, restored

on_every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@dataclass(frozen=True)
class Told:
    """What attention is told; by default nothing but to be causal, over one document."""

    terms: tuple[str, ...] = ()
    bands: tuple[Band, ...] = CAUSAL
    layout: Dealt = zigzag([4] * 8)  # noqa: RUF009  (it cannot be changed)

    def on(self, algorithm: str) -> TermCase:
        return TermCase(PlanCase(self.layout, ALGORITHMS[algorithm], self.bands), (8, 4), self.terms)


TOLD = {
    "a window": Told(bands=(Band(5, 0),)),
    "that it is not causal": Told(bands=FULL),
    "where documents end": Told(layout=zigzag([4] * 8, [[11, 1, 20]])),
    "sinks": Told(("sinks",)),
    "a softcap": Told(("softcap",)),
    "a bias": Told(("bias",)),
    "a mask": Told(("mask",)),
}


@on_every_algorithm
@pytest.mark.parametrize("what", TOLD)
def test_nothing_that_attention_is_told_is_left_out(what, algorithm):
    told, without = TOLD[what].on(algorithm), Told().on(algorithm)
    exact = dense(told)
    assert (exact.out - dense(without).out).abs().max() > 0.1, "leaving it out would not be seen"
    assert_equal_to(exact, restored(told, attend_virtually(told)))


@on_every_algorithm
def test_tokens_that_the_ranks_do_not_divide_are_all_there(algorithm):
    case = Told(layout=zigzag([4, 3, 4, 4, 2, 4, 4, 4])).on(algorithm)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


@on_every_algorithm
def test_inference_gives_the_bits_of_training(algorithm):
    case = case_on(ALGORITHMS[algorithm])

    def on_rank(attention, rank):
        q, k, v = torch.randn(3, 1, 4, case.tokens, 8, generator=torch.Generator().manual_seed(rank))
        with torch.inference_mode():
            inferred = attention(q, k, v)
        return torch.equal(inferred, attention(*(x.requires_grad_() for x in (q, k, v))))

    assert all(run_virtually(case, on_rank))


@on_every_algorithm
def test_a_layer_of_other_heads_in_between_changes_nothing(algorithm):
    case = case_on(ALGORITHMS[algorithm])
    world = VirtualWorld(case.size, 30.0)

    def gradients(rank: int, others: tuple[int, ...]) -> tuple[Tensor, ...]:
        attention = agreeing_attention(case, world, rank)

        def attend(heads: int, kv_heads: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            generator = torch.Generator().manual_seed(rank)
            leaves = tuple(
                torch.randn(1, n, case.tokens, 8, generator=generator).requires_grad_()
                for n in (heads, kv_heads, kv_heads)
            )
            return attention(*leaves), leaves

        out, leaves = attend(8, 2)
        for kv_heads in others:
            attend(4, kv_heads)
        return torch.autograd.grad(out.square().sum(), leaves)

    alone, between = (world.run(lambda rank, others=others: gradients(rank, others)) for others in ((), (1, 4)))
    for one, other in zip(alone, between, strict=True):
        assert all(map(torch.equal, one, other))


@on_every_algorithm
def test_queries_and_keys_of_a_document_have_lengths_of_their_own(algorithm):
    queries, keys = contiguous([4] * 4, [[5, 11]]), contiguous([5] * 4, [[14, 6]])
    plan = AttentionPlan(queries, keys, FULL)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, length, 8, generator=generator, dtype=torch.float64) for length in (16, 20, 20))

    def on_rank(attention, rank):
        mine = zip((q, k, v), (queries, keys, keys), strict=True)
        return attention(*(x[:, :, held.tokens(rank)] for x, held in mine), plan=plan)

    found = torch.cat(run_virtually(case_on(ALGORITHMS[algorithm]), on_rank), dim=2)
    of_each = [
        torch.nn.functional.scaled_dot_product_attention(q[:, :, rows], k[:, :, columns], v[:, :, columns])
        for rows, columns in ((slice(5), slice(14)), (slice(5, 16), slice(14, 20)))
    ]
    torch.testing.assert_close(found, torch.cat(of_each, dim=2), rtol=0, atol=1e-12)


def losses(group: torch.distributed.ProcessGroup) -> tuple[float, float]:
    """The loss of a rank, of which the second has masked all its tokens, and what it is divided by."""
    mask = torch.ones(4) * (group.rank() == 0)
    loss, tokens, _ = _divide_by_all_tokens(lambda x: ((x * mask).sum(), mask.sum().int(), {}), group, torch.ones(4))
    return float(loss), float(tokens)


def test_a_rank_that_has_masked_all_its_tokens_has_a_loss_of_zero(gloo):
    assert gloo.run(2, losses) == [(2.0, 1.0), (0.0, 1.0)]
