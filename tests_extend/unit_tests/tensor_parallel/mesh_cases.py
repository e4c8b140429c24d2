"""Meshes of every kind and of all sizes that tests ask for."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_cp.attention import RingCommunicators, compose_attention
from mindspeed_cp.comm import VirtualCommunicator
from mindspeed_cp.tensor_parallel import on_virtual_ranks, plan_mesh
from mindspeed_cp.tensor_parallel.checkpoint import gather_parts
from mindspeed_cp.testing.rank_pool import LIMIT_S


class MeshCase(NamedTuple):
    """Arguments of plan_mesh."""

    kind: str
    ranks: int
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}-{self.ranks}" + "".join(f"-{axis}{size}" for axis, size in self.sizes)

    def batch(self, micro_batch: int) -> int:
        """Samples of all ranks, where each rank has so many."""
        kind, grid = plan_mesh(self.kind, self.ranks, **dict(self.sizes))
        return micro_batch * grid.size_of(kind.outer.batch)

    def run(self, function):
        """What `function(mesh)` returns on each virtual rank."""
        return on_virtual_ranks(function, *plan_mesh(self.kind, self.ranks, **dict(self.sizes)), timeout_s=LIMIT_S)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random ones in fp64, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """The same numbers in its parameters on every rank."""
    for seed, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.copy_(numbers(*parameter.shape, seed=seed) * scale)
    return module


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those of the whole parameters, by name, on every rank."""
    return gather_parts(module, {name: each.grad for name, each in module.named_parameters()})


def assert_close(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """On every rank what is expected, to 1e-12."""
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def xy(x: int, y: int, **around: int) -> MeshCase:
    """A mesh of x*y ranks, once for each rank around it."""
    sizes = {"x": x, "y": y, **around}
    ranks = 1
    for size in sizes.values():
        ranks *= size
    return MeshCase("xy", ranks, tuple(sizes.items()))


MESHES = [
    *(MeshCase(kind, ranks) for kind in ("1d", "1d-sp") for ranks in (1, 4)),
    *(MeshCase("2d", ranks) for ranks in (1, 4, 9)),
    *(MeshCase("2.5d", ranks, (("depth", depth),)) for ranks, depth in ((4, 1), (4, 4), (8, 2))),
    *(MeshCase("3d", ranks) for ranks in (1, 8, 27)),
    *(xy(x, y) for x, y in ((2, 2), (4, 1), (1, 4), (4, 2), (3, 2))),
    xy(2, 2, context=2),
    MeshCase("2d", 8, (("data", 2),)),
]


_RING = ("inner", "outer", "gradients")


def virtual_attention(config, group, traffic=None):
    """What build_attention gives over a process group, over virtual ranks."""

    def on(ranks, channel):
        world_ranks = [group.ranks[rank] for rank in ranks]
        return VirtualCommunicator(group.world, world_ranks, group.ranks[group.rank], channel, traffic)

    grid = config.topology
    ring = grid.ring_ranks(group.rank)
    return compose_attention(
        config,
        rank=group.rank,
        ulysses=on(grid.ulysses_ranks(group.rank), "ulysses") if grid.ulysses > 1 else None,
        ring=RingCommunicators(*(on(ring, name) for name in ("inner", "outer", "gradients")))
        if len(ring) > 1
        else None,
    )
