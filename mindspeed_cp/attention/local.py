"""Attention of the tokens that one rank has in hand: a block kernel as a differentiable function.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T key tokens, D key head size, V value head size.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.kernels import KERNELS, BlockCase, BlockKernel, BlockMask, BlockOutput, KernelRegistry, MaskKind


class Attention(Protocol):
    """Attention over however many ranks: each gives its own tokens' queries, keys and values."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """Attention output of this rank's queries over the keys of all ranks.

        q: [B, N, S, D]; k: [B, G, S, D]; v: [B, G, S, V]; one floating dtype, any strides.
        scale: factor on the scores, 1 / sqrt(D) by default.
        visible: the mask's rows for this rank's queries, [S, T] or [1 or B, 1 or N, S, T] bool with T the tokens of the
            whole sequence in order, True where a query sees a key. Only for attention that was built without a causal
            mask; without it every query sees every key.

        Returns [B, N, S, V] in the dtype of q, differentiable in q, k and v; 0 in rows that see no key.
        """
        ...


@dataclass(frozen=True)
class LocalAttention:
    """Attention within one rank.

    causal: whether a query sees only itself and earlier keys; else it sees all of them, or what `visible` says.
    kernels: what to choose from.
    """

    causal: bool
    kernels: KernelRegistry = KERNELS

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


def check_shards(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
    """Raise ValueError unless these are the shards of one rank, see Attention."""
    BlockCase.of(q, k, v, BlockMask(MaskKind.NONE))
    if q.size(2) != k.size(2):
        raise ValueError(f"a rank's q has {q.size(2)} tokens and its k {k.size(2)}: it gives those of the same tokens.")
    if visible is None:
        return
    if visible.dim() not in (2, 4) or visible.size(-2) != q.size(2):
        raise ValueError(f"a mask of {tuple(visible.shape)} has not a row for each of the rank's {q.size(2)} queries.")
    if visible.dim() == 4 and (visible.size(0) not in (1, q.size(0)) or visible.size(1) not in (1, q.size(1))):
        raise ValueError(f"a mask of {tuple(visible.shape)} does not fit queries of {tuple(q.shape)}.")


def default_scale(q: Tensor) -> float:
    """1 / sqrt(D)."""
    return 1.0 / math.sqrt(q.size(-1))


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
