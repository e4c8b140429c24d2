"""What the ranks run for the tests of rings, of double rings and of hybrids, over gloo and as virtual ranks."""

import dataclasses
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mindspeed_cp.attention import Attention, PlannedAttention, UlyssesAttention, build_attention, compose_attention
from mindspeed_cp.comm import (
    Addressed,
    ContextParallelGroups,
    RingCommunicators,
    Traffic,
    Transfer,
    VirtualCommunicator,
    VirtualWorld,
)
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase, TileGradients, TileOutput, TileTerms
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests.dense import Result, causal_mask, dense_attention
from unit_tests.gloo_pool import group_of
from unit_tests.ulysses_cases import Case, Shard, forward_and_backward, inputs, shard_of

VIRTUAL_TIMEOUT_S = 60.0
"""For ranks that wait for each other for ever; also what a test with a rank that raises lasts, as the others wait."""
TRAFFIC = ("ulysses", "inner", "outer", "gradients")
"""Kinds of messages that are counted apart."""


def grids(size: int) -> list[CPTopology]:
    """Every grid of `size` ranks; inner rings of one rank each are a plain ring."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return [
        CPTopology(outer=outer, inner=inner, ulysses=size // (outer * inner))
        for outer in divisors
        for inner in divisors
        if size % (outer * inner) == 0 and (outer == 1 or inner > 1)
    ]


def grid_name(topology: CPTopology) -> str:
    """How a test calls it: outer x inner x Ulysses."""
    return f"{topology.outer}x{topology.inner}x{topology.ulysses}"


def grid_id(value: object) -> str | None:
    """For pytest's `ids`: a grid by its name, anything else as pytest would."""
    return grid_name(value) if isinstance(value, CPTopology) else None


def case_on(topology: CPTopology, **options: Any) -> Case:
    """A case over the grid."""
    return Case(size=topology.size, outer=topology.outer, inner=topology.inner, **options)


def dense(case: Case) -> Result:
    """The oracle's results for the case's inputs, computed in fp64."""
    q, k, v, dout, visible = inputs(case)
    if case.mask == "causal":
        visible = causal_mask(q.size(2))
    return dense_attention(*(x.double() for x in (q, k, v, dout)), visible=visible)


# Virtual ranks.


def virtual_attention(
    case: Case,
    world: VirtualWorld,
    rank: int,
    *,
    kernels: KernelRegistry = KERNELS,
    traffic: dict[str, Traffic] | None = None,
) -> Attention:
    """The case's attention on a virtual rank. As over process groups, a ring without overlap has a single channel."""
    topology = case.topology

    def communicator(kind: str, ranks: Sequence[int], channel: str) -> VirtualCommunicator:
        return VirtualCommunicator(world, ranks, rank, channel, None if traffic is None else traffic[kind])

    ulysses, ring = None, None
    if topology.ulysses > 1:
        ulysses = communicator("ulysses", topology.ulysses_ranks(rank), "ulysses")
    if topology.ring_size > 1:
        ranks = topology.ring_ranks(rank)
        kinds = RingCommunicators._fields
        ring = RingCommunicators(*(communicator(kind, ranks, kind if case.overlap else "ring") for kind in kinds))
    attention = compose_attention(
        case.config, rank=rank, ulysses=ulysses, ring=ring, layout=case.sequence_layout, kernels=kernels
    )
    assert isinstance(attention, PlannedAttention)
    # Inner rings of one rank, which are the plain ring, and pieces are what no flag asks for.
    changes = {"schedule": RingSchedule(outer=case.outer, inner=case.inner), "pieces": case.pieces}
    inside = attention.attention
    if isinstance(inside, UlyssesAttention):
        inside = dataclasses.replace(inside, ring=dataclasses.replace(inside.ring, **changes))
    else:
        inside = dataclasses.replace(inside, **changes)
    return dataclasses.replace(attention, attention=inside)


def attend_virtually(case: Case, kernels: KernelRegistry = KERNELS) -> list[Shard]:
    """What each rank of the case gets."""
    world = VirtualWorld(case.size, VIRTUAL_TIMEOUT_S)
    return world.run(
        lambda rank: forward_and_backward(rank, case, virtual_attention(case, world, rank, kernels=kernels))
    )


class Message(NamedTuple):
    """One that left in an exchange. source, to: ranks of the ring."""

    kind: str
    source: int
    to: int
    bytes: int


class Pass(NamedTuple):
    """What a rank sent in one pass: by its communicators' counts, and each message of an exchange."""

    calls: dict[str, int]
    bytes: dict[str, int]
    messages: list[Message]

    def sent(self, kind: str) -> tuple[int, int]:
        """Messages and bytes of one kind."""
        return self.calls[kind], self.bytes[kind]


def passes(case: Case) -> list[tuple[Pass, Pass]]:
    """What each rank sends in the forward and in the backward pass."""
    world, exchange_all = VirtualWorld(case.size, VIRTUAL_TIMEOUT_S), VirtualCommunicator.exchange_all
    messages: dict[int, list[Message]] = {rank: [] for rank in range(case.size)}
    kinds: dict[int, str] = {}

    def recorded(self: VirtualCommunicator, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        for to, send in sends:
            message = Message(kinds[id(self.traffic)], self.rank, to, send.numel() * send.element_size())
            messages[self.ranks[self.rank]].append(message)
        return exchange_all(self, sends, receives)

    def on_rank(rank: int) -> tuple[Pass, Pass]:
        traffic = {kind: Traffic() for kind in TRAFFIC}
        kinds.update({id(count): kind for kind, count in traffic.items()})
        operation = {kind: "all_to_all" if kind == "ulysses" else "exchange" for kind in TRAFFIC}

        def count() -> Pass:
            counted = Pass(
                {kind: traffic[kind].calls[operation[kind]] for kind in TRAFFIC},
                {kind: traffic[kind].bytes_sent[operation[kind]] for kind in TRAFFIC},
                messages.pop(rank),
            )
            messages[rank] = []
            for each in traffic.values():
                each.clear()
            return counted

        q, k, v, dout = (shard_of(case, x, rank) for x in inputs(case)[:4])
        attention = virtual_attention(case, world, rank, traffic=traffic)
        kept.append(traffic)
        out = attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        forward = count()
        out.backward(dout)
        return forward, count()

    kept: list[dict[str, Traffic]] = []  # So that no id is used again.
    with mock.patch.object(VirtualCommunicator, "exchange_all", recorded):
        return world.run(on_rank)


def saved_bytes(case: Case) -> list[int]:
    """Bytes of the distinct storages that each rank's forward pass saves for the backward."""
    world = VirtualWorld(case.size, VIRTUAL_TIMEOUT_S)

    def on_rank(rank: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        q, k, v = (shard_of(case, x, rank).requires_grad_() for x in inputs(case)[:3])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            virtual_attention(case, world, rank)(q, k, v)
        return sum(storage.nbytes() for storage in storages.values())

    return world.run(on_rank)


def most_blocks(case: Case) -> int:
    """The most blocks that any rank has received and still holds at once, in a forward pass; those under way count."""
    alive: Counter[int] = Counter()
    exchange_all, most = VirtualCommunicator.exchange_all, [0]

    def counted(self: VirtualCommunicator, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        for _, receive in receives:
            alive[self.rank] += 1
            most.append(alive[self.rank])
            weakref.finalize(receive, alive.update, {self.rank: -1})
        return exchange_all(self, sends, receives)

    def on_rank(rank: int) -> None:
        virtual_attention(case, world, rank)(*(shard_of(case, x, rank) for x in inputs(case)[:3]))

    world = VirtualWorld(case.size, VIRTUAL_TIMEOUT_S)
    with mock.patch.object(VirtualCommunicator, "exchange_all", counted):
        world.run(on_rank)
    return max(most)


# Kernels.


@dataclass
class RecordingKernel:
    """The kernel that would be chosen, which notes whether each tensor that it is handed is contiguous."""

    name = "recording"
    contiguous: list[bool] = field(default_factory=list)

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        return []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        self.contiguous.extend(x.is_contiguous() for x in (q, k, v))
        return KERNELS.choose(TileCase.of(q, k, v, terms)).forward(q, k, v, terms)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        self.contiguous.extend(x.is_contiguous() for x in (dout, q, k, v, output.out, output.lse))
        return KERNELS.choose(TileCase.of(q, k, v, terms)).backward(dout, q, k, v, output, terms)


@dataclass
class FailingKernel(RecordingKernel):
    """Calls `fail` instead of its forward or backward pass number `at`."""

    name = "failing"
    fail: Callable[[], None] = lambda: None
    at: int = 0
    phase: str = "forward"
    calls: int = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        self._count("forward")
        return super().forward(q, k, v, terms)

    def backward(self, *args: Any) -> TileGradients:
        self._count("backward")
        return super().backward(*args)

    def _count(self, phase: str) -> None:
        if phase == self.phase:
            if self.calls == self.at:
                self.fail()
            self.calls += 1


# Gloo ranks.


@contextmanager
def _groups(
    topology: CPTopology, overlap: bool, group: dist.ProcessGroup | None
) -> Iterator[ContextParallelGroups | None]:
    """Groups over the group for the time of a `with` block, which all ranks of the world enter; None outside the group.

    They are gone afterwards: each has a thread in every rank, which wakes a hundred times a second.
    """
    if group is None:
        ContextParallelGroups.take_part(topology, overlap=overlap)
        yield None
        return
    groups = ContextParallelGroups.build(topology, group, overlap=overlap)
    yield groups
    dist.barrier(group)  # Nobody closes a connection over which another one still receives.
    groups.destroy()


def attend_every_way(group: dist.ProcessGroup | None, case: Case) -> list[Shard]:
    """Two runs of the case without overlap and two with it."""
    shards = []
    for overlap in (False, True):
        way = dataclasses.replace(case, overlap=overlap)
        with _groups(case.topology, overlap, group) as groups:
            if groups is not None:
                assert way.config.topology == case.topology
                attention = build_attention(way.config, groups, layout=case.sequence_layout)
                shards += [forward_and_backward(dist.get_rank(group), case, attention) for _ in range(2)]
    return shards


def attend_in_own_groups(group: dist.ProcessGroup | None, case: Case) -> Shard | None:
    """The case as a user builds it, in groups that are destroyed afterwards."""
    if group is None:
        ContextParallelGroups.take_part(case.topology, overlap=case.overlap)
        return None
    groups = ContextParallelGroups.build(case.topology, group, overlap=case.overlap)
    attention = build_attention(case.config, groups, layout=case.sequence_layout)
    shard = forward_and_backward(dist.get_rank(group), case, attention)
    dist.barrier(group)  # Nobody closes a connection over which another one still receives.
    groups.destroy()
    return shard


def attend_in_one_of(world: dist.ProcessGroup, members: Sequence[Sequence[int]], case: Case) -> Shard:
    """The case in whichever of these groups has this rank, all of them at once."""
    (mine,) = (ranks for ranks in members if dist.get_rank() in ranks)
    shard = attend_in_own_groups(group_of(mine), case)
    assert shard is not None
    return shard


class Built(NamedTuple):
    """The groups of a rank, as ranks of the world, and how many different ones they are.

    distinct: different groups among the ring's three. made: groups that `build` added to torch's, left: how many of
    these are there after `destroy`.
    """

    ulysses: list[int] | None
    ring: list[int] | None
    distinct: int
    made: int
    left: int


def build_and_destroy(group: dist.ProcessGroup | None, topology: CPTopology, overlap: bool) -> list[Built]:
    """Done twice."""
    built = []
    registered = dist.distributed_c10d._world.pg_map
    for _ in range(2):
        before = set(registered)
        if group is None:
            ContextParallelGroups.take_part(topology, overlap=overlap)
            assert set(registered) == before
            continue
        groups = ContextParallelGroups.build(topology, group, overlap=overlap)
        made = set(registered) - before
        axes = groups.along(topology)
        ring = {each.group for each in axes.ring or ()}
        assert len({each.global_ranks for each in axes.ring or ()}) <= 1
        ulysses = None if axes.ulysses is None else list(axes.ulysses.global_ranks)
        ring_ranks = None if axes.ring is None else list(axes.ring[0].global_ranks)
        dist.barrier(group)  # Nobody closes a connection that another one is still making.
        groups.destroy()
        left = set(registered) - before
        built.append(Built(ulysses, ring_ranks, len(ring), len(made), len(left)))
    return built


def build_error(group: dist.ProcessGroup | None, topology: CPTopology) -> str:
    """What `build` says to a group of another size."""
    try:
        ContextParallelGroups.build(topology, group)
    except ValueError as error:
        return str(error)
    return "nothing"


def made_timeouts(group: dist.ProcessGroup | None, topology: CPTopology, timeout: timedelta) -> list[timedelta]:
    """Timeouts of the groups that `build` makes."""
    if group is None:
        ContextParallelGroups.take_part(topology, overlap=True)
        return []
    registered = dist.distributed_c10d._world.pg_map
    before = set(registered)
    groups = ContextParallelGroups.build(topology, group, overlap=True, timeout=timeout)
    made = set(registered) - before
    timeouts = [each._get_backend(torch.device("cpu")).options._timeout for each in made]
    dist.barrier(group)
    groups.destroy()
    return timeouts


def profiled_names(group: dist.ProcessGroup | None, case: Case) -> list[str]:
    """Names that the profiler shows for one forward and backward pass, those of the library alone."""
    with _groups(case.topology, case.overlap, group) as groups:
        if groups is None:
            return []
        attention = build_attention(case.config, groups, layout=case.sequence_layout)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            forward_and_backward(dist.get_rank(group), case, attention)
    return sorted(
        event.name for event in profiler.events() if {"ring", "Ulysses"} & {*event.name.split(":")[0].split()}
    )


def die_in_mid_ring(group: dist.ProcessGroup | None, case: Case, culprit: int, folder: str) -> None:
    """The culprit's process ends while it computes its second block; each other one writes what it raised, and ends.

    They end as a training process does that raises, so that whoever waits for them learns of it.
    """
    with _groups(case.topology, case.overlap, group) as groups:
        if groups is None:
            return
        rank = dist.get_rank(group)
        kernels = KernelRegistry((FailingKernel(fail=lambda: os._exit(7), at=1),)) if rank == culprit else KERNELS
        attention = build_attention(case.config, groups, layout=case.sequence_layout, kernels=kernels)
        try:
            forward_and_backward(rank, case, attention)
        except RuntimeError as error:
            (Path(folder) / str(rank)).write_text(str(error))
        os._exit(8)


def errors_of_virtual_ranks(case: Case, culprit: int, phase: str) -> list[str]:
    """What each rank raises where the culprit leaves while it computes its second block of a phase."""

    def leave() -> None:
        raise RuntimeError("left")

    world = VirtualWorld(case.size, timeout_s=3.0)

    def on_rank(rank: int) -> str:
        kernels = KernelRegistry((FailingKernel(fail=leave, at=1, phase=phase),)) if rank == culprit else KERNELS
        try:
            forward_and_backward(rank, case, virtual_attention(case, world, rank, kernels=kernels))
        except RuntimeError as error:
            return str(error)
        return "nothing"

    return world.run(on_rank)
