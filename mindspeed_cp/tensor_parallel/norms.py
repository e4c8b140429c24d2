"""LayerNorm and RMSNorm over features that may be sharded. What they are given is left as it is.

Shapes: B batch, S sequence, H features.
"""

import torch
from torch import Tensor, nn

from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.tensor_parallel.collectives import reduce, share
from mindspeed_cp.tensor_parallel.layout import Layout, Sharded
from mindspeed_cp.tensor_parallel.mesh import TensorMesh
from mindspeed_cp.tensor_parallel.module import ShardedModule


class _Norm(ShardedModule):
    """What both have: weights that lie as the features do, and means over all features, in fp32."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        mesh: TensorMesh,
        *,
        features: int,
        eps: float | None,
        input: Layout | None = None,
    ) -> None:
        """weight, bias: [H], whole, or None. features: H. input: how it lies, as between blocks by default.

        eps: None is the smallest step of the dtype that is computed in, as nn.RMSNorm has it.
        """
        super().__init__(mesh)
        self.layout = mesh.kind.outer if input is None else input
        self.features, self.eps = features, eps
        self.keep_part("weight", weight, (self.layout.features,))
        self.keep_part("bias", bias, (self.layout.features,))

    def _check(self, x: Sharded) -> None:
        if x.layout != self.layout:
            raise ValueError(
                f"this norm takes an input with {self.layout}, and is given one with {x.layout}; make it for that one, "
                f"with input=x.layout."
            )

    def _mean(self, x: Tensor) -> Tensor:
        """Over the features of all ranks: two collectives of one number a row in each pass."""
        total = reduce(x.sum(dim=-1, keepdim=True), self.mesh, self.layout.features)
        return share(total, self.mesh, self.layout.features) / self.features

    def _reciprocal_root(self, mean_square: Tensor) -> Tensor:
        eps = torch.finfo(mean_square.dtype).eps if self.eps is None else self.eps
        return (mean_square + eps).rsqrt()

    def _scaled(self, normed: Tensor, dtype: torch.dtype) -> Sharded:
        for parameter, apply in ((self.weight, torch.mul), (self.bias, torch.add)):
            if parameter is not None:
                normed = apply(normed, share(parameter, self.mesh, self.layout.rows))
        return Sharded(normed.to(dtype), self.layout)


class LayerNorm(_Norm):
    """nn.LayerNorm over the last dim."""

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm, mesh: TensorMesh, *, input: Layout | None = None) -> "LayerNorm":
        """The same norm as a whole one, which all ranks have alike. Raises ValueError for one over several dims."""
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"a LayerNorm over the dims {tuple(norm.normalized_shape)}; flatten them into one.")
        return cls(norm.weight, norm.bias, mesh, features=norm.normalized_shape[0], eps=norm.eps, input=input)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, H] or [B, H]. Raises ValueError where it lies otherwise than this norm was made for."""
        self._check(x)
        whole = x.local.to(accumulation_dtype(x.local.dtype))
        centered = whole - self._mean(whole)
        return self._scaled(centered * self._reciprocal_root(self._mean(centered.square())), x.local.dtype)


class RMSNorm(_Norm):
    """nn.RMSNorm over the last dim."""

    @classmethod
    def from_norm(cls, norm: nn.RMSNorm, mesh: TensorMesh, *, input: Layout | None = None) -> "RMSNorm":
        """The same norm as a whole one, which all ranks have alike. Raises ValueError for one over several dims."""
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"an RMSNorm over the dims {tuple(norm.normalized_shape)}; flatten them into one.")
        return cls(norm.weight, None, mesh, features=norm.normalized_shape[0], eps=norm.eps, input=input)

    def forward(self, x: Sharded) -> Sharded:
        """x: [B, S, H] or [B, H]. Raises ValueError where it lies otherwise than this norm was made for."""
        self._check(x)
        whole = x.local.to(accumulation_dtype(x.local.dtype))
        return self._scaled(whole * self._reciprocal_root(self._mean(whole.square())), x.local.dtype)
