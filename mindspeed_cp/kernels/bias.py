"""What is added to scores: a bias, and ALiBi's penalty for distance.

Shapes: B batch, N query heads, S queries, T keys.

Source of ALiBi: arXiv:2108.12409; its form for keys on both sides, -slope * |i - j|, is FlashAttention's.
"""

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import TileTerms


def geometric_slopes(num_heads: int) -> list[float]:
    """ALiBi's slope of each head, as its paper has them: a geometric sequence that ends at 2^-8.

    Where the heads are no power of two, the greatest below it comes first, then every second one of twice as many.
    """
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * head / whole) for head in range(1, whole + 1)]
    between = [2.0 ** (-4 * head / whole) for head in range(1, 2 * whole, 2)]
    return slopes + between[: num_heads - whole]


def distances(terms: TileTerms) -> Tensor:
    """|i - j| between the positions of queries and keys, [1 or B, 1, S, T] int64."""
    assert terms.positions is not None, "ALiBi is about positions"
    queries, keys, _ = terms.positions
    return (queries[:, None, :, None] - keys[:, None, None, :]).abs()


def added_to_scores(terms: TileTerms, dtype: torch.dtype) -> Tensor:
    """Bias and ALiBi together, [1 or B, 1 or N, S, T] in `dtype`. There is one of them at least."""
    bias = None if terms.bias is None else terms.bias.to(dtype)
    if terms.alibi_slopes is None:
        assert bias is not None, "nothing is added to these scores"
        return bias
    penalty = -terms.alibi_slopes.to(dtype)[:, None, None] * distances(terms)
    return penalty if bias is None else penalty + bias
