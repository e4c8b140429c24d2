"""The ranks of a kind of tensor parallelism, with what they communicate by: process groups, or virtual ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mindspeed_cp.comm import (
    Communicator,
    ProcessGroupCommunicator,
    Traffic,
    VirtualCommunicator,
    VirtualWorld,
    groups_of_world,
)
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.tensor_parallel.grid import Axes, Grid
from mindspeed_cp.tensor_parallel.kinds import KINDS, Kind, KindName, choose_grid

Result = TypeVar("Result")

DATA, CONTEXT = "data", "context"
"""Axes around every kind: replicas that have other samples, and ranks that have other parts of the sequence."""


@dataclass(frozen=True, eq=False, repr=False)
class TensorMesh:
    """One rank's place on the grid of a kind, and its group along each axis.

    kind: its layouts, those of data and context parallelism included. grid: all axes. rank: this rank on the grid.
    communicators: along each axis of more than one rank, and along the axes that shard the sequence within attention,
    joined, where these are several. traffic: what all of them count in.
    group, device_mesh: of all of them, where the ranks are processes.
    """

    kind: Kind
    grid: Grid
    rank: int
    communicators: Mapping[Axes, Communicator]
    traffic: Traffic = field(default_factory=Traffic)
    group: dist.ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None

    @classmethod
    def build(
        cls,
        kind: KindName,
        group: dist.ProcessGroup | None = None,
        *,
        depth: int | None = None,
        x: int | None = None,
        y: int | None = None,
        data: int = 1,
        context: int = 1,
        device_type: str = "cpu",
    ) -> "TensorMesh":
        """The mesh of a kind over the ranks of a group, in ascending order; all of the world where it is None.

        depth, x, y: see choose_grid. data, context: how many replicas have other samples, and how many ranks have other
        parts of the sequence. device_type: of the tensors, as torch's DeviceMesh has it: "cpu", "cuda", "npu".

        Called by all ranks of the world, each with its own of the groups of one size that part it. Raises ValueError
        for sizes that do not fit.
        """
        group = group or dist.group.WORLD
        if group is None:
            raise ValueError("there is no process group yet; call torch.distributed.init_process_group first.")
        # In the order that DeviceMesh gives its groups, whatever the given one's is.
        members = sorted(dist.get_process_group_ranks(group))
        groups = _groups_of_all(members)
        full_kind, grid = plan_mesh(kind, len(members), depth=depth, x=x, y=y, data=data, context=context)
        # torch makes groups on all ranks of the world together: so each makes the mesh of all, and takes its part.
        ranks = torch.tensor(groups).view(-1, *grid.sizes)
        device_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("group", *grid.axes))[grid.axes]
        rank, traffic = members.index(dist.get_rank()), Traffic()
        communicators: dict[Axes, Communicator] = {}
        for axes in communicating(full_kind, grid):
            if len(axes) == 1:
                along = device_mesh.get_group(axes[0])
            else:
                last = [1 + grid.axes.index(axis) for axis in axes]
                turned = ranks.movedim(last, list(range(-len(last), 0))).reshape(-1, grid.size_of(axes))
                along = DeviceMesh(device_type, turned, mesh_dim_names=("others", "joined")).get_group("joined")
            communicators[axes] = ProcessGroupCommunicator(along, traffic)
            assert communicators[axes].rank == grid.index(rank, axes), (axes, rank)
        return cls(full_kind, grid, rank, communicators, traffic, group, device_mesh)

    @classmethod
    def virtual(cls, kind: Kind, grid: Grid, world: VirtualWorld, rank: int) -> "TensorMesh":
        """The mesh of one of the virtual ranks of a world, see plan_mesh for kind and grid."""
        traffic = Traffic()
        communicators = {
            axes: VirtualCommunicator(world, grid.ranks_along(rank, axes), rank, " and ".join(axes), traffic)
            for axes in communicating(kind, grid)
        }
        return cls(kind, grid, rank, communicators, traffic)

    @property
    def within_attention(self) -> Communicator | None:
        """This rank's group along the axes that shard the sequence within a block; None where these are of one rank."""
        axes = tuple(axis for axis in self.kind.inner.sequence if self.size_of((axis,)) > 1)
        return self.communicators[axes] if axes else None

    def size_of(self, axes: Axes) -> int:
        """Number of ranks along these axes together."""
        return self.grid.size_of(axes)

    def index(self, axes: Axes) -> int:
        """Where this rank stands along these axes joined."""
        return self.grid.index(self.rank, axes)

    def __deepcopy__(self, memo: object) -> "TensorMesh":
        """The same object: a module that is copied stays in its groups, which its process has once."""
        return self


def plan_mesh(
    kind: KindName,
    ranks: int,
    *,
    depth: int | None = None,
    x: int | None = None,
    y: int | None = None,
    data: int = 1,
    context: int = 1,
) -> tuple[Kind, Grid]:
    """Layouts and grid of a mesh of so many ranks, see TensorMesh.build. Data-parallel replicas are furthest apart."""
    for name, size in ((DATA, data), (CONTEXT, context)):
        if size < 1 or ranks % size:
            raise ValueError(f"{name}={size} does not divide {ranks} ranks; use {or_list(divisors(ranks))}.")
    if ranks % (data * context):
        raise ValueError(
            f"{DATA}={data} and {CONTEXT}={context} together do not divide {ranks} ranks; use a divisor of "
            f"{ranks // data} for {CONTEXT}."
        )
    inner = choose_grid(kind, ranks // (data * context), depth=depth, x=x, y=y)
    around = tuple((axis, size) for axis, size in ((DATA, data), (CONTEXT, context)) if size > 1)
    full_kind = KINDS[kind].within(batch=(DATA,) * (data > 1), sequence=(CONTEXT,) * (context > 1))
    return full_kind, Grid(full_kind.axes, (*(size for _, size in around), *inner.sizes))


def communicating(kind: Kind, grid: Grid) -> list[Axes]:
    """The axes, and axes joined, along which ranks of a mesh communicate."""
    found: list[Axes] = [(axis,) for axis in grid.axes if grid.size_of((axis,)) > 1]
    within_attention = tuple(axis for axis in kind.inner.sequence if grid.size_of((axis,)) > 1)
    return [*found, within_attention] if len(within_attention) > 1 else found


def on_virtual_ranks(
    function: Callable[[TensorMesh], Result], kind: Kind, grid: Grid, timeout_s: float = 60.0
) -> list[Result]:
    """What `function(mesh)` returns on each rank of a mesh, all in this process, by rank."""
    world = VirtualWorld(grid.size, timeout_s)
    return world.run(lambda rank: function(TensorMesh.virtual(kind, grid, world, rank)))


def _groups_of_all(members: list[int]) -> list[tuple[int, ...]]:
    """The group of every rank of the world, each once; all ranks call it. members: of this rank's.

    Raises ValueError, on all ranks, where they do not part the world in equal parts.
    """
    # Asked before anything is refused, which would leave other ranks waiting where it is one rank's alone.
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, members)
    return groups_of_world(everyone)
