"""The ranks of parallel diffusion on a grid: branches of guidance, ring, Ulysses, tensor parallelism.

With cfg=2, ring=1, ulysses=2, tp=1 in the default order (columns of a row are neighbours):

              ulysses 0    ulysses 1
    cfg 0     rank 0       rank 1        the negative branch, each rank half of the tokens
    cfg 1     rank 2       rank 3        the positive branch, likewise

The last axis varies fastest. Tensor parallelism sends the most and cannot hide it, so its ranks are neighbours; Ulysses
comes next, then the ring, whose messages travel behind the kernel; branches meet once a step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mindspeed_cp.comm import (
    Communicator,
    ProcessGroupCommunicator,
    Traffic,
    VirtualCommunicator,
    VirtualWorld,
    groups_of_world,
)

Axis = Literal["cfg", "ring", "ulysses", "tp"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""In the default order: the last varies fastest."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the axes, and their order; integers only.

    cfg: ranks that share the branches of guidance. ring, ulysses: that share the tokens of a sequence. tp: that share
    the weights. order: the axes, the one whose ranks are furthest apart first.

    Raises ValueError for a size below 1, or an order that is not one of the four axes.
    """

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    order: tuple[Axis, ...] = AXES

    def __post_init__(self) -> None:
        for axis in AXES:
            if self.size_of(axis) < 1:
                raise ValueError(f"{axis}={self.size_of(axis)}: an axis has at least one rank; use 1 to leave it out.")
        if sorted(self.order) != sorted(AXES):
            raise ValueError(f"order={self.order} is not an order of {', '.join(AXES)}; give each of them once.")

    def __str__(self) -> str:
        """In words: "cfg=2 x ulysses=2"; axes of one rank are left out."""
        return " x ".join(f"{axis}={self.size_of(axis)}" for axis in self.order if self.size_of(axis) > 1) or "one rank"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(map(self.size_of, AXES))

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one sequence."""
        return self.ring * self.ulysses

    def size_of(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        return int(getattr(self, axis))

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Where `rank` stands along an axis."""
        after = self.order[self.order.index(axis) + 1 :]
        return rank // math.prod(map(self.size_of, after)) % self.size_of(axis)

    def ranks_along(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """The ranks that differ from `rank` along this axis alone, itself among them, in the order of the axis."""
        step = math.prod(map(self.size_of, self.order[self.order.index(axis) + 1 :]))
        first = rank - step * self.coordinate(rank, axis)
        return tuple(first + step * place for place in range(self.size_of(axis)))


class ParallelMesh:
    """One rank's place on the grid, and its group along each axis.

    cfg, ring, ulysses, tp, order: see MeshShape. group: the ranks, those of the world where it is None; a program
    without process groups is a mesh of one rank. device_type: of the tensors, as torch's DeviceMesh has it ("cpu",
    "cuda", "npu"); that of the accelerator in use by default, else "cpu".

    Made by all ranks of the world, each with its own of the groups of one size that part it. Raises ValueError, on
    every rank, where the axes do not make up the group, or ranks ask for different meshes.
    """

    def __init__(
        self,
        *,
        cfg: int = 1,
        ring: int = 1,
        ulysses: int = 1,
        tp: int = 1,
        order: Sequence[Axis] = AXES,
        group: dist.ProcessGroup | None = None,
        device_type: str | None = None,
    ) -> None:
        self.shape = MeshShape(cfg=cfg, ring=ring, ulysses=ulysses, tp=tp, order=tuple(order))
        self.rank = 0
        self.traffic: dict[Axis, Traffic] = {axis: Traffic() for axis in AXES}
        self.device_mesh: DeviceMesh | None = None
        self._communicators: dict[Axis, Communicator] = {}
        if group is None:
            group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if group is None:
            _check_product(self.shape, 1, "there is no process group, which makes it one rank")
            return
        members = sorted(dist.get_process_group_ranks(group))
        self.rank = members.index(dist.get_rank())
        groups = _all_groups(self.shape, members)
        _check_product(self.shape, len(members), f"the group has {len(members)} ranks")
        device_type = device_type or _device_type(group)
        ranks = torch.tensor(groups).view(-1, *map(self.shape.size_of, self.shape.order))
        self.device_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("group", *self.shape.order))[self.shape.order]
        for axis in AXES:
            if self.shape.size_of(axis) > 1:
                along = self.device_mesh.get_group(axis)
                self._communicators[axis] = ProcessGroupCommunicator(along, self.traffic[axis])

    @classmethod
    def virtual(cls, shape: MeshShape, world: VirtualWorld, rank: int) -> "ParallelMesh":
        """The mesh of one of the virtual ranks of a world."""
        mesh = cls()
        mesh.shape, mesh.rank = shape, rank
        for axis in AXES:
            if shape.size_of(axis) > 1:
                ranks = shape.ranks_along(rank, axis)
                mesh._communicators[axis] = VirtualCommunicator(world, ranks, rank, axis, mesh.traffic[axis])
        return mesh

    def __repr__(self) -> str:
        return f"rank {self.rank} of a mesh {self.shape}"

    @property
    def communicators(self) -> Mapping[Axis, Communicator]:
        """This rank's group along each axis of more than one rank."""
        return self._communicators

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The process group along an axis; None where it has one rank, or the ranks are virtual."""
        return getattr(self._communicators.get(axis), "group", None)

    def index(self, axis: Axis) -> int:
        """Where this rank stands along an axis."""
        return self.shape.coordinate(self.rank, axis)

    @property
    def sequence_index(self) -> int:
        """This rank's number among those that share the tokens: a Ulysses group's are neighbours."""
        return self.index("ring") * self.shape.ulysses + self.index("ulysses")

    def all_gather(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        """`x` of every rank along these axes, [ranks, *x.shape]; the last axis varies fastest."""
        rows = x.unsqueeze(0)
        for axis in reversed(axes):
            if axis in self._communicators:
                rows = self._communicators[axis].all_gather(rows.contiguous()).flatten(0, 1)
        return rows

    def __deepcopy__(self, memo: object) -> "ParallelMesh":
        """The same object: a module that is copied stays in its groups, which its process has once."""
        return self


def on_virtual_ranks(
    function: Callable[[ParallelMesh], Result], shape: MeshShape, timeout_s: float = 60.0
) -> list[Result]:
    """What `function(mesh)` returns on each rank of a mesh, all in this process, by rank."""
    world = VirtualWorld(shape.size, timeout_s)
    return world.run(lambda rank: function(ParallelMesh.virtual(shape, world, rank)))


def _check_product(shape: MeshShape, size: int, found: str) -> None:
    if shape.size != size:
        sizes = " x ".join(f"{axis}={shape.size_of(axis)}" for axis in AXES)
        raise ValueError(
            f"{sizes} is {shape.size} ranks and {found}; give axes whose product is {size}, or start {shape.size}."
        )


def _all_groups(shape: MeshShape, members: list[int]) -> list[tuple[int, ...]]:
    """The groups of all ranks of the world. Raises ValueError on every rank where they do not fit each other."""
    # Before anything is refused, which would leave other ranks waiting where it is one rank's alone.
    everyone: list[tuple[MeshShape, tuple[int, ...]]] = [(shape, ())] * dist.get_world_size()
    dist.all_gather_object(everyone, (shape, tuple(members)))
    for rank, (theirs, _) in enumerate(everyone):
        first = everyone[0][0]
        if theirs != first:
            raise ValueError(
                f"rank 0 asks for a mesh {first} in the order {first.order}, and rank {rank} for {theirs} in the order "
                f"{theirs.order}; give all ranks the same."
            )
    return groups_of_world([ranks for _, ranks in everyone])


def _device_type(group: dist.ProcessGroup) -> str:
    """Of the tensors that the group carries; an accelerator's where it carries those of the CPU too."""
    types = [device.type for device in group._device_types]
    return next((each for each in types if each != "cpu" and getattr(torch, each).is_available()), "cpu")
