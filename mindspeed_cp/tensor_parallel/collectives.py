"""What ranks along an axis do with a tensor: raw, and as differentiable functions in dual pairs.

Note [Duals]
    Where a tensor is replicated along an axis, so is its gradient, whole on each rank. Then each function's gradient is
    another one of the same kind:

        gather          a rank's part -> all parts, each for itself      backward: reduce-scattered
        scatter_sum     a part of each sum -> the sum, in parts          backward: gathered
        reduce          a part of each sum -> the sum on all ranks       backward: nothing
        share           what all ranks have -> the same                  backward: all-reduced, since each rank used it
                                                                         for a part of the work

Axes of one rank do nothing. Several axes are taken one after the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm import reduction
from mindspeed_cp.tensor_parallel.grid import Axes, Grid, Part, part
from mindspeed_cp.tensor_parallel.layout import Layout, Placement, Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh


class Along(NamedTuple):
    """An axis, and the dim of a tensor that it cuts."""

    axis: str
    dim: int


def raw_gather(x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
    """The parts of all ranks along an axis, joined along a dim."""
    size = mesh.size_of((along.axis,))
    if size == 1:
        return x
    parts: Tensor = mesh.communicators[along.axis,].all_gather(x.contiguous())
    dim = along.dim % x.dim()
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def raw_scatter_sum(x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
    """This rank's part, along a dim, of the sum over all ranks along an axis."""
    size = mesh.size_of((along.axis,))
    if size == 1:
        return x
    dim = along.dim % x.dim()
    parts = x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    return reduction.reduce_scatter(mesh.communicators[along.axis,], parts)


def raw_reduce(x: Tensor, mesh: TensorMesh, axes: Axes) -> Tensor:
    """The sum over all ranks along these axes."""
    for axis in axes:
        if mesh.size_of((axis,)) > 1:
            x = reduction.all_reduce(mesh.communicators[axis,], x)
    return x


def gather(x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
    """See Note [Duals]. The axis is the last of those that cut the dim."""
    return x if _alone(mesh, (along.axis,)) else _call(_Gather, x, mesh, along)


def scatter_sum(x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
    """See Note [Duals]."""
    return x if _alone(mesh, (along.axis,)) else _call(_ScatterSum, x, mesh, along)


def reduce(x: Tensor, mesh: TensorMesh, axes: Axes) -> Tensor:
    """See Note [Duals]."""
    return x if _alone(mesh, axes) else _call(_Reduce, x, mesh, axes)


def share(x: Tensor, mesh: TensorMesh, axes: Axes) -> Tensor:
    """See Note [Duals]."""
    return x if _alone(mesh, axes) else _call(_Share, x, mesh, axes)


def _alone(mesh: TensorMesh, axes: Axes) -> bool:
    return mesh.size_of(axes) == 1


def _call(function: type[torch.autograd.Function], x: Tensor, *settings: object) -> Tensor:
    result: Tensor = function.apply(x, *settings)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
        ctx.mesh, ctx.along = mesh, along
        return raw_gather(x, mesh, along)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return raw_scatter_sum(grads[0], ctx.mesh, ctx.along), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
        ctx.mesh, ctx.along = mesh, along
        return raw_scatter_sum(x, mesh, along)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return raw_gather(grads[0], ctx.mesh, ctx.along), None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: TensorMesh, axes: Axes) -> Tensor:
        return raw_reduce(x, mesh, axes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: TensorMesh, axes: Axes) -> Tensor:
        ctx.mesh, ctx.axes = mesh, axes
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return raw_reduce(grads[0], ctx.mesh, ctx.axes), None, None


def shard_tensor(whole: Tensor, placement: Placement, mesh: TensorMesh) -> Tensor:
    """This rank's part of a whole tensor; the last parts of a dim are smaller where the axes do not divide it."""
    local = whole
    for dim, axes in enumerate(placement):
        own = own_part(whole.size(dim), axes, mesh)
        local = local.narrow(dim, own.start, own.size)
    return local.contiguous()


def own_part(total: int, axes: Axes, mesh: TensorMesh) -> Part:
    """This rank's part of so many things, cut along these axes one after the other."""
    own = Part(0, total)
    for axis in axes:
        within = part(own.size, mesh.size_of((axis,)), mesh.index((axis,)))
        own = Part(own.start + within.start, within.size)
    return own


def gather_tensor(local: Tensor, placement: Placement, mesh: TensorMesh) -> Tensor:
    """The whole tensor on all ranks, from the parts of all; the inverse of shard_tensor, uneven parts included."""
    for dim, axes in enumerate(placement):
        for axis in reversed(axes):
            local = _gather_uneven(local, mesh, Along(axis, dim))
    return local


def _gather_uneven(local: Tensor, mesh: TensorMesh, along: Along) -> Tensor:
    if mesh.size_of((along.axis,)) == 1:
        return local
    own = torch.tensor([local.size(along.dim)], device=local.device)
    sizes = raw_gather(own, mesh, Along(along.axis, 0)).tolist()
    if len(set(sizes)) == 1:
        return raw_gather(local, mesh, along)
    padding = list(local.shape)
    padding[along.dim] = max(sizes) - local.size(along.dim)
    padded = torch.cat([local, local.new_zeros(padding)], along.dim)
    parts = raw_gather(padded, mesh, along).split(max(sizes), along.dim)
    return torch.cat([each.narrow(along.dim, 0, size) for each, size in zip(parts, sizes, strict=True)], along.dim)


def check_even(name: str, shape: Sequence[int], placement: Placement, grid: Grid) -> None:
    """Raise ValueError where the axes do not divide a dim of a whole tensor, with sizes that they divide."""
    for dim, axes in enumerate(placement):
        size = grid.size_of(axes)
        if shape[dim] % size:
            below = shape[dim] // size * size
            fitting = " or ".join(str(number) for number in (below, below + size) if number)
            raise ValueError(
                f"dim {dim} of {name} {tuple(shape)} is cut in {size} parts along {' and '.join(axes)}, which do not "
                f"divide it; use {fitting}."
            )


def shard(whole: Tensor, layout: Layout, mesh: TensorMesh, *, uneven: bool = False) -> Sharded:
    """This rank's part of an activation [B, S, H] or [B, H] that all ranks have.

    uneven: whether the last parts may be smaller, or empty, which layers can take that gather no rows.

    Raises ValueError where the mesh does not divide the sizes and parts may not be uneven.
    """
    placement = layout.placement(whole.dim())
    if not uneven or mesh.kind.moves_rows:
        check_even("an activation", whole.shape, placement, mesh.grid)
    return Sharded(shard_tensor(whole, placement, mesh), layout)


def unshard(x: Sharded, mesh: TensorMesh) -> Tensor:
    """The whole activation, on all ranks; for looking at it, without gradients."""
    with torch.no_grad():
        return gather_tensor(x.local, x.layout.placement(x.local.dim()), mesh)
