"""Attention of the tokens that one rank has in hand: a block kernel as a differentiable function.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T key tokens, D key head size, V value head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.call import default_scale
from mindspeed_cp.kernels import KERNELS, BlockCase, BlockKernel, BlockMask, BlockOutput, KernelRegistry, MaskKind


@dataclass(frozen=True)
class LocalAttention:
    """Attention within one rank.

    causal: whether a query sees only itself and earlier keys; else it sees all of them, or what `visible` says.
    kernels: what to choose from.
    """

    causal: bool
    kernels: KernelRegistry = KERNELS

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """See Attention. It takes whatever fits together."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """See Attention. Raises ValueError where a causal attention is given a mask."""
        mask = self._mask(visible)
        kernel = self.kernels.choose(BlockCase.of(q, k, v, mask))
        out: Tensor = _BlockAttention.apply(q, k, v, mask, kernel, default_scale(q) if scale is None else scale)
        return out

    def _mask(self, visible: Tensor | None) -> BlockMask:
        if visible is None:
            return BlockMask(MaskKind.TRIANGLE if self.causal else MaskKind.NONE)
        if self.causal:
            raise ValueError(
                "a causal attention takes no mask tensor: it would be one of the two; build it with "
                "attention_mask_type='general' to use the tensor."
            )
        return BlockMask(MaskKind.ARBITRARY, visible)


class _BlockAttention(torch.autograd.Function):
    """A kernel's forward and backward pass; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kernel: BlockKernel, scale: float
    ) -> Tensor:
        output = kernel.forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask.visible, output.out, output.lse, *output.state)
        ctx.mask_kind, ctx.kernel, ctx.scale = mask.kind, kernel, scale
        return output.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out, lse, *state = ctx.saved_tensors
        output = BlockOutput(out, lse, tuple(state))
        mask = BlockMask(ctx.mask_kind, visible)
        grads = ctx.kernel.backward(grad_outputs[0], q, k, v, output, mask, ctx.scale)
        return *grads, None, None, None
