"""A checkpoint around attention: what is recomputed sends nothing, has the same gradients, and leaves nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mindspeed_cp.attention import (
    AttentionTerms,
    ContextParallelAttention,
    Dropout,
    Recomputation,
    build_attention,
)
from mindspeed_cp.attention.recomputation import replay
from mindspeed_cp.comm import Agreement, Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.testing.rank_pool import LIMIT_S
from unit_tests.call_cases import ALGORITHMS
from unit_tests.pairwise import pairwise
from unit_tests.ring_cases import TRAFFIC, case_on, virtual_attention
from unit_tests.ulysses_cases import Case


def save_products(_: object, function: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    saved = function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "a policy": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_products)
    ),
}
TERMS = {
    "none": lambda sinks: None,
    "sinks": lambda sinks: AttentionTerms(sinks=sinks),
    "dropout": lambda sinks: AttentionTerms(sinks=sinks, dropout=Dropout(rate=0.3, seed=1)),
}


class Rank:
    """A virtual rank with attention between two products, and the bytes that it has sent."""

    def __init__(self, case: Case, world: VirtualWorld, rank: int, recomputation: Recomputation | None) -> None:
        self.traffic = {kind: Traffic() for kind in TRAFFIC}
        inner = virtual_attention(case, world, rank, traffic=self.traffic)
        agreement = Agreement(VirtualCommunicator(world, range(case.size), rank, "agreement"))
        ring = getattr(inner.attention, "ring", inner.attention)
        ring = replace(ring, recomputation=recomputation)
        ulysses = inner.attention
        inside = replace(ulysses, ring=ring) if hasattr(ulysses, "ring") else ring
        self.attention = ContextParallelAttention(
            replace(inner, attention=inside), case.config, case.sequence_layout, agreement, recomputation=recomputation
        )
        heads = case.topology.ulysses * case.heads
        generator = torch.Generator().manual_seed(rank)
        self.sinks = torch.linspace(-1.0, 1.0, heads, dtype=torch.float64, requires_grad=True)
        self.weight = torch.eye(case.head_size, dtype=torch.float64, requires_grad=True)
        self.inputs = [
            torch.randn(
                1, heads, case.tokens, case.head_size, dtype=torch.float64, generator=generator
            ).requires_grad_()
            for _ in range(2)
        ]

    def block(self, terms: Callable[[Tensor], AttentionTerms | None], asked: str = "out") -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x = torch.sin(x @ self.weight)
            if asked == "lse":
                out, lse = self.attention.with_lse(x, x, x, terms=terms(self.sinks))
                return torch.tanh((out + lse.unsqueeze(-1)) @ self.weight)
            return torch.tanh(self.attention(x, x, x, terms=terms(self.sinks)) @ self.weight)

        return run

    @property
    def sent(self) -> int:
        agreement = self.attention.agreement
        assert agreement is not None
        counted = (agreement.communicator.traffic, *self.traffic.values())
        return sum(each.bytes_sent.total() for each in counted)


class Found(NamedTuple):
    gradients: tuple[Tensor, ...]
    sent_forward: int
    sent: int
    held: int
    left: int


def passes(case: Case, around: str | None, terms: str, asked: str, *, kept: bool) -> list[Found]:
    """Two micro-batches of two layers, the second's backward pass first."""

    def on_rank(rank: int) -> Found:
        recomputation = Recomputation()
        here = Rank(case, world, rank, recomputation if kept else None)
        wrapped = (lambda run, x: run(x)) if around is None else recomputation.around(CHECKPOINTS[around])
        block = here.block(TERMS[terms], asked)
        losses = [wrapped(block, wrapped(block, x)).square().sum() for x in here.inputs]
        sent_forward, held = here.sent, recomputation.nbytes
        for loss in reversed(losses):
            loss.backward()
        wanted = (*here.inputs, here.weight, *([] if terms == "none" else [here.sinks]))
        gradients = tuple(x.grad for x in wanted if x.grad is not None)
        return Found(gradients, sent_forward, here.sent - sent_forward, held, recomputation.nbytes)

    world = VirtualWorld(case.size, LIMIT_S)
    return world.run(on_rank)


ROWS = pairwise(
    {
        "algorithm": list(ALGORITHMS),
        "checkpoint": list(CHECKPOINTS),
        "terms": list(TERMS),
        "asked": ["out", "lse"],
    }
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ", ".join(row.values()))
def test_what_is_recomputed_sends_nothing_and_has_the_same_gradients(row):
    case = case_on(ALGORITHMS[row["algorithm"]], tokens=4, head_size=4, value_head_size=4)
    plain = passes(case, None, row["terms"], row["asked"], kept=False)
    kept = passes(case, row["checkpoint"], row["terms"], row["asked"], kept=True)
    for one, other in zip(plain, kept, strict=True):
        assert other.held > 0 and other.left == 0
        assert (other.sent_forward, other.sent) == (one.sent_forward, one.sent)
        for gradient, expected in zip(other.gradients, one.gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_ring_keeps_output_and_lse_and_ulysses_what_it_has_exchanged_too():
    for name, numbers in (("ring", 4 * 4 + 4), ("ulysses", 5 * 4 * 4 + 4)):
        case = case_on(ALGORITHMS[name], tokens=4, head_size=4, value_head_size=4)
        heads = case.topology.ulysses
        (found, *_) = passes(case, "reentrant", "none", "out", kept=True)
        assert found.held == 4 * heads * numbers * 8  # Four layers' worth, fp64.


def counted(results: list[int]) -> Callable[[Recomputation], Callable[[Tensor], Tensor]]:
    """A function whose first product is found once; `results` gets a number each time that it is computed."""

    def of(recomputation: Recomputation) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            def find() -> Tensor:
                results.append(len(results))
                return x.detach() * 2.0

            return torch.sin(x) * replay(recomputation, "case", find)

        return run

    return of


def test_nothing_is_kept_where_nothing_is_recomputed():
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)
    run = counted([])(recomputation)
    run(x)
    with torch.no_grad():
        within = recomputation.around(CHECKPOINTS["not reentrant"])(lambda x: (run(x), recomputation.is_within), x)
    assert recomputation.nbytes == 0 and not within[1]


def test_what_is_kept_goes_with_a_graph_that_has_no_backward_pass():
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)
    out = recomputation.around(CHECKPOINTS["not reentrant"])(counted([])(recomputation), x)
    assert recomputation.nbytes == 12
    del out
    assert recomputation.nbytes == 0


def test_a_policy_that_counts_operations_does_not_see_those_that_are_not_repeated():
    recomputation, weight = Recomputation(), torch.arange(9.0).view(3, 3) / 9.0
    x = torch.ones(3, 3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        found = replay(recomputation, "case", lambda: x.detach() @ weight)
        return torch.sin(x @ weight.T * found) @ (weight + 1.0)

    (expected,) = torch.autograd.grad(run(x).sum(), x)
    (found,) = torch.autograd.grad(recomputation.around(CHECKPOINTS["a policy"])(run, x).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["reentrant", "not reentrant"])
def test_a_checkpoint_within_a_checkpoint_finds_once(name):
    computed: list[int] = []
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)
    wrapped, run = recomputation.around(CHECKPOINTS[name]), counted(computed)(recomputation)
    wrapped(lambda x: torch.cos(wrapped(run, x)), x).sum().backward()
    assert len(computed) == 1 and recomputation.nbytes == 0


def test_a_second_recomputation_computes_anew():
    computed: list[int] = []
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)
    out = recomputation.around(CHECKPOINTS["not reentrant"])(counted(computed)(recomputation), x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    again = torch.autograd.grad(out, x)
    assert len(computed) == 2 and torch.equal(first[0], again[0])


def test_what_was_found_for_another_case_is_not_used():
    recomputation, x, cases = Recomputation(), torch.ones(3, requires_grad=True), iter((2.0, 3.0))

    def run(x: Tensor) -> Tensor:
        case = next(cases)
        return torch.sin(x) * recomputation.replay(case, lambda: x.detach() * case)

    recomputation.around(CHECKPOINTS["reentrant"])(run, x).sum().backward()
    torch.testing.assert_close(x.grad, 3.0 * torch.cos(x.detach()))


def test_after_a_call_that_was_made_for_another_case_nothing_is_used_for_one_that_was_found_before():
    recomputation, x, runs = Recomputation(), torch.ones(3, requires_grad=True), iter(("ab", "ca"))
    computed: list[str] = []

    def find(case: str) -> Tensor:
        computed.append(case)
        return torch.ones(3)

    def run(x: Tensor) -> Tensor:
        for case in next(runs):
            x = torch.sin(x) * recomputation.replay(case, partial(find, case))
        return x

    recomputation.around(CHECKPOINTS["reentrant"])(run, x).sum().backward()
    assert computed == ["a", "b", "c", "a"]


def test_what_a_recomputation_that_stops_early_has_not_asked_for_is_dropped():
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        # The sum saves nothing: with what the product saves all is there.
        return torch.sin(x) * replay(recomputation, "first", x.detach) + replay(recomputation, "second", x.detach)

    out = recomputation.around(CHECKPOINTS["not reentrant"])(run, x)
    assert recomputation.nbytes > 0
    out.sum().backward(retain_graph=True)
    assert recomputation.nbytes == 0


def test_an_output_that_was_written_to_is_refused():
    recomputation, x = Recomputation(), torch.ones(3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        found = recomputation.replay("case", lambda: x.detach() * 2.0)
        found += 1.0
        return torch.sin(x) * found

    out = recomputation.around(CHECKPOINTS["reentrant"])(run, x)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_what_is_no_recomputation_or_no_checkpoint_is_refused():
    with pytest.raises(ValueError, match="recomputation=True is none; give a Recomputation, or None"):
        build_attention(ContextParallelConfig(), recomputation=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"None is no checkpoint; give a function as torch\.utils\.checkpoint"):
        Recomputation().around(None)  # type: ignore[arg-type]
