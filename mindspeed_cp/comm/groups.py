"""Process groups of each axis of the context-parallel grid."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from mindspeed_cp.topology import CPTopology


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

        To be called by all ranks of `context_parallel`, and by them alone. overlap: K/V within windows, K/V between
        them and gradients get groups of their own, so that none queues behind another; else they share one. timeout:
        of the groups made, torch's default where it is None.

        Raises ValueError where the group's size is not the topology's.
        """
        size = dist.get_world_size(context_parallel)
        if size != topology.size:
            raise ValueError(
                f"the context-parallel group has {size} ranks and the configured topology {topology.size}: configure "
                f"mindspeed_cp and initialize_model_parallel with the same context_parallel_size."
            )
        rank = dist.get_rank(context_parallel)
        made: list[dist.ProcessGroup] = []

        def group_of(ranks: tuple[int, ...], *, own: bool = False) -> dist.ProcessGroup:
            if len(ranks) == size and not own:
                return context_parallel
            members = [dist.get_global_rank(context_parallel, r) for r in ranks]
            group: dist.ProcessGroup = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
            made.append(group)
            return group

        ulysses = group_of(topology.ulysses_ranks(rank)) if topology.ulysses > 1 else None
        ring = None
        if topology.ring_size > 1:
            ranks = topology.ring_ranks(rank)
            inner = group_of(ranks)
            ring = RingGroups(
                inner=inner,
                outer=group_of(ranks, own=True) if overlap and topology.outer > 1 else inner,
                gradients=group_of(ranks, own=True) if overlap else inner,
            )
        return cls(context_parallel, ulysses, ring, tuple(made))

    def destroy(self) -> None:
        """Destroy the groups that `build` made; the context-parallel group itself is its owner's."""
        for group in self._made:
            dist.destroy_process_group(group)
