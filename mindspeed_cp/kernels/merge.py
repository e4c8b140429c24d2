"""Merging partial attention results over disjoint keys, and adding up partial gradients: in place, in plain torch.

Shapes: B batch, N query heads, S query tokens, V value head size.

Note [Merge]
    Attention over keys A and keys B, each with its log-sum-exp, is exactly attention over both:

        weight = 1 / (1 + exp(lse_A - lse_B))
        out = out_A + weight * (out_B - out_A)
        lse = log(exp(lse_A) + exp(lse_B))

    The weight comes from the difference of the two lse alone. exp(lse_B - lse) is the same number on paper, but has the
    rounding error of lse, which grows with its size.
    A row that has seen no key yet has lse = -inf and out = 0. Where both are such, their difference would be NaN: it is
    taken from the lowest number instead, so that the weight is 0 and out stays 0. A NaN of either lse stays one.
    Sources: FlashAttention arXiv:2205.14135; Ring Attention arXiv:2310.01889; zhuzilin/ring-flash-attention#34.
"""

from typing import Protocol

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import TileOutput


class MergeKernel(Protocol):
    """Merges of one more block into what its queries have seen so far, on one kind of device.

    A kernel that cannot honour an argument says so in `unsupported_reasons`; it never leaves one out.
    """

    @property
    def name(self) -> str:
        """The name by which users and messages call it."""
        ...

    def unsupported_reasons(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """Every reason why it cannot merge blocks of this dtype on this device; empty where it can."""
        ...

    def merge_(self, out: Tensor, lse: Tensor, block: TileOutput) -> None:
        """Merge `block` into `out` and `lse`, in place; see Note [Merge].

        out: [B, N, S, V], lse: [B, N, S], fp32 (fp64 for fp64 blocks), any strides: views of a larger result.
        block: of the same queries.
        """
        ...


class TorchMerge:
    """The definition, on any device: a pass over the memory for each operation."""

    name = "torch"

    def unsupported_reasons(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """None: this kernel merges everything."""
        return []

    def merge_(self, out: Tensor, lse: Tensor, block: TileOutput) -> None:
        """See MergeKernel.merge_."""
        tensors = out, lse, block.out, block.lse
        if (size := _portion(out)) >= out.size(2):
            _merge(*tensors)
            return
        for portions in zip(*(x.split(size, dim=2) for x in tensors), strict=True):
            _merge(*portions)


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    # The lowest number does for -inf: -inf less it is -inf, whose weight is 0.
    weight = (block_lse - lse.clamp_min(torch.finfo(lse.dtype).min)).sigmoid_()
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze_(-1))
    torch.logaddexp(lse, block_lse, out=lse)


def add_(total: Tensor, partial: Tensor) -> None:
    """Add partial gradients to their sum, in place.

    total: [B, G, S, D] fp32 (fp64 for fp64), any strides. partial: the same shape, in the input dtype.
    """
    # On an accelerator that is one operation, which casts as it reads and moves no byte too many: no kernel of our own
    # could do with fewer.
    if (size := _portion(total)) >= total.size(2):
        total.add_(partial)
        return
    for part, more in zip(total.split(size, dim=2), partial.split(size, dim=2), strict=True):
        part.add_(more)


_PORTION = 2**20
"""Numbers in a portion, 4 MiB in fp32."""


def _portion(x: Tensor) -> int:
    """Tokens of x [B, N, S, V] that are done at once: some on a CPU, all of them elsewhere.

    On CPUs torch casts bf16 and fp16 into a temporary tensor first. In portions it stays small and in the cache: large
    blocks take a quarter of the time. Elsewhere each portion would be a launch.
    """
    if x.device.type != "cpu" or not x.numel():
        return x.size(2)
    return max(1, _PORTION * x.size(2) // x.numel())
