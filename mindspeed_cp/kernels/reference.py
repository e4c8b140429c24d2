"""Attention written out in plain torch operations: the oracle that other kernels are held against.

Shapes: B batch, N query heads, G key/value heads, R = N / G, S queries, T keys, D key head size, V value head size.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.kernels.bias import added_to_scores, distances
from mindspeed_cp.kernels.philox import survives
from mindspeed_cp.kernels.protocol import (
    EVERYTHING,
    Positions,
    Term,
    TileCase,
    TileGradients,
    TileOutput,
    TileTerms,
    Window,
    one_at_a_time_reasons,
)

_MOST_BYTES = 2**34
_HELD = 2**24
"""Scores that are held to find the largest, in fp32."""


class ReferenceKernel:
    """Any device, floating dtype, window, mask and term; in fp32, or fp64 for fp64 inputs, and gives what it has.

    It holds all scores of a tile, and so takes none that would be above 16 GiB.
    """

    name = "reference"

    def unsupported_reasons(self, case: TileCase) -> list[str]:
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        """See TileKernel."""
        scores = _scores(q, k, terms).masked
        lse = torch.logsumexp(scores, dim=-1)
        probs = _probabilities(scores, lse)
        survival = _survival(terms, probs)
        out = torch.einsum("bgrst,bgtv->bgrsv", probs if survival is None else probs * survival, v.to(probs.dtype))
        return TileOutput(out.flatten(1, 2), lse.flatten(1, 2))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        """See TileKernel."""
        num_kv_heads = k.size(1)
        scores, softcapped = _scores(q, k, terms)
        probs = _probabilities(scores, _grouped(output.lse, num_kv_heads))
        survival = _survival(terms, probs)
        dtype = probs.dtype
        dout, out, q_grouped = (_grouped(x.to(dtype), num_kv_heads) for x in (dout, output.out, q))

        dv = torch.einsum("bgrst,bgrsv->bgtv", probs if survival is None else probs * survival, dout)
        dprobs = torch.einsum("bgrsv,bgtv->bgrst", dout, v.to(dtype))
        dprobs = dprobs if survival is None else dprobs * survival
        delta = (dout * out).sum(dim=-1, keepdim=True)
        # What is not seen has no gradient, not even 0 * NaN.
        dscores = (probs * (dprobs - delta)).masked_fill(scores == -torch.inf, 0.0)
        _give_gradients_of_terms(dscores, terms)
        if softcapped is not None and terms.softcap is not None:
            dscores = dscores * (1.0 - (softcapped / terms.softcap).square())
        dscores = dscores * terms.scale
        dq = torch.einsum("bgrst,bgtd->bgrsd", dscores, k.to(dtype)).flatten(1, 2)
        dk = torch.einsum("bgrst,bgrsd->bgtd", dscores, q_grouped)
        return TileGradients(dq, dk, dv)


def largest_scores(q: Tensor, k: Tensor, terms: TileTerms) -> Tensor:
    """The largest score of each head as the softmax takes them, [N]; -inf where nothing is seen.

    64 MiB of scores are held at a time: some queries of one sample and K/V head.
    """
    group = q.size(1) // k.size(1)
    largest = q.new_full((q.size(1),), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, after in _portions(q, k, terms):
        told = _of_tokens(terms, rows, keys, after)
        for sample in range(q.size(0)):
            for kv in range(k.size(1)):
                one, heads = slice(sample, sample + 1), slice(kv * group, (kv + 1) * group)
                scores = _scores(q[one, heads, rows], k[one, kv : kv + 1, keys], told.part(one, heads)).masked
                torch.maximum(largest[heads], scores.amax(dim=(0, 1, 3, 4)), out=largest[heads])
    return largest


def _portions(q: Tensor, k: Tensor, terms: TileTerms) -> Iterator[tuple[slice, slice, int]]:
    """Queries and the keys of their tile, and how many queries of the tile come after them."""
    queries_end, keys_end = [0, q.size(2)], [0, k.size(2)]
    if terms.segments is not None:
        queries_end, keys_end = terms.segments.queries.tolist(), terms.segments.keys.tolist()
    for (start, stop), keys in zip(pairwise(queries_end), pairwise(keys_end), strict=True):
        step = max(1, _HELD // (q.size(1) // k.size(1) * max(1, keys[1] - keys[0])))
        for row in range(start, stop, step):
            end = min(row + step, stop)
            yield slice(row, end), slice(*keys), stop - end


def _of_tokens(terms: TileTerms, rows: slice, keys: slice, after: int) -> TileTerms:
    """Those of some of a tile's queries, with so many after them, and of all its keys."""
    left, right = terms.window
    positions = terms.positions
    return replace(
        terms,
        window=Window(None if left is None else left + after, None if right is None else right - after),
        visible=None if terms.visible is None else terms.visible[..., rows, keys],
        bias=None if terms.bias is None else terms.bias[..., rows, keys],
        positions=positions
        and Positions(positions.queries[:, rows], positions.keys[:, keys], positions.samples[:, rows]),
        segments=None,
    )


class _Scores(NamedTuple):
    """[B, G, R, S, T]. masked: as the softmax takes them, -inf where a query does not see a key. softcapped: those that
    come out of the softcap, where there is one.
    """

    masked: Tensor
    softcapped: Tensor | None


def _scores(q: Tensor, k: Tensor, terms: TileTerms) -> _Scores:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bgrsd,bgtd->bgrst", _grouped(q.to(dtype), k.size(1)), k.to(dtype)) * terms.scale
    softcapped = None
    if terms.softcap is not None:
        scores = softcapped = terms.softcap * torch.tanh(scores / terms.softcap)
    if terms.alibi_slopes is not None or terms.bias is not None:
        scores = scores + _grouped_like(added_to_scores(terms, dtype), scores)
    visible = _visible(terms, scores)
    return _Scores(scores if visible is None else scores.masked_fill(~visible, -torch.inf), softcapped)


def _grouped(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, N, ...] as [B, G, R, ...]: query head n reads K/V head n // R."""
    grouped: Tensor = x.unflatten(1, (num_kv_heads, -1))
    return grouped


def _grouped_like(x: Tensor, scores: Tensor) -> Tensor:
    """[1 or B, 1 or N, S, T] so that it broadcasts against scores [B, G, R, S, T]."""
    return _grouped(x, scores.size(1) if x.size(1) > 1 else 1)


def _visible(terms: TileTerms, scores: Tensor) -> Tensor | None:
    """The mask as a tensor that broadcasts against scores [B, G, R, S, T]; None where everything is seen."""
    if terms.visible is None:
        return (
            None
            if terms.window == EVERYTHING
            else terms.window.visible(scores.size(-2), scores.size(-1), scores.device)
        )
    return terms.visible if terms.visible.dim() == 2 else _grouped_like(terms.visible, scores)


def _survival(terms: TileTerms, probs: Tensor) -> Tensor | None:
    """What probabilities [B, G, R, S, T] are multiplied by: 0 where they are dropped; None without dropout."""
    if terms.dropout is None:
        return None
    assert terms.positions is not None, "dropout is drawn by positions"
    queries, keys, samples = (x.expand(probs.size(0), -1) for x in terms.positions)
    surviving = survives(terms.dropout.rate, terms.dropout.key, samples, terms.dropout.heads, queries, keys)
    return _grouped(surviving, probs.size(1)).to(probs.dtype) / (1.0 - terms.dropout.rate)


def _give_gradients_of_terms(dscores: Tensor, terms: TileTerms) -> None:
    """Those of the slopes and of the bias, from that of the scores [B, G, R, S, T] which they are added to."""
    if terms.gradients is None:
        return
    if Term.SLOPE_GRADIENT in terms.terms:
        terms.gradients.add_slopes((dscores.flatten(1, 2) * -distances(terms)).sum(dim=(0, 2, 3)))
    if terms.bias is not None and Term.BIAS_GRADIENT in terms.terms:
        terms.gradients.add_bias(dscores.flatten(1, 2).sum_to_size(terms.bias.shape))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 rather than NaN where a key is not seen: in rows that see none, and where lse is NaN."""
    return torch.exp(scores - lse.unsqueeze(-1).to(scores.dtype)).masked_fill(scores == -torch.inf, 0.0)
