"""Process groups of each axis of the context-parallel grid."""

from dataclasses import dataclass

import torch.distributed as dist

from mindspeed_cp.topology import CPTopology


@dataclass(frozen=True)
class ContextParallelGroups:
    """The groups that one rank communicates in.

    context_parallel: all ranks that share a sequence.
    ulysses: this rank's group along the Ulysses axis.
    """

    context_parallel: dist.ProcessGroup
    ulysses: dist.ProcessGroup

    @classmethod
    def build(cls, topology: CPTopology, context_parallel: dist.ProcessGroup) -> "ContextParallelGroups":
        """The groups of `topology` over the ranks of an existing group, in that group's own order.

        Raises ValueError where the group's size is not the topology's, and NotImplementedError for a ring.
        """
        size = dist.get_world_size(context_parallel)
        if size != topology.size:
            raise ValueError(
                f"the context-parallel group has {size} ranks and the configured topology {topology.size}: configure "
                f"mindspeed_cp and initialize_model_parallel with the same context_parallel_size."
            )
        if topology.ring_size > 1:
            raise NotImplementedError(f"groups of {topology}: rings are not available in this release.")
        return cls(context_parallel=context_parallel, ulysses=context_parallel)
