"""A linear layer in every kind of tensor parallelism: Y = X W^T + b, as Note [Roles] in kinds.py says.

Shapes: B batch, S sequence, I features in, O features out.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mindspeed_cp.kernels.precision import autocast_is_on
from mindspeed_cp.tensor_parallel.collectives import check_even, own_part, share
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule
from mindspeed_cp.tensor_parallel.panels import square_routes
from mindspeed_cp.tensor_parallel.products import (
    GatheredProduct,
    LinearPlan,
    Product,
    RowGatheringProduct,
    RowScatteringProduct,
    SlicedProduct,
    SquareProduct,
    multiply,
)

Gathering = Literal["keep", "again", "panels"]
"""What becomes of gathered operands: kept whole for the backward pass (fewest bytes), gathered again in it (only parts
are kept), or never whole at all but multiplied panel by panel (see panels.py)."""


def check_gathering(gathering: str) -> None:
    """Raise ValueError where there is none of this name."""
    if gathering not in get_args(Gathering):
        raise ValueError(f"there is no gathering={gathering!r}; use one of {', '.join(get_args(Gathering))}.")


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

        Raises ValueError where the kind has no layer for such an input, there is no such `gathering`, or O or I has
        uneven parts that would be gathered.
        """
        super().__init__(mesh)
        check_gathering(gathering)
        self.layouts = mesh.kind.linear(mesh.kind.outer if input is None else input)
        self.gathering: Gathering = gathering
        self.plan = LinearPlan.of(self.layouts, mesh)
        self.product = self._product(weight, overlap)
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

        Raises ValueError where x lies otherwise, or has other features.
        """
        (y,) = apply_together([self], x)
        return y

    def _product(self, weight: Tensor, overlap: bool) -> Product:
        """How X and W are multiplied, as `gathering` says."""
        plan, mesh = self.plan, self.mesh
        if self.gathering == "panels":
            # Two travel in 2D and 2.5D, of columns; these may be uneven.
            if [each.dim for each in (*plan.gathered_input, *plan.gathered_weight)] == [-1, 1]:
                (by_features,), (by_columns,) = plan.gathered_input, plan.gathered_weight
                communicators = mesh.communicators[by_features.axis,], mesh.communicators[by_columns.axis,]
                return SquareProduct(plan, mesh, square_routes(*communicators, weight.size(1)), overlap)
            self._check_even(weight)
            if plan.gathered_input and plan.scattered_output:
                return SlicedProduct(plan, mesh, overlap, RowGatheringProduct(plan, mesh, overlap))
            if plan.gathered_input:
                return RowGatheringProduct(plan, mesh, overlap)
            if plan.scattered_output:
                return RowScatteringProduct(plan, mesh, overlap)
        self._check_even(weight)
        return GatheredProduct(plan, mesh, keep=self.gathering == "keep")

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


def apply_together(linears: Sequence[Linear], x: Sharded) -> list[Sharded]:
    """What several linear layers of one mesh, input and `gathering` give for x, which travels once.

    Under torch.autocast they compute in its dtype, as nn.Linear does, and that is also what travels.

    Raises ValueError where x lies otherwise than they were made for or has other features, or some have a bias and
    some have none.
    """
    first, weights = linears[0], [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if x.layout != first.layouts.input:
        raise ValueError(
            f"this {first.mesh.kind.name} linear layer takes an input with {first.layouts.input}, and is given one "
            f"with {x.layout}; make it for that one, Linear.from_linear(..., input=x.layout)."
        )
    width = first.wholes["weight"].shape[1]
    own = own_part(width, first.layouts.input.features, first.mesh).size
    if x.local.size(-1) != own:
        raise ValueError(
            f"this linear layer takes {width} features, of which this rank has {own}, and is given "
            f"{x.local.size(-1)}; shard an activation of {width}."
        )
    if len(biases) not in (0, len(linears)):
        raise ValueError(f"{len(biases)} of {len(linears)} linear layers together have a bias; give all one, or none.")
    assert all(linear.layouts == first.layouts and linear.gathering == first.gathering for linear in linears)
    local, *cast = in_autocast(x.local, *weights, *biases)
    y = multiply(local, cast[: len(weights)], first.product)
    if biases:
        y = y + share(torch.cat(cast[len(weights) :]), first.mesh, first.plan.shared_bias)
    parts = y.split([weight.size(0) for weight in weights], dim=-1)
    return [Sharded(part, first.layouts.output) for part in parts]


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Them in the dtype of torch.autocast where it is on: as it does with the operands of products, all but fp64."""
    device = tensors[0].device.type
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(each if each.dtype is torch.float64 else each.to(dtype) for each in tensors)
