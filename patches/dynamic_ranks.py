"""Dynamic context parallelism: documents that each have ranks of their own, as many as they are long enough for.

Note [Dynamic ranks]
    With --hybrid-context-parallel a micro-batch is one document, and Megatron's schedule gives it some of the ranks
    that would be data-parallel else: 1, 2, 4 and so on, up to all of them. What says so is PackedSeqParams:
    local_cp_size, and cp_group where these are several. The groups that layers communicate in are made once, over all
    of those ranks; those of a document are a part of them, which needs no process group more (Note [Parents] in
    comm/groups.py). The algorithm is the configured one over so many ranks (`ContextParallelConfig.over`).

    A document is cut as a sample of any length is, a zigzag whose shards differ by a token at most; it is padded
    where it has fewer tokens than ranks alone.
"""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mindspeed_cp.comm import Agreement, ContextParallelGroups
from mindspeed_cp.config import ContextParallelConfig

Members = tuple[int, ...]
"""Which ranks share a document, by their numbers among all that may."""


@dataclass
class DynamicRanks:
    """The ranks among which documents get theirs.

    config: of a document that has all of them. groups: over all; set while Megatron's exist.
    """

    config: ContextParallelConfig
    groups: ContextParallelGroups | None = None
    _parts: dict[Members, ContextParallelGroups] = field(default_factory=dict, repr=False)

    @property
    def spelled(self) -> str:
        """For messages."""
        return f"--hybrid-context-parallel on {self.config.context_parallel_size} ranks"

    def build(self, ranks: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        """Build the groups over all ranks that may share a document. All ranks of the world call it."""
        self.groups = configured_groups(self.config, ranks, timeout)

    def drop(self) -> None:
        """Destroy them."""
        if self.groups is not None:
            self.groups.destroy()
        self.groups = None
        self._parts.clear()

    @property
    def everyone(self) -> dist.ProcessGroup:
        """Megatron's group of all of them."""
        assert self.groups is not None, "nothing is computed but while Megatron's groups exist"
        return self.groups.context_parallel

    def members(self, packed: Any) -> Members:
        """Who shares a document. packed: Megatron's PackedSeqParams of it.

        Raises ValueError where it does not say, or names ranks that are not among these.
        """
        size, group = packed.local_cp_size, packed.cp_group
        if size == 1:
            return (0,)  # Of no group: which rank it is does not matter.
        if group is None or group.size() != size:
            given = "no cp_group" if group is None else f"a cp_group of {group.size()} ranks"
            raise ValueError(f"PackedSeqParams has local_cp_size {size} and {given}; give the group of as many ranks.")
        everyone = dist.get_process_group_ranks(self.everyone)
        global_ranks = dist.get_process_group_ranks(group)
        if not {*global_ranks} <= {*everyone}:
            raise ValueError(
                f"PackedSeqParams has a cp_group of the global ranks {global_ranks}, and documents are shared among "
                f"{everyone}; give one of get_hybrid_data_context_parallel_groups."
            )
        return tuple(map(everyone.index, global_ranks))

    def part(self, members: Members) -> ContextParallelGroups:
        """The groups of those that share a document; this rank is one of them."""
        assert self.groups is not None, "layers attend while Megatron's groups exist"
        if members not in self._parts:
            self._parts[members] = self.groups.part(members)
        return self._parts[members]

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        """Of all parts that this rank has been in."""
        return tuple(part.agreement for part in self._parts.values())

    def __deepcopy__(self, memo: object) -> "DynamicRanks":
        """The same object: a process has its groups once."""
        return self


def configured_groups(
    config: ContextParallelConfig, ranks: dist.ProcessGroup, timeout: timedelta | None = None
) -> ContextParallelGroups:
    """The groups that a configuration needs over these ranks."""
    return ContextParallelGroups.build(
        config.topology,
        ranks,
        overlap=config.use_cp_send_recv_overlap,
        # So that ranks agree without waiting for the accelerator.
        host_group=True,
        timeout=timeout,
    )


def as_sample(packed: Any) -> Any:
    """The same of a document that Megatron has for a packed stream of one: tokens and positions are a sample's then.

    packed: Megatron's PackedSeqParams, or None.
    """
    if packed is None or packed.local_cp_size is None or packed.qkv_format == "sbhd":
        return packed
    return replace(packed, qkv_format="sbhd")
