"""A linear layer in every kind of tensor parallelism: Y = X W^T + b, as Note [Roles] in kinds.py says.

Shapes: B batch, S sequence, I features in, O features out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mindspeed_cp.tensor_parallel.collectives import Along, raw_gather, raw_reduce, raw_scatter_sum, share
from mindspeed_cp.tensor_parallel.grid import Axes
from mindspeed_cp.tensor_parallel.kinds import LinearLayouts, Role
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule


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


class Linear(ShardedModule):
    """A linear layer whose weight is sharded as its kind says, and its input and output as the weight asks.

    layouts: of its tensors. keep_gathered: whether what is gathered for the forward pass is kept for the backward pass,
    or only the parts, which are then gathered again: less memory for more bytes.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mesh: TensorMesh,
        *,
        input: Layout | None = None,
        keep_gathered: bool = True,
    ) -> None:
        """weight: [O, I] and bias: [O], whole. input: how the input lies, as between blocks by default.

        Raises ValueError where the kind has no layer for such an input, or the grid does not divide O or I.
        """
        super().__init__(mesh)
        self.layouts = mesh.kind.linear(mesh.kind.outer if input is None else input)
        self.keep_gathered = keep_gathered
        self.plan = LinearPlan.of(self.layouts, mesh)
        self.keep_part("weight", weight, self.layouts.weight)
        self.keep_part("bias", bias, self.layouts.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mesh: TensorMesh, *, input: Layout | None = None, keep_gathered: bool = True
    ) -> "Linear":
        """The same layer as a whole one, which all ranks have alike."""
        return cls(linear.weight, linear.bias, mesh, input=input, keep_gathered=keep_gathered)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, I] or [B, I], as `layouts.input` says; returns [B, S, O] or [B, O] as `layouts.output` says.

        Raises ValueError where x lies otherwise.
        """
        if x.layout != self.layouts.input:
            raise ValueError(
                f"this {self.mesh.kind.name} linear layer takes an input with {self.layouts.input}, and is given one "
                f"with {x.layout}; make it for that one, Linear.from_linear(..., input=x.layout)."
            )
        y: Tensor = _GatheredLinear.apply(x.local, self.weight, self.plan, self.mesh, self.keep_gathered)
        if self.bias is not None:
            y = y + share(self.bias, self.mesh, self.plan.shared_bias)
        return Sharded(y, self.layouts.output)


class _GatheredLinear(torch.autograd.Function):
    """One product of gathered operands; keep: see Linear.keep_gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: LinearPlan, mesh: TensorMesh, keep: bool) -> Tensor:
        whole_x, whole_weight = _gathered(x, mesh, plan.gathered_input), _gathered(weight, mesh, plan.gathered_weight)
        ctx.plan, ctx.mesh, ctx.keep = plan, mesh, keep
        ctx.save_for_backward(*((whole_x, whole_weight) if keep else (x, weight)))
        y = _summed(F.linear(whole_x, whole_weight), mesh, plan.scattered_output)
        return raw_reduce(y, mesh, plan.reduced_output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, mesh = ctx.plan, ctx.mesh
        (x, weight), dx, dweight = ctx.saved_tensors, None, None
        dy = _gathered(grads[0], mesh, plan.scattered_output)
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight if ctx.keep else _gathered(weight, mesh, plan.gathered_weight))
            dx = raw_reduce(_summed(dx, mesh, plan.gathered_input), mesh, plan.shared_input)
        if ctx.needs_input_grad[1]:
            x = x if ctx.keep else _gathered(x, mesh, plan.gathered_input)
            dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2)
            dweight = raw_reduce(_summed(dweight, mesh, plan.gathered_weight), mesh, plan.shared_weight)
        return dx, dweight, None, None, None


def _gathered(part: Tensor, mesh: TensorMesh, plan: tuple[Along, ...]) -> Tensor:
    for along in plan:
        part = raw_gather(part, mesh, along)
    return part


def _summed(parts: Tensor, mesh: TensorMesh, plan: tuple[Along, ...]) -> Tensor:
    """What undoes `_gathered` in the backward pass."""
    for along in reversed(plan):
        parts = raw_scatter_sum(parts, mesh, along)
    return parts
