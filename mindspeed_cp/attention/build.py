"""One composed attention for a configuration: what runs inside what."""

from collections.abc import Sequence
from types import UnionType

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mindspeed_cp.attention.call import ContextParallelAttention
from mindspeed_cp.attention.interface import Attention
from mindspeed_cp.attention.planned import PlannedAttention
from mindspeed_cp.attention.recomputation import Recomputation
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.ulysses import UlyssesAttention
from mindspeed_cp.comm import Communicator, ContextParallelGroups, RingCommunicators, Traffic
from mindspeed_cp.config import ContextParallelConfig, KVCachePolicy
from mindspeed_cp.kernels import KERNELS, MERGE_KERNELS, KernelRegistry, MergeKernel
from mindspeed_cp.messages import short
from mindspeed_cp.program import KV, Transport
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.sharding import SequenceLayout

KEPT: dict[KVCachePolicy | None, KV] = {None: KV.NEITHER, "half": KV.KEYS, "full": KV.BOTH}
"""What a ring keeps for the backward pass, by the flag."""


def build_attention(
    config: ContextParallelConfig,
    group: dist.ProcessGroup | DeviceMesh | ContextParallelGroups | None = None,
    *,
    layout: SequenceLayout | None = None,
    kernels: KernelRegistry = KERNELS,
    transport: Transport | None = None,
    pieces: int = 1,
    traffic: Traffic | None = None,
    reduce_parameters: bool = False,
    recomputation: Recomputation | None = None,
) -> ContextParallelAttention:
    """Attention over the ranks of a group, as configured.

    group: the context-parallel ranks, a mesh of one dimension of them, or the groups already built over them, or a part
        of these; None is the default group of all ranks, and with one rank no group. Overlap needs groups beside it,
        which all ranks of the world have to make together: see ContextParallelGroups.build, also for what a job of
        NCCL or HCCL alone should build.
    layout: which tokens each rank holds, `config.layout` (zigzag) by default.
    kernels: what to choose from for each block; of these the configured ones, where some are named.
    transport: how a ring's K/V travel; by default as configured, else the cheapest for the plan at hand, see
        `cheapest_transport`.
    pieces: of the K/V heads that a ring works on one after another, so that they travel one by one;
        `planner.best_pieces` finds how many are worth it. They divide the K/V heads of a rank.
    traffic: where to count what this rank sends of its tensors. What ranks agree on beforehand is counted in
        `attention.agreement.communicator.traffic`.
    reduce_parameters: whether the gradients of sinks and slopes are summed over the ranks here, for programs without a
        data-parallel reducer that takes in the context-parallel ranks: with one they would count twice.
    recomputation: of the checkpoints that the attention runs in, which then do not run it again.

    Raises ValueError where the group's size is not `config.context_parallel_size`, a mesh has several dimensions, or
    something is not of the type that is written here.
    """
    _check("config", config, ContextParallelConfig, "a ContextParallelConfig")
    _check("layout", layout, SequenceLayout | None, "a SequenceLayout, or None; another one comes with a call's plan")
    _check("kernels", kernels, KernelRegistry, "a KernelRegistry")
    _check("transport", transport, Transport | None, f"{', '.join(map(str, Transport))}, or None")
    _check("recomputation", recomputation, Recomputation | None, "a Recomputation, or None")
    layout = layout or config.layout
    if config.context_parallel_size == 1 and group is None:
        alone = compose_attention(
            config, rank=0, ulysses=None, ring=None, layout=layout, kernels=kernels, recomputation=recomputation
        )
        return ContextParallelAttention(alone, config, layout, recomputation=recomputation)
    transport = config.transport if transport is None else transport
    groups = _groups(config, group)
    ulysses, ring = groups.along(config.topology, traffic)
    attention = compose_attention(
        config,
        rank=groups.rank,
        ulysses=ulysses,
        ring=None if ring is None else RingCommunicators(*ring),
        layout=layout,
        kernels=kernels,
        transport=transport,
        pieces=pieces,
        recomputation=recomputation,
    )
    parameters = None
    if reduce_parameters:
        parameters = groups.parents[2].subset(range(config.context_parallel_size), traffic)
    return ContextParallelAttention(
        attention, config, layout, groups.agreement, transport, pieces, parameters, recomputation
    )


def _check(name: str, given: object, kind: type | UnionType, way_out: str) -> None:
    """Raise ValueError for an argument of another kind."""
    if not isinstance(given, kind):
        raise ValueError(f"{name}={short(given)} is none; give {way_out}.")


def compose_attention(
    config: ContextParallelConfig,
    *,
    rank: int,
    ulysses: Communicator | None,
    ring: RingCommunicators | None,
    layout: SequenceLayout | None = None,
    kernels: KernelRegistry = KERNELS,
    merge_kernels: Sequence[MergeKernel] = MERGE_KERNELS,
    transport: Transport | None = None,
    pieces: int = 1,
    recomputation: Recomputation | None = None,
) -> Attention:
    """What `build_attention` puts behind its checks, over any kind of communicators: process groups or virtual ranks.

    rank: this rank among all context-parallel ranks. ulysses, ring: its group along either axis of the topology, None
    where that has one rank. merge_kernels: what to choose from for merging a ring's blocks, the preferred first.
    layout, kernels, transport, pieces, recomputation: see build_attention.

    Raises ValueError where the layout is of another size than the topology, or a configured kernel does not exist.
    """
    topology, layout = config.topology, layout or config.layout
    if layout.size != topology.size:
        raise ValueError(
            f"a layout of {layout.size} ranks and a topology of {topology.size}; give "
            f"SequenceLayout(size={topology.size})."
        )
    if config.context_parallel_kernels:
        kernels = kernels.only(config.context_parallel_kernels)
    if config.megatron_cp_in_bnsd:
        kernels = kernels.in_bnsd()
    ring_attention = RingAttention(
        schedule=RingSchedule(outer=topology.outer, inner=topology.inner),
        communicators=ring,
        overlap=config.use_cp_send_recv_overlap,
        kernels=kernels,
        merge_kernels=merge_kernels,
        transport=config.transport if transport is None else transport,
        pieces=pieces,
        kept=KEPT[config.kept_policy],
        recomputation=recomputation,
    )
    attention: RingAttention | UlyssesAttention = ring_attention
    if ulysses is not None:
        attention = UlyssesAttention(
            communicator=ulysses,
            groups=topology.ulysses_groups,
            group=rank // topology.ulysses,
            ring=ring_attention,
        )
    return PlannedAttention(attention, layout, causal=config.attention_mask_type == "causal")


def _groups(
    config: ContextParallelConfig, group: dist.ProcessGroup | DeviceMesh | ContextParallelGroups | None
) -> ContextParallelGroups:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ("cp",)
            raise ValueError(
                f"a DeviceMesh of {group.ndim} dimensions {names} and sizes {tuple(group.shape)} is not one "
                f"context-parallel group; give one dimension of it by name, as mesh[{names[-1]!r}]."
            )
        group = group.get_group()
    if isinstance(group, ContextParallelGroups):
        return group
    group = dist.group.WORLD if group is None else group
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{group!r} is no process group; give one of torch.distributed.new_group, or a DeviceMesh.")
    if group is None:
        raise ValueError("there is no process group yet; call torch.distributed.init_process_group first.")
    return ContextParallelGroups.build(config.topology, group, overlap=config.use_cp_send_recv_overlap)
