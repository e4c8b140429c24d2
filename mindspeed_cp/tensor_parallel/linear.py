"""A linear layer in every kind of tensor parallelism: Y = X W^T + b, as Note [Roles] in kinds.py says.

Shapes: B batch, S sequence, I features in, O features out.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mindspeed_cp.tensor_parallel.collectives import Along, check_even, raw_gather, raw_reduce, raw_scatter_sum, share
from mindspeed_cp.tensor_parallel.grid import Axes
from mindspeed_cp.tensor_parallel.kinds import LinearLayouts, Role
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule
from mindspeed_cp.tensor_parallel.panels import Panels, linear_in_panels


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


Gathering = Literal["keep", "again", "panels"]
"""What becomes of gathered operands: kept whole for the backward pass (fewest bytes), gathered again in it (only parts
are kept), or never whole at all but multiplied panel by panel (2D and 2.5D, see panels.py)."""


class Linear(ShardedModule):
    """A linear layer whose weight is sharded as its kind says, and its input and output as the weight asks.

    layouts: of its tensors. plan: what travels.
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
        gathering: Gathering = "keep",
        overlap: bool = True,
    ) -> None:
        """weight: [O, I] and bias: [O], whole. input: how the input lies, as between blocks by default.

        overlap: whether the next panel travels while one is multiplied; the bits are the same.

        Raises ValueError where the kind has no layer for such an input, O or I has uneven parts that would be gathered,
        or `gathering` is not for this kind.
        """
        super().__init__(mesh)
        self.layouts = mesh.kind.linear(mesh.kind.outer if input is None else input)
        self.gathering: Gathering = gathering
        self.plan = LinearPlan.of(self.layouts, mesh)
        self.panels = self._panels(weight.size(1), overlap) if gathering == "panels" else None
        if self.panels is None:
            self._check_even(weight)
        self.keep_part("weight", weight, self.layouts.weight)
        self.keep_part("bias", bias, self.layouts.bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mesh: TensorMesh,
        *,
        input: Layout | None = None,
        gathering: Gathering = "keep",
        overlap: bool = True,
    ) -> "Linear":
        """The same layer as a whole one, which all ranks have alike."""
        return cls(linear.weight, linear.bias, mesh, input=input, gathering=gathering, overlap=overlap)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, I] or [B, I], as `layouts.input` says; returns [B, S, O] or [B, O] as `layouts.output` says.

        Raises ValueError where x lies otherwise.
        """
        if x.layout != self.layouts.input:
            raise ValueError(
                f"this {self.mesh.kind.name} linear layer takes an input with {self.layouts.input}, and is given one "
                f"with {x.layout}; make it for that one, Linear.from_linear(..., input=x.layout)."
            )
        y: Tensor
        if self.panels is None:
            y = _GatheredLinear.apply(x.local, self.weight, self.plan, self.mesh, self.gathering == "keep")
        else:
            y = linear_in_panels(x.local, self.weight, self.mesh, self.panels, self.plan.shared_weight)
        if self.bias is not None:
            y = y + share(self.bias, self.mesh, self.plan.shared_bias)
        return Sharded(y, self.layouts.output)

    def _panels(self, features: int, overlap: bool) -> Panels | None:
        """How panels travel; None where there is one."""
        plan, mesh = self.plan, self.mesh
        if not plan.gathered_input and not plan.gathered_weight and not plan.scattered_output:
            return None
        if [each.dim for each in (*plan.gathered_input, *plan.gathered_weight)] != [-1, 1]:
            raise ValueError(
                f"gathering='panels' is for layers whose input is gathered by features and whose weight by columns, 2d "
                f"and 2.5d, not {mesh.kind.name}; use 'keep' or 'again'."
            )
        (by_features,), (by_columns,) = plan.gathered_input, plan.gathered_weight
        of_input, of_weight = mesh.communicators[by_features.axis,], mesh.communicators[by_columns.axis,]
        assert of_input.size == of_weight.size, (of_input.size, of_weight.size)
        return Panels(of_input, of_weight, features, overlap)

    def _check_even(self, weight: Tensor) -> None:
        """Raise ValueError where parts would be gathered that are not of one size."""
        gathered = {each.axis for each in (*self.plan.gathered_input, *self.plan.gathered_weight)}
        (out, in_), features = self.layouts.weight, self.layouts.input.features
        for placement in ((out, in_), ((), features)):
            check_even(
                "weight",
                weight.shape,
                tuple(axes if gathered.intersection(axes) else () for axes in placement),
                self.mesh.grid,
            )


class _GatheredLinear(torch.autograd.Function):
    """One product of gathered operands; keep: gathered operands, not their parts."""

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
