"""A step of denoising on meshes, and a ring against its kernel and its link: what scripts/bench_diffusion.py measures.

Ranks that outnumber the cores cannot compute side by side, so a block of the transformer is a wait for its
floating-point operations (EmulatedKernel for attention, `wait_until` for the rest); what travels is real, and so is
everything around it.
"""

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_cp.benchmark.kernels import EmulatedKernel, wait_until
from mindspeed_cp.diffusion import (
    Gather,
    GuidanceParallel,
    MeshAttention,
    ParallelMesh,
    Shares,
    Split,
    TransformerPlan,
    guide,
    parallelize,
    split,
)
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.testing.emulated_cluster import Cluster

_START_IN_S = 0.05
Sizes = dict[str, int]


class Case(NamedTuple):
    """Sizes of the transformer, and how many floating-point operations a second the emulated accelerator does."""

    tokens: int = 1024
    heads: int = 8
    head_size: int = 32
    blocks: int = 4
    flops_per_s: float = 2e10

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.heads * self.head_size


class _Block(nn.Module):
    """A block whose products are waits: 24 W^2 for each token (q, k, v, output, and an MLP of 4 W), and attention."""

    def __init__(self, case: Case, attends_itself: bool) -> None:
        super().__init__()
        self._case, self._attends_itself = case, attends_itself

    def forward(self, x: Tensor) -> Tensor:
        """The same tokens."""
        case, start = self._case, time.perf_counter()
        wait_until(start + 24 * case.width**2 * x.size(1) / case.flops_per_s)
        q = x.unflatten(-1, (case.heads, case.head_size)).transpose(1, 2)
        if self._attends_itself:
            start = time.perf_counter()
            wait_until(start + 4 * case.width * x.size(1) ** 2 / case.flops_per_s)
            return x
        return x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class _Transformer(nn.Module):
    def __init__(self, case: Case, attends_itself: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(case, attends_itself) for _ in range(case.blocks))
        self.final = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The same tokens."""
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.final(x)
        return out


_PLAN = TransformerPlan(splits=(Split("blocks.0", "x"),), gathers=(Gather("final", "x"),))


def _timed(run: Any, start: float) -> float:
    wait_until_wall(start)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def wait_until_wall(moment: float) -> None:
    """Return when time.time(), which all ranks share, reaches `moment`."""
    wait_until(time.perf_counter() + moment - time.time())


def _common_start() -> float:
    """A moment that all ranks wait for, so that none has a head start."""
    moment = torch.tensor([time.time() + _START_IN_S], dtype=torch.float64)
    dist.broadcast(moment, 0)
    return float(moment)


@functools.cache
def _groups(size: int) -> dist.ProcessGroup:
    """In a rank's process: its group of so many neighbours."""
    world = range(0, dist.get_world_size(), size)
    groups: list[dist.ProcessGroup] = [dist.new_group(list(range(first, first + size))) for first in world]
    return groups[dist.get_rank() // size]


@functools.cache
def _prepared(sizes: tuple[tuple[str, int], ...], case: Case) -> tuple[nn.Module, GuidanceParallel]:
    number = 1
    for _, size in sizes:
        number *= size
    mesh = ParallelMesh(**dict(sizes), group=_groups(number))  # type: ignore[arg-type]
    model = _Transformer(case, attends_itself=mesh.shape.sequence == 1)
    parallelize(model, mesh, _PLAN, kernels=KernelRegistry((EmulatedKernel(case.flops_per_s),)))
    return model, GuidanceParallel(mesh)


def measure_step(sizes: tuple[tuple[str, int], ...], case: Case) -> float:
    """In a rank's process: seconds of a guided step of two branches on a mesh; other groups of ranks do the same."""
    model, guidance = _prepared(sizes, case)
    # Random, so that ranks do not find the same keys everywhere, which need no messages.
    generator = torch.Generator().manual_seed(0)
    branches = [{"x": torch.randn(1, case.tokens, case.width, generator=generator)} for _ in range(2)]

    def step() -> None:
        guidance(model, branches, lambda negative, positive: guide(positive, negative, 3.0))

    with torch.no_grad():
        return _timed(step, _common_start())


class RingTimes(NamedTuple):
    """Seconds of one attention over a ring: as it is, with a kernel that takes no time, and of the kernel alone."""

    ring: float
    link: float
    kernel: float


def measure_ring(case: Case, kernel_s: float) -> RingTimes:
    """In a rank's process: of the slowest rank. kernel_s: how long the kernel takes in all."""
    mesh = _ring_mesh()
    shares = Shares.of(case.tokens, mesh.shape.ring)
    x = torch.zeros(1, case.heads, case.tokens, case.head_size)
    q = split(x, mesh, dim=2).contiguous()
    flops = 4 * case.width * case.tokens**2 / mesh.shape.ring
    seconds = []
    with torch.no_grad():
        for rate in (flops / kernel_s, float("inf")):
            attention = MeshAttention(mesh, KernelRegistry((EmulatedKernel(rate),)))
            attention(q, q, q, shares=shares)
            seconds.append(_timed(lambda attention=attention: attention(q, q, q, shares=shares), _common_start()))
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ring_s, link_s = slowest.tolist()
    return RingTimes(ring_s, link_s, kernel_s)


@functools.cache
def _ring_mesh() -> ParallelMesh:
    return ParallelMesh(ring=dist.get_world_size())


def steps(cluster: Cluster, settings: list[Sizes], case: Case, repeats: int) -> dict[str, float]:
    """Median seconds of a step on each mesh, of the slowest rank; meshes take turns."""
    runs: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for sizes in settings:
            seconds = max(cluster.call(measure_step, tuple(sizes.items()), case))
            if turn:  # The first one asks, and makes groups.
                runs.setdefault(name_of(sizes), []).append(seconds)
    return {name: statistics.median(each) for name, each in runs.items()}


def name_of(sizes: Sizes) -> str:
    """In words."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one rank"


def rings(cluster: Cluster, case: Case, ratios: list[float], repeats: int) -> dict[float, RingTimes]:
    """Of a ring over all ranks, for several ratios of link to kernel; the median by the ring's time."""
    ranks, network = cluster.network.num_ranks, cluster.network
    # K and V of a share in fp32, to the next rank, one time less than there are ranks.
    bits = (ranks - 1) * 2 * case.tokens // ranks * case.width * 32
    link = bits / (network.fast_mbit * 1e6)
    found: dict[float, list[RingTimes]] = {ratio: [] for ratio in ratios}
    for _ in range(repeats):
        for ratio in ratios:
            found[ratio].append(cluster.call(measure_ring, case, link / ratio)[0])
    return {ratio: sorted(each)[len(each) // 2] for ratio, each in found.items()}
