"""One composed attention for a configuration: what runs inside what."""

from collections.abc import Sequence

import torch.distributed as dist

from mindspeed_cp.attention.local import Attention, LocalAttention
from mindspeed_cp.attention.ulysses import UlyssesAttention
from mindspeed_cp.comm import ContextParallelGroups, ProcessGroupCommunicator, Traffic
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KERNELS, BlockKernel
from mindspeed_cp.layout import SequenceLayout


def unavailable_reason(config: ContextParallelConfig) -> str | None:
    """Why this release cannot build the configured attention; None where it can."""
    if config.topology.ring_size == 1:
        return None
    return (
        f"--context-parallel-algo {config.context_parallel_algo} is not available yet in this release of mindspeed_cp; "
        f"use ulysses_cp_algo."
    )


def build_attention(
    config: ContextParallelConfig,
    group: dist.ProcessGroup | ContextParallelGroups | None = None,
    *,
    layout: SequenceLayout | None = None,
    kernels: Sequence[BlockKernel] = KERNELS,
    traffic: Traffic | None = None,
) -> Attention:
    """Attention over the ranks of a group, as configured.

    group: the context-parallel ranks, or the groups already built over them; None is the default group of all ranks.
    layout: which tokens each rank holds, `config.layout` (zigzag) by default.
    kernels: what to choose from for each block, the preferred first.
    traffic: where to count what this rank sends.

    Raises NotImplementedError for algorithms that are not available, ValueError where the group's size is not
    `config.context_parallel_size`.
    """
    if reason := unavailable_reason(config):
        raise NotImplementedError(reason)
    attention: Attention = LocalAttention(causal=config.attention_mask_type == "causal", kernels=kernels)
    if config.context_parallel_size == 1:
        return attention
    layout = layout or config.layout
    groups = _groups(config, group)
    rank = dist.get_rank(groups.context_parallel)
    return UlyssesAttention(
        communicator=ProcessGroupCommunicator(groups.ulysses, traffic),
        chunk_order=layout.gather_order(config.topology.ulysses_ranks(rank)),
        inner=attention,
    )


def _groups(
    config: ContextParallelConfig, group: dist.ProcessGroup | ContextParallelGroups | None
) -> ContextParallelGroups:
    if isinstance(group, ContextParallelGroups):
        return group
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("there is no process group yet; call torch.distributed.init_process_group first.")
    return ContextParallelGroups.build(config.topology, group)
