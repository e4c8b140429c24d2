"""Process groups of each axis of the context-parallel grid."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mindspeed_cp.topology import CPTopology

_OUTER, _GRADIENTS = 1, 2
"""Further groups of the same ring ranks, for messages that must not queue behind others."""


@dataclass(frozen=True)
class RingGroups:
    """The ranks of a ring, in its order, once for each kind of message that must not queue behind another.

    inner: K/V within a window. outer: K/V between windows. gradients: dK/dV.
    """

    inner: dist.ProcessGroup
    outer: dist.ProcessGroup
    gradients: dist.ProcessGroup


@dataclass(frozen=True)
class ContextParallelGroups:
    """The groups that one rank communicates in.

    context_parallel: all ranks that share a sequence.
    ulysses: this rank's neighbours along the Ulysses axis; None where it has none.
    ring: this rank's ring; None where it is alone in it.
    """

    context_parallel: dist.ProcessGroup
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
        timeout: timedelta | None = None,
    ) -> "ContextParallelGroups":
        """The groups of `topology` over the ranks of an existing group, in that group's own order.

        Like torch.distributed.new_group, it is called by all ranks of the world, each with its own context-parallel
        group and the same arguments else; a rank that has none calls `take_part`. Only where nothing but the group
        itself is needed (Ulysses alone, a ring without overlap) may its ranks call it by themselves.

        overlap: K/V within windows, K/V between them and gradients get groups of their own, so that none queues behind
        another; else they share one. timeout: of the groups made, torch's default where it is None.

        Raises ValueError where the group's size is not the topology's.
        """
        check_size(topology, context_parallel)
        plans = _plan(topology, overlap)
        rank, members = dist.get_rank(context_parallel), dist.get_process_group_ranks(context_parallel)
        made = _make_groups(plans, members, timeout)

        def group_of(ranks: tuple[int, ...], copy: int = 0) -> dist.ProcessGroup:
            return made.get((ranks, copy), context_parallel)

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
        return cls(context_parallel, ulysses, ring, tuple(made.values()))

    @staticmethod
    def take_part(topology: CPTopology, *, overlap: bool = False) -> None:
        """What a rank of the world without a context-parallel group calls while the others call `build`."""
        _make_groups(_plan(topology, overlap), [], None)

    def destroy(self) -> None:
        """Destroy the groups that `build` made; the context-parallel group itself is its owner's."""
        for group in self._made:
            dist.destroy_process_group(group)


def check_size(topology: CPTopology, context_parallel: dist.ProcessGroup) -> None:
    """Raise ValueError unless the group has as many ranks as the topology."""
    size = dist.get_world_size(context_parallel)
    if size != topology.size:
        raise ValueError(
            f"the context-parallel group has {size} ranks and the configured topology {topology.size}: configure "
            f"mindspeed_cp and initialize_model_parallel with the same context_parallel_size."
        )


def _plan(topology: CPTopology, overlap: bool) -> list[tuple[tuple[int, ...], int]]:
    """Groups to make beside the context-parallel one: ranks within it, and which copy of them."""
    plan: list[tuple[tuple[int, ...], int]] = []
    if topology.ulysses > 1 and topology.ring_size > 1:
        plan += [(topology.ulysses_ranks(first), 0) for first in range(0, topology.size, topology.ulysses)]
    if topology.ring_size > 1:
        for ranks in (topology.ring_ranks(first) for first in range(topology.ulysses)):
            if topology.ulysses > 1:
                plan.append((ranks, 0))
            if overlap and topology.outer > 1:
                plan.append((ranks, _OUTER))
            if overlap:
                plan.append((ranks, _GRADIENTS))
    return plan


def _make_groups(
    plan: list[tuple[tuple[int, ...], int]], members: list[int], timeout: timedelta | None
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
        for ranks, copy in plan:
            global_ranks = [others[rank] for rank in ranks]
            group = dist.new_group(global_ranks, timeout=timeout)
            if list(others) == members and dist.get_rank() in global_ranks:
                made[ranks, copy] = group
    return made
