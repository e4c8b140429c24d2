"""Ways to multiply the parts of X and W that ranks hold: whole operands gathered, or panel by panel.

Shapes: X [..., I], W [O, I], Y [..., O], each this rank's part; the product is X W^T over all parts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.tensor_parallel.collectives import Along, raw_gather, raw_reduce, raw_scatter_sum
from mindspeed_cp.tensor_parallel.grid import Axes
from mindspeed_cp.tensor_parallel.kinds import LinearLayouts, Role
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.panels import Homecoming, Route, RowFlow, travelling


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


def multiply(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """Y, differentiable in X and W."""
    y: Tensor = _Multiply.apply(x, weight, product)
    return y


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        y, kept = product.forward(x, weight)
        ctx.save_for_backward(*kept)
        ctx.product = product
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.product.backward(grads[0], *ctx.saved_tensors, needs_dx=ctx.needs_input_grad[0]), None


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
        home = Homecoming(self.routes, overlap=self.overlap)
        for step, (panel_x, panel_weight) in travelling(self.routes, (x, weight), overlap=self.overlap):
            home.send(step, (dy @ panel_weight, _outer(dy, panel_x)))
        dx, dweight = home.sums()
        return Gradients(dx, raw_reduce(dweight, self.mesh, self.plan.shared_weight))


@dataclass(frozen=True)
class RowProduct:
    """Rows of X gathered, and those of Y scattered, piece by piece. W, where it is gathered too, is whole."""

    plan: LinearPlan
    mesh: TensorMesh
    overlap: bool

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See Product."""
        whole_weight = _gathered(weight, self.mesh, self.plan.gathered_weight)
        flow = self._flow(self.plan.gathered_input, self.plan.scattered_output)
        return flow.products(x, lambda rows: F.linear(rows, whole_weight)).sums.wait(), (x, weight)

    def backward(self, dy: Tensor, x: Tensor, weight: Tensor, *, needs_dx: bool) -> Gradients:
        """See Product."""
        plan, mesh = self.plan, self.mesh
        whole_weight = _gathered(weight, mesh, plan.gathered_weight)
        flow = self._flow(plan.scattered_output, plan.gathered_input)
        panels, sums = flow.products(dy, lambda rows: rows @ whole_weight)
        rows = torch.cat([panels[number] for number in sorted(panels)], flow.dim)
        dx, dweight = None, _zeros(whole_weight, whole_weight.shape)
        for number, panel in self._flow(plan.gathered_input, ()).panels(x):
            size = panel.size(flow.dim)
            dweight += _outer(rows.narrow(flow.dim, number * size, size), panel)
            # What was found last has travelled beside this product; it left before the next panel, and comes before it.
            dx = sums.wait() if dx is None else dx
        dweight = _summed(dweight.to(weight.dtype), mesh, plan.gathered_weight)
        return Gradients(dx, raw_reduce(dweight, mesh, plan.shared_weight))

    def _flow(self, gathered: tuple[Along, ...], summed: tuple[Along, ...]) -> RowFlow:
        (dim,) = {along.dim for along in (*self.plan.gathered_input, *self.plan.scattered_output)}
        return RowFlow(self._communicator(gathered), self._communicator(summed), dim, self.overlap)

    def _communicator(self, plan: tuple[Along, ...]) -> Communicator | None:
        return self.mesh.communicators[plan[0].axis,] if plan else None


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
