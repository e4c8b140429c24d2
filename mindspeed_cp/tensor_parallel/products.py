"""Ways to multiply the parts of X and W that ranks hold: whole operands gathered, or panel by panel.

Shapes: X [..., I], W [O, I], Y [..., O], each this rank's part; the product is X W^T over all parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.derivatives import Once
from mindspeed_cp.tensor_parallel.collectives import Along, raw_gather, raw_reduce, raw_scatter_sum
from mindspeed_cp.tensor_parallel.grid import Axes
from mindspeed_cp.tensor_parallel.kinds import LinearLayouts, Role
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.panels import Homecoming, Route, Slice, SliceRoute, row_route, travelling

_SLICES = 8
"""At most. Of n slices 1/n of what travels has no product beside it; but products of small slices are slow."""


@dataclass(frozen=True)
class LinearPlan:
    """What travels in a linear layer, read off its layouts; axes of one rank are left out.

    gathered_input, gathered_weight: before the product, in this order; gradients are reduce-scattered the other way
    round. scattered_output, reduced_output: after it. shared_input, shared_weight: whose gradients are all-reduced.
    """

    gathered_input: tuple[Along, ...]
    gathered_weight: tuple[Along, ...]
    scattered_output: tuple[Along, ...]
    reduced_output: Axes
    shared_input: Axes
    shared_weight: Axes
    shared_bias: Axes

    @classmethod
    def of(cls, layouts: LinearLayouts, mesh: TensorMesh) -> "LinearPlan":
        """The plan of a layer on a mesh."""
        axes = [axis for axis in mesh.grid.axes if mesh.size_of((axis,)) > 1]
        out, _ = layouts.weight

        def playing(role: Role) -> Axes:
            return tuple(axis for axis in axes if layouts.role(axis) is role)

        def input_dim(axis: str) -> int:
            return -1 if axis in layouts.input.features else layouts.input.row_dim(axis)

        return cls(
            tuple(Along(axis, input_dim(axis)) for axis in playing(Role.GATHER_INPUT)),
            tuple(Along(axis, 0 if axis in out else 1) for axis in playing(Role.GATHER_WEIGHT)),
            tuple(Along(axis, layouts.output.row_dim(axis)) for axis in playing(Role.SCATTER_OUTPUT)),
            playing(Role.REDUCE_OUTPUT),
            playing(Role.SHARE_INPUT),
            playing(Role.SHARE_WEIGHT),
            tuple(axis for axis in axes if axis in layouts.output.rows),
        )


class Gradients(NamedTuple):
    """Of X, None where it needs none, and of W."""

    x: Tensor | None
    weight: Tensor


class Product(Protocol):
    """One way to multiply."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Y, and what the backward pass is to be given."""
        ...

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """Gradients for the gradient of Y. x, weight: what the forward pass has kept."""
        ...


def multiply(x: Tensor, weights: Sequence[Tensor], product: Product) -> Tensor:
    """Y of all weights, one after the other in its features, differentiable in X and in each of them."""
    y: Tensor = _Multiply.apply(x, product, *weights)
    return y


_ONCE = Once("a tensor-parallel product", "torch.nn.functional.linear on one rank")


class _Multiply(torch.autograd.Function):
    """Several weights travel and are multiplied as one, and are kept as they are where that one is not sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, *weights: Tensor) -> Tensor:
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        y, (kept_x, kept_weight) = product.forward(x, joined)
        ctx.product, ctx.sizes = product, [weight.size(0) for weight in weights]
        ctx.save_for_backward(kept_x, *(weights if kept_weight is joined else (kept_weight,)))
        return y

    @staticmethod
    @_ONCE.only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        dx, dweight = ctx.product.backward(grads[0], x, joined, needs_dx=ctx.needs_input_grad[0])
        return dx, None, *dweight.split(ctx.sizes)


@dataclass(frozen=True)
class GatheredProduct:
    """One product of whole operands. keep: whether they are kept for the backward pass, or gathered again."""

    plan: LinearPlan
    mesh: TensorMesh
    keep: bool

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        whole_x, whole_weight = self._whole(x, weight)
        y = _summed(F.linear(whole_x, whole_weight), self.mesh, self.plan.scattered_output)
        kept = (whole_x, whole_weight) if self.keep else (x, weight)
        return raw_reduce(y, self.mesh, self.plan.reduced_output), kept

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        plan, mesh, dx = self.plan, self.mesh, None
        dy = _gathered(dy, mesh, plan.scattered_output)
        if not self.keep:
            x, weight = self._whole(x, weight)
        if needs_dx:
            dx = raw_reduce(_summed(dy @ weight, mesh, plan.gathered_input), mesh, plan.shared_input)
        dweight = _summed(_outer(dy, x), mesh, plan.gathered_weight)
        return Gradients(dx, raw_reduce(dweight, mesh, plan.shared_weight))

    def _whole(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan
        return _gathered(x, self.mesh, plan.gathered_input), _gathered(weight, self.mesh, plan.gathered_weight)


@dataclass(frozen=True)
class SquareProduct:
    """2D and 2.5D in panels of X's and W's columns. routes: of X's panels and of W's."""

    plan: LinearPlan
    mesh: TensorMesh
    routes: tuple[Route, Route]
    overlap: bool

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        y = _zeros(x, (*x.shape[:-1], weight.size(0)))
        for _, (panel_x, panel_weight) in travelling(self.routes, (x, weight), overlap=self.overlap):
            y += F.linear(panel_x, panel_weight)
        return y.to(x.dtype), (x, weight)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        home_x, home_weight = (Homecoming(route, overlap=self.overlap) for route in self.routes)
        for step, (panel_x, panel_weight) in travelling(self.routes, (x, weight), overlap=self.overlap):
            home_x.send(step, dy @ panel_weight)
            home_weight.send(step, _outer(dy, panel_x))
        dx, dweight = home_x.sum(), home_weight.sum()
        return Gradients(dx, raw_reduce(dweight, self.mesh, self.plan.shared_weight))


@dataclass(frozen=True)
class RowGatheringProduct:
    """Rows of X gathered panel by panel; each gives its rows of Y. W and dY, where they are gathered too, are whole."""

    plan: LinearPlan
    mesh: TensorMesh
    overlap: bool

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        route, whole_weight = self._route(x), _gathered(weight, self.mesh, self.plan.gathered_weight)
        rows = {
            route.panels[step]: F.linear(panel, whole_weight)
            for step, (panel,) in travelling([route], [x], overlap=self.overlap)
        }
        y = torch.cat([rows[panel] for panel in sorted(rows)], route.dim)
        return _summed(y, self.mesh, self.plan.scattered_output), (x, weight)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        plan, mesh, route = self.plan, self.mesh, self._route(x)
        whole_weight = _gathered(weight, mesh, plan.gathered_weight)
        rows = _gathered(dy, mesh, plan.scattered_output).chunk(len(route.panels), route.dim)
        dweight = _zeros(whole_weight, whole_weight.shape)
        home = Homecoming(route, overlap=self.overlap)
        for step, (panel,) in travelling([route], [x], overlap=self.overlap):
            dy_panel = rows[route.panels[step]]
            home.send(step, dy_panel @ whole_weight)
            dweight += _outer(dy_panel, panel)
        dweight = _summed(dweight.to(weight.dtype), mesh, plan.gathered_weight)
        return Gradients(home.sum(), raw_reduce(dweight, mesh, plan.shared_weight))

    def _route(self, x: Tensor) -> Route:
        (along,) = self.plan.gathered_input
        return row_route(self.mesh.communicators[along.axis,], x.size(along.dim), along.dim)


@dataclass(frozen=True)
class RowScatteringProduct:
    """Rows of Y computed and scattered panel by panel, and those of dY gathered so."""

    plan: LinearPlan
    mesh: TensorMesh
    overlap: bool

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        (along,) = self.plan.scattered_output
        communicator = self.mesh.communicators[along.axis,]
        route = row_route(communicator, x.size(along.dim) // communicator.size, along.dim, own_last=True)
        rows = x.chunk(communicator.size, along.dim)
        home = Homecoming(route, overlap=self.overlap)
        for step, panel in enumerate(route.panels):
            home.send(step, F.linear(rows[panel], weight))
        return home.sum(), (x, weight)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        (along,) = self.plan.scattered_output
        route = row_route(self.mesh.communicators[along.axis,], dy.size(along.dim), along.dim)
        rows, found = x.chunk(len(route.panels), along.dim), {}
        dweight = _zeros(weight, weight.shape)
        for step, (panel,) in travelling([route], [dy], overlap=self.overlap):
            owner = route.panels[step]
            found[owner] = panel @ weight
            dweight += _outer(panel, rows[owner])
        dx = torch.cat([found[owner] for owner in sorted(found)], along.dim)
        return Gradients(dx, raw_reduce(dweight.to(weight.dtype), self.mesh, self.plan.shared_weight))


@dataclass(frozen=True)
class SlicedProduct:
    """Rows of X gathered along one axis and rows of Y scattered along another, slice by slice; see Note [Slices].

    W, where it is gathered too, is whole. by_panels: what takes activations of which there is one slice.
    """

    plan: LinearPlan
    mesh: TensorMesh
    overlap: bool
    by_panels: RowGatheringProduct

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        slices, dim = self._slices(x)
        if len(slices) == 1:
            return self.by_panels.forward(x, weight)
        whole_weight, (gather, scatter) = _gathered(weight, self.mesh, self.plan.gathered_weight), self._routes()
        under_way = _UnderWay(self.overlap)
        for (rows,) in self._arriving([gather], [slices]):
            under_way.add(scatter.scatter(F.linear(rows, whole_weight)))
        return torch.cat(under_way.sums(), dim), (x, weight)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        plan, mesh, (slices, dim) = self.plan, self.mesh, self._slices(x)
        if len(slices) == 1:
            return self.by_panels.backward(dy, x, weight, needs_dx=needs_dx)
        whole_weight, (of_x, of_y) = _gathered(weight, mesh, plan.gathered_weight), self._routes()
        dweight, under_way = _zeros(whole_weight, whole_weight.shape), _UnderWay(self.overlap)
        for dy_rows, x_rows in self._arriving([of_y, of_x], [dy.chunk(len(slices), dim), slices]):
            under_way.add(of_x.scatter(dy_rows @ whole_weight))
            dweight += _outer(dy_rows, x_rows)
        dweight = _summed(dweight.to(weight.dtype), mesh, plan.gathered_weight)
        return Gradients(torch.cat(under_way.sums(), dim), raw_reduce(dweight, mesh, plan.shared_weight))

    def _slices(self, x: Tensor) -> tuple[Sequence[Tensor], int]:
        """Of activations, along the dim of rows that nothing travels along, which [B, H] has not."""
        (along,) = self.plan.gathered_input
        if x.dim() == 2:
            return [x], 0
        dim = 1 if along.dim == 0 else 0
        count = max(count for count in range(1, _SLICES + 1) if x.size(dim) % count == 0)
        return x.chunk(count, dim), dim

    def _routes(self) -> tuple[SliceRoute, SliceRoute]:
        """Of rows of X and of Y."""
        (of_x,), (of_y,) = self.plan.gathered_input, self.plan.scattered_output
        on_x, on_y = (SliceRoute(self.mesh.communicators[each.axis,], each.dim) for each in (of_x, of_y))
        return on_x, on_y

    def _arriving(self, routes: list[SliceRoute], slices: list[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Each slice of all ranks, by operand, while the next one travels."""
        last = len(slices[0]) - 1

        def start(number: int) -> list[Slice]:
            return [route.gather(each[number]) for route, each in zip(routes, slices, strict=True)]

        coming = start(0)
        for number in range(last + 1):
            rows = [each.joined() for each in coming]
            if self.overlap and number < last:
                coming = start(number + 1)
            yield rows
            if not self.overlap and number < last:
                coming = start(number + 1)


class _UnderWay:
    """Slices that are scattered, each while the next one is multiplied, or at once."""

    def __init__(self, overlap: bool) -> None:
        self._overlap, self._sums = overlap, list[Tensor]()
        self._last: Slice | None = None

    def add(self, scattered: Slice) -> None:
        """When a slice has been sent: receive the one before, or this one."""
        self._receive()
        self._last = scattered
        if not self._overlap:
            self._receive()

    def sums(self) -> list[Tensor]:
        """Of all slices."""
        self._receive()
        return self._sums

    def _receive(self) -> None:
        if self._last is not None:
            self._sums.append(self._last.summed())
        self._last = None


def _outer(dy: Tensor, x: Tensor) -> Tensor:
    """dW [O, I] of rows of dY and X."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_zeros(shape, dtype=accumulation_dtype(like.dtype))


def _gathered(part: Tensor, mesh: TensorMesh, plan: tuple[Along, ...]) -> Tensor:
    for along in plan:
        part = raw_gather(part, mesh, along)
    return part


def _summed(parts: Tensor, mesh: TensorMesh, plan: tuple[Along, ...]) -> Tensor:
    """What undoes `_gathered` in the backward pass."""
    for along in reversed(plan):
        parts = raw_scatter_sum(parts, mesh, along)
    return parts
