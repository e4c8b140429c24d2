"""Merging partial attention results over disjoint keys, and adding up partial gradients: in place, in plain torch.

Shapes: B batch, N query heads, S query tokens, V value head size.

Note [Merge]
    Attention over keys A and keys B, each with its log-sum-exp, is exactly attention over both:

        a = exp(lse_A - max(lse_A, lse_B))      b = exp(lse_B - max(lse_A, lse_B))
        out = a / (a + b) * out_A + b / (a + b) * out_B
        lse = max(lse_A, lse_B) + log(a + b)

    The factors come from the difference of the two lse alone. exp(lse_A - lse) is the same number on paper, but has the
    rounding error of lse, which grows with its size.
    A row that has seen no key yet has lse = -inf and out = 0. Where both are such, the differences would be NaN: they
    are taken against 0 instead, so that a = b = 0 and lse = log(0) = -inf. There a + b = 0 is no divisor; everywhere
    else it is 1 at least, because one of the two is exp(0): the divisor is max(a + b, 1).
    Sources: FlashAttention arXiv:2205.14135; Ring Attention arXiv:2310.01889; zhuzilin/ring-flash-attention#34.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import BlockOutput


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

    def merge_(self, out: Tensor, lse: Tensor, block: BlockOutput) -> None:
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

    def merge_(self, out: Tensor, lse: Tensor, block: BlockOutput) -> None:
        """See MergeKernel.merge_."""
        for tokens in _pieces(out):
            _merge(*(x[:, :, tokens] for x in (out, lse, block.out, block.lse)))


def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    highest = torch.maximum(lse, block_lse)
    anchor = highest.masked_fill(highest == -torch.inf, 0.0)
    seen, added = torch.exp(lse - anchor), torch.exp(block_lse - anchor)
    both = seen + added
    divisor = both.clamp_min(1.0)
    out.mul_((seen / divisor).unsqueeze(-1)).addcmul_(block_out.to(out.dtype), (added / divisor).unsqueeze(-1))
    lse.copy_(anchor + both.log())


def add_(total: Tensor, partial: Tensor) -> None:
    """Add partial gradients to their sum, in place.

    total: [B, G, S, D] fp32 (fp64 for fp64), any strides. partial: the same shape, in the input dtype.
    """
    # On an accelerator that is one operation, which casts as it reads and moves no byte too many: no kernel of our own
    # could do with fewer.
    for tokens in _pieces(total):
        total[:, :, tokens].add_(partial[:, :, tokens])


_PIECE = 2**20
"""Numbers in a piece, 4 MiB in fp32."""


def _pieces(x: Tensor) -> Iterator[slice]:
    """The tokens of x [B, N, S, V], in pieces on a CPU, all at once elsewhere.

    On CPUs torch casts bf16 and fp16 into a temporary tensor first. In pieces it stays small and in the cache: large
    blocks take a quarter of the time. Elsewhere each piece would be a launch.
    """
    num_tokens = x.size(2)
    fitting = _PIECE * num_tokens // x.numel() if x.device.type == "cpu" and x.numel() else num_tokens
    size = max(1, fitting)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)
