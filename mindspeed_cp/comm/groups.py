"""Process groups over the context-parallel ranks, made once, and the rings and Ulysses groups that are parts of them.

Note [Parents]
    Messages of one group keep their order, and with NCCL and HCCL each waits for the one before it. So K/V within inner
    rings, K/V between them and gradients have groups of their own where they are to overlap. Each is of all
    context-parallel ranks, whatever the grid: a ring, or a Ulysses group, is some ranks of it, and needs no group more.
    Grids and sizes may change from batch to batch. As messages among a part must not be the first thing that NCCL sees
    of a group, all ranks open it by a sum over a number.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.comm.agreement import Agreement
from mindspeed_cp.comm.communicator import Communicator, ProcessGroupCommunicator, carries_cpu_tensors
from mindspeed_cp.comm.traffic import Traffic
from mindspeed_cp.device import accelerator
from mindspeed_cp.program import Axis
from mindspeed_cp.topology import CPTopology

# A group of the user's may have any order, and its places are those of the grid; new_group sorts unless it is told.
# Before it could be told, there were no other groups than sorted ones.
_UNSORTED: dict[str, Any] = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}


class RingCommunicators(NamedTuple):
    """The same ranks, in the same order, once for each kind of message; with overlap they must be different groups.

    inner: K/V within an inner ring. outer: K/V between inner rings. gradients: dK/dV.
    """

    inner: Communicator
    outer: Communicator
    gradients: Communicator

    def along(self, axis: Axis) -> Communicator:
        """The one for messages of this axis."""
        return self[_KIND_OF[axis]]


_KIND_OF = {Axis.INNER: 0, Axis.OUTER: 1, Axis.HOME: 2, Axis.ACROSS: 2}


Kinds = tuple[ProcessGroupCommunicator, ProcessGroupCommunicator, ProcessGroupCommunicator]
"""What RingCommunicators are made of, in their order."""


class Axes(NamedTuple):
    """What a rank communicates with along the axes of a grid; None along one on which it is alone."""

    ulysses: ProcessGroupCommunicator | None
    ring: Kinds | None


@dataclass(frozen=True)
class ContextParallelGroups:
    """The groups in which context-parallel ranks communicate, see Note [Parents].

    context_parallel: all ranks that share a sequence, or of which some do. agreement: of these; one for all attentions
    over them. parents: communicators among them, for each kind of message.
    """

    context_parallel: dist.ProcessGroup
    agreement: Agreement
    parents: Kinds
    _made: tuple[dist.ProcessGroup, ...] = ()

    @classmethod
    def build(
        cls,
        topology: CPTopology,
        context_parallel: dist.ProcessGroup,
        *,
        overlap: bool = False,
        host_group: bool = False,
        timeout: timedelta | None = None,
    ) -> "ContextParallelGroups":
        """Groups over the ranks of an existing group, in that group's own order.

        Like torch.distributed.new_group, it is called by all ranks of the world, each with its own context-parallel
        group and the same arguments else; a rank that has none calls `take_part`. Only where nothing but the group
        itself is needed (without overlap, or for Ulysses alone) may its ranks call it by themselves.

        topology: the grid that they are for. Others of any size may be laid over them too; one with more inner rings
        has no group of its own for messages between these.
        overlap: K/V within inner rings, K/V between them and gradients get groups of their own, so that none queues
        behind another; else they share one. host_group: where the job's backend carries no tensors of the CPU, a gloo
        group is made for what ranks agree on; without it the accelerator's group is used, and each call of attention
        waits for the accelerator once. timeout: of the groups made, that of the group given where it is None.

        Raises ValueError where the group's size is not the topology's.
        """
        check_size(topology, context_parallel)
        # What differs here would make other groups on some ranks, and the rest would wait for them.
        _agreement_over(context_parallel).reach(
            f"{topology}, overlap={overlap}, host_group={host_group}", device=_device_of(context_parallel)
        )
        members = dist.get_process_group_ranks(context_parallel)
        made = _make_groups(_plan(topology, overlap, host_group), members, timeout or _timeout_of(context_parallel))
        inner, outer, gradients = (made.get(kind, context_parallel) for kind in RingCommunicators._fields)
        for group in dict.fromkeys((inner, outer, gradients)):
            _open(group)
        parents = ProcessGroupCommunicator(inner), ProcessGroupCommunicator(outer), ProcessGroupCommunicator(gradients)
        agreement = _agreement_over(made.get(_HOST, context_parallel))
        return cls(context_parallel, agreement, parents, tuple(made.values()))

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return self.parents[0].rank

    def along(self, topology: CPTopology, traffic: Traffic | None = None) -> Axes:
        """What this rank communicates with along each axis of a grid. traffic: where it is counted.

        Raises ValueError where the grid is not one of all these ranks.
        """
        check_number(topology, self.parents[0].size)
        ulysses, ring = topology.ulysses_ranks(self.rank), topology.ring_ranks(self.rank)
        return Axes(
            self.parents[0].subset(ulysses, traffic) if len(ulysses) > 1 else None,
            self._among(ring, traffic) if len(ring) > 1 else None,
        )

    def part(self, ranks: Sequence[int]) -> "ContextParallelGroups":
        """Some of the ranks, by their numbers here, which share a sequence of their own; no process group is made.

        They are this part's 0, 1 and so on; this rank has to be one of them.
        """
        agreeing = self.agreement.communicator
        assert isinstance(agreeing, ProcessGroupCommunicator)
        return replace(self, agreement=_agreement(agreeing.subset(ranks)), parents=self._among(ranks), _made=())

    def _among(self, ranks: Sequence[int], traffic: Traffic | None = None) -> Kinds:
        inner, outer, gradients = self.parents
        return inner.subset(ranks, traffic), outer.subset(ranks, traffic), gradients.subset(ranks, traffic)

    @staticmethod
    def take_part(topology: CPTopology, *, overlap: bool = False, host_group: bool = False) -> None:
        """Join the others' `build` from a rank of the world that is in no context-parallel group."""
        _make_groups(_plan(topology, overlap, host_group), [], None)

    def destroy(self) -> None:
        """Destroy the groups that `build` made; the context-parallel group itself is its owner's."""
        for group in self._made:
            # torch raises for a group that is gone with all others already.
            with suppress(ValueError):
                dist.destroy_process_group(group)

    def __deepcopy__(self, memo: object) -> "ContextParallelGroups":
        """The same object: a process has its groups once."""
        return self


def check_size(topology: CPTopology, context_parallel: dist.ProcessGroup) -> None:
    """Raise ValueError unless the group has as many ranks as the topology, and this one among them."""
    if dist.get_rank(context_parallel) < 0:
        raise ValueError(
            "this rank is not in the context-parallel group that it is given; where the others build groups, it calls "
            "ContextParallelGroups.take_part."
        )
    check_number(topology, dist.get_world_size(context_parallel))


def check_number(topology: CPTopology, size: int) -> None:
    """Raise ValueError unless the topology is one of `size` ranks."""
    if size != topology.size:
        raise ValueError(
            f"the context-parallel group has {size} ranks and the configured topology {topology.size}: configure "
            f"mindspeed_cp and initialize_model_parallel with the same context_parallel_size."
        )


_HOST = "host"
"""The kind of message that the host sends; the others are those of RingCommunicators."""


def _plan(topology: CPTopology, overlap: bool, host_group: bool) -> dict[str, str | None]:
    """Kinds of messages that get a group beside the context-parallel one, and its backend if not the usual."""
    planned: dict[str, str | None] = {}
    if overlap and topology.outer > 1:
        planned["outer"] = None
    if overlap and topology.ring_size > 1:
        planned["gradients"] = None
    # All ranks of the world have to find the same here: so it is the world's backend that is looked at.
    if host_group and topology.size > 1 and dist.group.WORLD and not carries_cpu_tensors(dist.group.WORLD):
        planned[_HOST] = "gloo"
    return planned


def _make_groups(
    plan: dict[str, str | None], members: list[int], timeout: timedelta | None
) -> dict[str, dist.ProcessGroup]:
    """Make the planned groups over every context-parallel group of the world, in one order; those of this rank.

    members: global ranks of this rank's context-parallel group; empty where it has none.
    """
    if not plan:
        return {}
    # Not new_group(use_local_synchronization=True), which members alone could call: torch names such a group by the
    # number of groups that each rank is in, and hangs where these differ.
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, members)
    made = {}
    for ranks in sorted({tuple(ranks) for ranks in everyone if ranks}):
        for kind, backend in plan.items():
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend, **_UNSORTED)
            if list(ranks) == members:
                made[kind] = group
    return made


def _open(group: dist.ProcessGroup) -> None:
    """Have all ranks meet once, see Note [Parents]; gloo's are connected when a group is made.

    Not by a barrier: in a group of several backends it would be the CPU's that is opened.
    """
    kind = accelerator()
    if kind is not None and any(device.type == kind for device in group._device_types):
        dist.all_reduce(torch.zeros(1, device=kind), group=group)


def _agreement_over(group: dist.ProcessGroup) -> Agreement:
    return _agreement(ProcessGroupCommunicator(group).apart)


def _agreement(communicator: ProcessGroupCommunicator) -> Agreement:
    return Agreement(communicator, on_host=communicator.on_host)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors the group carries."""
    kind = "cpu" if carries_cpu_tensors(group) else group._device_types[0].type
    return torch.device(kind, 0 if kind == "cpu" else getattr(torch, kind).current_device())


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long the group's operations wait for other ranks; None, torch's default, where its backend does not say.

    torch keeps it where no public function reads it.
    """
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


def groups_of_world(members: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The groups that all ranks of the world are in, each once and in order. members: of each rank's group.

    Raises ValueError where they do not part the world in equal parts.
    """
    groups = sorted({tuple(each) for each in members})
    covered = sorted(rank for each in groups for rank in each)
    if covered != list(range(len(members))) or len({len(each) for each in groups}) > 1:
        raise ValueError(
            f"the groups {groups} do not part the {len(members)} ranks of the world in equal parts; give each rank the "
            f"one group of that size that it is in."
        )
    return groups
