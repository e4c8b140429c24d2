"""Attention written out in plain torch operations: the oracle that other kernels are held against.

Shapes: B batch, N query heads, G key/value heads, R = N / G, S queries, T keys, D key head size, V value head size.
"""

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import (
    EVERYTHING,
    BlockCase,
    BlockGradients,
    BlockOutput,
    TileTerms,
    one_at_a_time_reasons,
)

_MOST_BYTES = 2**34


class ReferenceKernel:
    """Any device, floating dtype, window and mask; computes in fp32, or fp64 for fp64 inputs, and gives what it has.

    It holds all scores of a tile, and so takes none that would be above 16 GiB.
    """

    name = "reference"

    def unsupported_reasons(self, case: BlockCase) -> list[str]:
        """Why it cannot compute `case`: only its size."""
        itemsize = max(case.dtype.itemsize, torch.float32.itemsize)
        needed = case.num_heads * case.num_queries * case.num_keys * itemsize
        reasons = one_at_a_time_reasons(case)
        if needed <= _MOST_BYTES:
            return reasons
        return [
            *reasons,
            f"holds all scores, {needed / 2**30:.0f} GiB a sample here, and takes {_MOST_BYTES / 2**30:.0f} at most",
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> BlockOutput:
        scores = _masked_scores(q, k, terms)
        lse = torch.logsumexp(scores, dim=-1)
        probs = _probabilities(scores, lse)
        out = torch.einsum("bgrst,bgtv->bgrsv", probs, v.to(probs.dtype))
        return BlockOutput(out.flatten(1, 2), lse.flatten(1, 2))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: BlockOutput, terms: TileTerms
    ) -> BlockGradients:
        num_kv_heads = k.size(1)
        scores = _masked_scores(q, k, terms)
        probs = _probabilities(scores, _grouped(output.lse, num_kv_heads))
        dtype = probs.dtype
        dout, out, q_grouped = (_grouped(x.to(dtype), num_kv_heads) for x in (dout, output.out, q))

        dv = torch.einsum("bgrst,bgrsv->bgtv", probs, dout)
        dprobs = torch.einsum("bgrsv,bgtv->bgrst", dout, v.to(dtype))
        delta = (dout * out).sum(dim=-1, keepdim=True)
        # What is not seen has no gradient, not even 0 * NaN.
        dscores = (probs * (dprobs - delta) * terms.scale).masked_fill(scores == -torch.inf, 0.0)
        dq = torch.einsum("bgrst,bgtd->bgrsd", dscores, k.to(dtype)).flatten(1, 2)
        dk = torch.einsum("bgrst,bgrsd->bgtd", dscores, q_grouped)
        return BlockGradients(dq, dk, dv)


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, N, ...] as [B, G, R, ...]: query head n reads K/V head n // R."""
    grouped: Tensor = x.unflatten(1, (num_kv_heads, -1))
    return grouped


def _masked_scores(q: Tensor, k: Tensor, terms: TileTerms) -> Tensor:
    """Scaled scores, [B, G, R, S, T], -inf where a query does not see a key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bgrsd,bgtd->bgrst", _grouped(q.to(dtype), k.size(1)), k.to(dtype)) * terms.scale
    visible = _visible(terms, scores)
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def _visible(terms: TileTerms, scores: Tensor) -> Tensor | None:
    """The mask as a tensor that broadcasts against scores [B, G, R, S, T]; None where everything is seen."""
    if terms.visible is None:
        return (
            None
            if terms.window == EVERYTHING
            else terms.window.visible(scores.size(-2), scores.size(-1), scores.device)
        )
    if terms.visible.dim() == 2:
        return terms.visible
    num_kv_heads = scores.size(1) if terms.visible.size(1) > 1 else 1
    return _grouped(terms.visible, num_kv_heads)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 rather than NaN where a key is not seen: in rows that see none, and where lse is NaN."""
    return torch.exp(scores - lse.unsqueeze(-1).to(scores.dtype)).masked_fill(scores == -torch.inf, 0.0)
