"""Prefill on virtual ranks, and the dense attention that it has to equal.

Shapes: B sequences, N query heads, G key/value heads, S positions of the longest sequence, D head size, V value head
size.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.comm import Communicator, VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import Spans, State, prefill_plan, put, take
from mindspeed_cp.plan import CAUSAL, AttentionPlan, Band

HEAD_SIZE, VALUE_HEAD_SIZE = 8, 12


@dataclass(frozen=True)
class PrefillCase:
    """new, cached: tokens of each sequence. place: where the cached ones are. share: query heads of a K/V head."""

    size: int
    new: tuple[int, ...]
    cached: tuple[int, ...]
    place: str = "anywhere"
    share: int = 2
    bands: tuple[Band, ...] = CAUSAL
    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    kv_heads: int = 2

    @property
    def length(self) -> int:
        return max(new + cached for new, cached in zip(self.new, self.cached, strict=True))


def plan_of(case: PrefillCase) -> AttentionPlan:
    held: list[list[list[tuple[int, int]]]] = [[[] for _ in case.new] for _ in range(case.size)]
    rng = random.Random(case.size)
    for sample, length in enumerate(case.cached):
        first = 0
        while first < length:
            stop = (
                length if case.place == "last rank" else min(length, first + rng.randrange(1, 1 + max(length // 4, 2)))
            )
            rank = case.size - 1 if case.place == "last rank" else rng.randrange(case.size)
            held[rank][sample].append((first, stop))
            first = stop
    cached = Spans(tuple(tuple(map(tuple, samples)) for samples in held))
    return prefill_plan(case.new, case.size, cached=cached, bands=case.bands)


def inputs(case: PrefillCase) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kv_heads = case.kv_heads
    sizes = (kv_heads * case.share, HEAD_SIZE), (kv_heads, HEAD_SIZE), (kv_heads, VALUE_HEAD_SIZE)
    return tuple(  # type: ignore[return-value]
        torch.randn(len(case.new), heads, case.length, size, generator=generator, dtype=torch.float64).to(case.dtype)
        for heads, size in sizes
    )


def dense(
    case: PrefillCase,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
) -> State:
    """In fp64, of all positions; only those of new tokens mean something."""
    q, k, v = (x.double() for x in inputs(case))
    scores = q @ k.repeat_interleave(case.share, 1).transpose(2, 3) / HEAD_SIZE**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(case.length)[:, None] - torch.arange(case.length)
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    if bias is not None:
        scores = scores + bias
    seen = torch.zeros(case.length, case.length, dtype=torch.bool)
    for behind, ahead, _ in case.bands:
        seen |= (distance <= (case.length if behind is None else behind)) & (
            distance >= -(case.length if ahead is None else ahead)
        )
    lengths = torch.tensor([new + cached for new, cached in zip(case.new, case.cached, strict=True)])
    exists = (torch.arange(case.length) < lengths[:, None])[:, None, None, :]
    scores = scores.masked_fill(~(seen & exists), -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[:, None])
    return State((scores - lse[..., None]).exp() @ v.repeat_interleave(case.share, 1), lse)


def attend(
    case: PrefillCase,
    function: Callable[..., State],
    communicator: Callable[..., Communicator] = VirtualCommunicator,
) -> list[State]:
    """What each rank gets; padding is NaN."""
    plan, whole = plan_of(case), inputs(case)
    world = VirtualWorld(case.size, 20.0)

    def on_rank(rank: int) -> State:
        layouts = plan.queries, plan.keys, plan.keys
        shards = [
            with_nan_padding(take(x, layout, rank), layout, rank) for x, layout in zip(whole, layouts, strict=True)
        ]
        group = communicator(world, range(case.size), rank, "ring") if case.size > 1 else None
        return function(*shards, plan=plan, communicator=group, **case.settings)

    return world.run(on_rank)


def with_nan_padding(x: Tensor, layout: Spans, rank: int) -> Tensor:
    for sample in range(x.size(0)):
        x[sample, :, layout.length(rank, sample) :] = torch.nan
    return x


def assert_new_tokens_equal(
    case: PrefillCase, states: Sequence[State], expected: State, tolerance: float = 1e-12
) -> None:
    plan = plan_of(case)
    out, lse = (torch.full_like(x, torch.nan, dtype=states[0][place].dtype) for place, x in enumerate(expected))
    for rank, state in enumerate(states):
        put(state.out, out, plan.queries, rank)
        put(state.lse, lse, plan.queries, rank)
    for sample, (new, cached) in enumerate(zip(case.new, case.cached, strict=True)):
        at = sample, slice(None), slice(cached, cached + new)
        for found, exact in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(found[at].double(), exact[at], rtol=0, atol=tolerance)
