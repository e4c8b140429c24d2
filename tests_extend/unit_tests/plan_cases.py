"""Attention over any plan, on virtual ranks and over gloo, and the dense attention that it has to equal.

Shapes: B batch, N query heads, G key/value heads, S tokens of the stream, D key head size, V value head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import RingAttention, RingCommunicators, UlyssesAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator, ContextParallelGroups, VirtualCommunicator, VirtualWorld
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.plan import CAUSAL, AttentionPlan, Band
from mindspeed_cp.program import KV, Transport
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests.dealt import Dealt

SCALE = 0.4


class Inputs(NamedTuple):
    """Of the whole stream. dlse: gradient of the log-sum-exp [B, N, S]. visible: a boolean mask [S, S], if any."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    visible: Tensor | None


class Found(NamedTuple):
    """Results for some tokens: [B, H, s, ...]."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


@dataclass(frozen=True)
class PlanCase:
    """One attention. layout: who holds what. bands, bands_of: see AttentionPlan. masked: with a boolean mask too."""

    layout: Dealt
    topology: CPTopology
    bands: tuple[Band, ...] = CAUSAL
    bands_of: dict[int, tuple[Band, ...]] = field(default_factory=dict, hash=False)
    transport: Transport | None = None
    overlap: bool = False
    masked: bool = False
    batch: int = 1
    pieces: int = 1
    kept: KV = KV.NEITHER
    dtype: torch.dtype = torch.float64

    @property
    def length(self) -> int:
        return sum(map(self.layout.num_tokens, range(self.layout.num_ranks)))

    @property
    def samples(self) -> int:
        """How many there are: of each its own documents, or any number of them alike."""
        return len(self.layout.documents) if len(self.layout.documents) > 1 else self.batch


def inputs(case: PlanCase) -> Inputs:
    """The same in every process."""
    generator = torch.Generator().manual_seed(1)
    heads = case.topology.ulysses * case.pieces

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.samples, *shape, generator=generator, dtype=torch.float64).to(case.dtype)

    visible = torch.rand(case.length, case.length, generator=generator) < 0.5 if case.masked else None
    return Inputs(
        normal(2 * heads, case.length, 8),
        normal(heads, case.length, 8),
        normal(heads, case.length, 12),
        normal(2 * heads, case.length, 12),
        normal(2 * heads, case.length),
        visible,
    )


def seen(case: PlanCase) -> Tensor:
    """Which keys each query sees, [B, 1, S, S], from the definition of documents and bands."""
    rows = []
    for documents in case.layout.documents:
        lengths = torch.tensor(documents)
        document = torch.repeat_interleave(torch.arange(len(documents)), lengths)
        starts = torch.tensor([0, *accumulate(documents)][:-1])
        position = torch.arange(case.length) - starts[document]
        i, j = position[:, None], position[None, :]
        allowed = torch.zeros(case.length, case.length, dtype=torch.bool)
        for number in range(len(documents)):
            for band in case.bands_of.get(number, case.bands):
                rule = (j >= band.keys[0]) & (document == number)[:, None] & (document == number)[None, :]
                if band.keys[1] is not None:
                    rule &= j < band.keys[1]
                if band.behind is not None:
                    rule &= i - j <= band.behind
                if band.ahead is not None:
                    rule &= i - j >= -band.ahead
                allowed |= rule
        rows.append(allowed)
    return torch.stack(rows)[:, None]


def dense(case: PlanCase) -> Found:
    """The oracle: plain torch with autograd, of the whole stream."""
    given = inputs(case)
    q, k, v = (x.double().requires_grad_() for x in given[:3])
    repeats = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(repeats, dim=1).transpose(2, 3) * SCALE
    allowed = seen(case) if given.visible is None else seen(case) & given.visible
    scores = scores.masked_fill(~allowed, -torch.inf)
    dead = ~allowed.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)
    out = weights @ v.repeat_interleave(repeats, dim=1)
    alive = scores.masked_fill(dead, 0.0).logsumexp(dim=-1).masked_fill(dead[..., 0], 0.0)
    loss = (out * given.dout).sum() + (alive * given.dlse).sum()
    lse = alive.detach().masked_fill(dead[..., 0], -torch.inf)
    return Found(out.detach(), lse, *torch.autograd.grad(loss, (q, k, v)))


def plan_of(case: PlanCase) -> AttentionPlan:
    return AttentionPlan(case.layout, case.layout, case.bands, case.bands_of)


def attention_of(
    case: PlanCase,
    rank: int,
    ulysses: Communicator | None,
    ring: RingCommunicators | None,
    kernels: KernelRegistry = KERNELS,
) -> RingAttention | UlyssesAttention:
    """That of a rank. ulysses, ring: its groups along either axis; None where that has one rank."""
    topology = case.topology
    of_ring = RingAttention(
        RingSchedule(topology.outer, topology.inner),
        ring,
        case.overlap,
        kernels,
        pieces=case.pieces,
        transport=case.transport,
        kept=case.kept,
    )
    if ulysses is None:
        return of_ring
    return UlyssesAttention(ulysses, topology.ulysses_groups, rank // topology.ulysses, of_ring)


def attend(
    case: PlanCase, rank: int, plan: AttentionPlan, ulysses: Communicator | None, ring: RingCommunicators | None
) -> Found:
    """What a rank gets. ulysses, ring: see attention_of."""
    attention, given, tokens = attention_of(case, rank, ulysses, ring), inputs(case), case.layout.tokens(rank)
    q, k, v, dout, dlse = (x[:, :, tokens] for x in given[:5])
    for x in (q, k, v):
        x.requires_grad_()
    visible = None if given.visible is None else given.visible[tokens]
    out, lse = attention.with_lse(q, k, v, plan, Terms(SCALE, visible))
    loss = (out * dout).sum() + (lse.masked_fill(lse.isinf(), 0.0) * dlse).sum()
    return Found(out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))


def restored(case: PlanCase, shards: Sequence[Found]) -> Found:
    """The whole stream in order, from what each rank got."""
    held = [token for rank in range(case.layout.num_ranks) for token in case.layout.tokens(rank)]
    order = sorted(range(len(held)), key=held.__getitem__)
    return Found(*(torch.cat(parts, dim=2)[:, :, order] for parts in zip(*shards, strict=True)))


def attend_virtually(
    case: PlanCase, communicator: Callable[..., Communicator] = VirtualCommunicator, timeout_s: float = 20.0
) -> list[Found]:
    """What each rank gets."""
    plan = plan_of(case)
    return on_virtual_ranks(case, lambda *place: attend(case, place[0], plan, *place[1:]), communicator, timeout_s)


def on_virtual_ranks(
    case: PlanCase,
    run: Callable[[int, Communicator | None, RingCommunicators | None], Any],
    communicator: Callable[..., Communicator] = VirtualCommunicator,
    timeout_s: float = 20.0,
) -> list[Any]:
    """What each rank gets from `run`. As over process groups, a ring without overlap has a single channel."""
    topology, world = case.topology, VirtualWorld(case.topology.size, timeout_s)

    def on_rank(rank: int) -> Any:
        ulysses, ring = None, None
        if topology.ulysses > 1:
            ulysses = communicator(world, topology.ulysses_ranks(rank), rank, "ulysses")
        if topology.ring_size > 1:
            kinds = [kind if case.overlap else "ring" for kind in RingCommunicators._fields]
            ring = RingCommunicators(*(communicator(world, topology.ring_ranks(rank), rank, kind) for kind in kinds))
        return run(rank, ulysses, ring)

    return world.run(on_rank)


# Over gloo.


class OnParents(NamedTuple):
    """What a rank got in each round, and the process groups that were made meanwhile."""

    found: list[Found]
    made: int


def attend_on_the_same_parents(
    group: dist.ProcessGroup, rounds: Sequence[Sequence[tuple[tuple[int, ...], PlanCase]]]
) -> OnParents:
    """Round after round over groups that are built once; in each the ranks share out among some attentions.

    rounds: the ranks of each attention of a round, and its case.
    """
    parents = ContextParallelGroups.build(
        CPTopology(outer=2, inner=dist.get_world_size(group) // 2), group, overlap=True
    )
    registered, found = set(dist.distributed_c10d._world.pg_map), []
    for attentions in rounds:
        ((ranks, case),) = ((ranks, case) for ranks, case in attentions if dist.get_rank(group) in ranks)
        part = parents.part(ranks)
        part.agreement.reach(str(case.topology))
        ulysses, ring = part.along(case.topology)
        communicators = None if ring is None else RingCommunicators(*ring)
        found.append(attend(case, part.rank, plan_of(case), ulysses, communicators))
    made = len(set(dist.distributed_c10d._world.pg_map) - registered)
    dist.barrier(group)  # Nobody closes a connection over which another one still receives.
    parents.destroy()
    return OnParents(found, made)
