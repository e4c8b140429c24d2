"""Process groups of each axis of the context-parallel grid."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mindspeed_cp.comm.agreement import Agreement
from mindspeed_cp.comm.communicator import ProcessGroupCommunicator
from mindspeed_cp.topology import CPTopology

_OUTER, _GRADIENTS, _HOST = 1, 2, 3
"""Further groups of the same ranks, for messages that must not queue behind others, or that the host sends."""

_AGREEMENT_TAG = 1
"""Of the messages of agreements; tensors have 0."""

# A group of the user's may have any order, and its places are those of the grid; new_group sorts unless it is told.
# Before it could be told, there were no other groups than sorted ones.
_UNSORTED: dict[str, Any] = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}


class _Planned(NamedTuple):
    """A group to make: its ranks within the context-parallel group, which copy, and its backend if not the usual."""

    ranks: tuple[int, ...]
    copy: int = 0
    backend: str | None = None


@dataclass(frozen=True)
class RingGroups:
    """The ranks of a ring, in its order, once for each kind of message that must not queue behind another.

    inner: K/V within an inner ring. outer: K/V between inner rings. gradients: dK/dV.
    """

    inner: dist.ProcessGroup
    outer: dist.ProcessGroup
    gradients: dist.ProcessGroup


@dataclass(frozen=True)
class ContextParallelGroups:
    """The groups that one rank communicates in.

    context_parallel: all ranks that share a sequence.
    agreement: of all of them; one for all attentions over these groups.
    ulysses: this rank's neighbours along the Ulysses axis; None where it has none.
    ring: this rank's ring; None where it is alone in it.
    """

    context_parallel: dist.ProcessGroup
    agreement: Agreement
    ulysses: dist.ProcessGroup | None
    ring: RingGroups | None
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
        """The groups of `topology` over the ranks of an existing group, in that group's own order.

        Like torch.distributed.new_group, it is called by all ranks of the world, each with its own context-parallel
        group and the same arguments else; a rank that has none calls `take_part`. Only where nothing but the group
        itself is needed (Ulysses alone, a ring without overlap) may its ranks call it by themselves.

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
        planned = _plan(topology, overlap, host_group)
        rank, members = dist.get_rank(context_parallel), dist.get_process_group_ranks(context_parallel)
        made = _make_groups(planned, members, timeout or _timeout_of(context_parallel))

        def group_of(ranks: tuple[int, ...], copy: int = 0) -> dist.ProcessGroup:
            return made.get((ranks, copy), context_parallel)

        agreement = _agreement_over(group_of(tuple(range(topology.size)), _HOST))

        ulysses = group_of(topology.ulysses_ranks(rank)) if topology.ulysses > 1 else None
        ring = None
        if topology.ring_size > 1:
            ranks = topology.ring_ranks(rank)
            inner = group_of(ranks)
            ring = RingGroups(
                inner=inner,
                outer=group_of(ranks, _OUTER) if overlap and topology.outer > 1 else inner,
                gradients=group_of(ranks, _GRADIENTS) if overlap else inner,
            )
        return cls(context_parallel, agreement, ulysses, ring, tuple(made.values()))

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
    """Raise ValueError unless the group has as many ranks as the topology."""
    if dist.get_rank(context_parallel) < 0:
        raise ValueError(
            "this rank is not in the context-parallel group that it is given; where the others build groups, it calls "
            "ContextParallelGroups.take_part."
        )
    size = dist.get_world_size(context_parallel)
    if size != topology.size:
        raise ValueError(
            f"the context-parallel group has {size} ranks and the configured topology {topology.size}: configure "
            f"mindspeed_cp and initialize_model_parallel with the same context_parallel_size."
        )


def _plan(topology: CPTopology, overlap: bool, host_group: bool) -> list[_Planned]:
    """Groups to make beside the context-parallel one."""
    planned: list[_Planned] = []
    if topology.ulysses > 1 and topology.ring_size > 1:
        planned += [_Planned(topology.ulysses_ranks(first)) for first in range(0, topology.size, topology.ulysses)]
    if topology.ring_size > 1:
        for ranks in (topology.ring_ranks(first) for first in range(topology.ulysses)):
            if topology.ulysses > 1:
                planned.append(_Planned(ranks))
            if overlap and topology.outer > 1:
                planned.append(_Planned(ranks, _OUTER))
            if overlap:
                planned.append(_Planned(ranks, _GRADIENTS))
    # All ranks of the world have to find the same here: so it is the world's backend that is looked at.
    if host_group and topology.size > 1 and dist.group.WORLD and not _carries_cpu_tensors(dist.group.WORLD):
        planned.append(_Planned(tuple(range(topology.size)), _HOST, "gloo"))
    return planned


def _make_groups(
    plan: list[_Planned], members: list[int], timeout: timedelta | None
) -> dict[tuple[tuple[int, ...], int], dist.ProcessGroup]:
    """Make the planned groups in every context-parallel group of the world, in one order; those that hold this rank.

    members: global ranks of this rank's context-parallel group; empty where it has none.
    """
    if not plan:
        return {}
    # Not new_group(use_local_synchronization=True), which members alone could call: torch names such a group by the
    # number of groups that each rank is in, and hangs where these differ.
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, members)
    made = {}
    for others in sorted({tuple(ranks) for ranks in everyone if ranks}):
        for ranks, copy, backend in plan:
            global_ranks = [others[rank] for rank in ranks]
            group = dist.new_group(global_ranks, timeout=timeout, backend=backend, **_UNSORTED)
            if list(others) == members and dist.get_rank() in global_ranks:
                made[ranks, copy] = group
    return made


def _agreement_over(group: dist.ProcessGroup) -> Agreement:
    return Agreement(ProcessGroupCommunicator(group, tag=_AGREEMENT_TAG), on_host=_carries_cpu_tensors(group))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """A device whose tensors the group carries."""
    kind = "cpu" if _carries_cpu_tensors(group) else group._device_types[0].type
    return torch.device(kind, 0 if kind == "cpu" else getattr(torch, kind).current_device())


def _carries_cpu_tensors(group: dist.ProcessGroup) -> bool:
    """Whether the group's backend for tensors of the CPU is there: it is not in a job of NCCL or HCCL alone."""
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        return False
    return True


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long the group's operations wait for other ranks; None, torch's default, where its backend does not say.

    torch keeps it where no public function reads it.
    """
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None
