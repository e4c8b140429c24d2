"""Merging partial attention results over disjoint keys.

Shapes: B batch, N query heads, S query tokens, V value head size.

Note [Merge]
    Attention over keys A and keys B, each with its log-sum-exp, is exactly attention over both:

        lse = log(exp(lse_A) + exp(lse_B))          out = exp(lse_A - lse) * out_A + exp(lse_B - lse) * out_B

    A row that has seen no key yet has lse = -inf and out = 0. Where both are such, lse stays -inf, and the differences
    would be NaN: they are taken against 0 instead, and both factors are exp(-inf) = 0.
    Sources: FlashAttention arXiv:2205.14135; Ring Attention arXiv:2310.01889; zhuzilin/ring-flash-attention#34.
"""

import torch

from mindspeed_cp.kernels import BlockOutput


class MergedOutput:
    """The attention of some queries over the keys seen so far, accumulated in fp32 (fp64 for fp64 inputs).

    The blocks may come in any order; the first has to be of all queries.
    """

    def __init__(self, first: BlockOutput) -> None:
        dtype = accumulator_dtype(first.out.dtype)
        self._out = first.out.to(dtype, copy=True)
        self._lse = first.lse.to(dtype, copy=True)

    def merge(self, block: BlockOutput, queries: slice) -> None:
        """Add the attention of `queries` over the keys of one more block, see Note [Merge]."""
        out, lse = self._out[:, :, queries], self._lse[:, :, queries]
        merged = torch.logaddexp(lse, block.lse)
        anchor = merged.masked_fill(merged == -torch.inf, 0.0)
        out.mul_(torch.exp(lse - anchor).unsqueeze(-1)).addcmul_(
            block.out.to(out.dtype), torch.exp(block.lse - anchor).unsqueeze(-1)
        )
        lse.copy_(merged)

    def result(self, dtype: torch.dtype) -> BlockOutput:
        """Output in `dtype`, rounded once, and log-sum-exp."""
        return BlockOutput(self._out.to(dtype), self._lse)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
