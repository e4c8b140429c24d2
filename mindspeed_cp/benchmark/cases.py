"""What is measured: the algorithms that fit a shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mindspeed_cp.config import ContextParallelConfig, KVCachePolicy
from mindspeed_cp.messages import divisors
from mindspeed_cp.planner import AttentionShape
from mindspeed_cp.topology import CPTopology

Kind = Literal["single device", "all-gather", "context parallel", "DeepSpeed"]


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A way to compute attention.

    kind: DeepSpeed is its Ulysses. topology: of the ranks; a baseline has a single axis of them. overlap, pieces: as
    the ring is set, see RingAttention. policy: what it keeps, by the flag.
    """

    name: str
    kind: Kind = "context parallel"
    topology: CPTopology
    overlap: bool = False
    pieces: int = 1
    policy: KVCachePolicy | None = None

    @property
    def config(self) -> ContextParallelConfig:
        """The flags that choose it."""
        topology = self.topology
        if topology.ring_size == 1:
            return ContextParallelConfig(context_parallel_size=topology.size)
        return ContextParallelConfig(
            context_parallel_size=topology.size,
            context_parallel_algo="hybrid_cp_algo" if topology.ulysses > 1 else "megatron_cp_algo",
            ulysses_degree_in_cp=topology.ulysses if topology.ulysses > 1 else None,
            cp_window_size=topology.inner if topology.outer > 1 else 1,
            use_cp_send_recv_overlap=self.overlap,
            context_parallel_kv_cache_policy=self.policy,
        )


def algorithms_for(
    shape: AttentionShape,
    num_ranks: int,
    pieces: int = 1,
    policies: Sequence[KVCachePolicy] = (),
    *,
    deepspeed: bool = False,
) -> list[Algorithm]:
    """All that can compute `shape` on so many ranks, the baselines first; rings also in pieces, and such that keep.

    deepspeed: whether its Ulysses is among them.
    """
    everyone = CPTopology(inner=num_ranks)
    found = [
        Algorithm(name="single device", kind="single device", topology=everyone),
        Algorithm(name="all-gather K/V", kind="all-gather", topology=everyone),
    ]
    for ulysses in divisors(num_ranks):
        if shape.num_kv_heads % ulysses or shape.num_heads % ulysses:
            continue
        ring = num_ranks // ulysses
        if ring == 1:
            found.append(Algorithm(name="Ulysses", topology=CPTopology(ulysses=ulysses)))
            if deepspeed:
                found.append(Algorithm(name="Ulysses of DeepSpeed", kind="DeepSpeed", topology=found[-1].topology))
            continue
        grids = {"ring" if ulysses == 1 else f"hybrid {ulysses}x{ring}": CPTopology(inner=ring, ulysses=ulysses)}
        if ulysses == 1:
            for inner in divisors(ring)[1:-1]:
                grids[f"double ring {inner}"] = CPTopology(outer=ring // inner, inner=inner)
        for name, grid in grids.items():
            found.append(Algorithm(name=name, topology=grid))
            found.append(Algorithm(name=f"{name}, overlap", topology=grid, overlap=True))
            for policy in policies:
                found.append(
                    Algorithm(name=f"{name}, overlap, keeps {policy}", topology=grid, overlap=True, policy=policy)
                )
            if pieces > 1 and shape.num_kv_heads // ulysses % pieces == 0:
                in_pieces = f"{name}, overlap, {pieces} pieces"
                found.append(Algorithm(name=in_pieces, topology=grid, overlap=True, pieces=pieces))
    return found
