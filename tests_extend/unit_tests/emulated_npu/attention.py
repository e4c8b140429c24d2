"""npu_fusion_attention and npu_fusion_attention_grad, one sequence at a time, in fp32.

Shapes as in layouts.py; R = N / G query heads share a key/value head. `call` holds the arguments by their names in the
schema.

    scores = scale * Q K^T, natural base; masked ones are REPLACED by -FLT_MAX, not added to
    max    = largest score of a row         sum = sum of exp(score - max)         lse = max + ln(sum)
    P      = exp(scores - max) / sum        out = P V

    delta  = rowsum(dy * attention_in)      dS  = P * (dy V^T - delta)
    dQ     = scale * dS K                   dK  = scale * dS^T Q                   dV  = P^T dy

`scale` is 1.0 unless it is passed, not 1 / sqrt(D). The gradient knows of the forward pass only what it is handed: for
one block of a row's keys, max and sum, out and dy must be those of the whole row. Since max and sum enter only as
exp(score - max) / sum, (lse, 1) may stand for them.

Not emulated, and refused: dropout, pse, sink, and the op's own derivative (which would drop gradients of max and sum).
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from unit_tests.emulated_npu.layouts import (
    Sizes,
    by_sequence,
    output_shape,
    sizes_of,
    statistics_by_sequence,
    statistics_shape,
)
from unit_tests.emulated_npu.masking import masked_pairs
from unit_tests.emulated_npu.rejection import require

FLT_MAX = torch.finfo(torch.float32).max


def fusion_attention(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """out, softmax_max, softmax_sum, softmax_out (empty), seed, offset, numels.

    A row that sees nothing gives out 0, max -FLT_MAX and sum +FLT_MAX (inferred).
    """
    sizes, masks = _checked(call)
    _check_no_tail(call, sizes)
    layout, heads = call.input_layout, sizes.num_heads
    out = torch.full(output_shape(call.query, layout, sizes), torch.nan, dtype=call.query.dtype)
    softmax_max, softmax_sum = (torch.full(statistics_shape(call.query, layout, sizes), torch.nan) for _ in range(2))

    views = zip(
        *_inputs(call, sizes),
        masks,
        by_sequence(out, layout, heads, sizes.queries),
        statistics_by_sequence(softmax_max, layout, call.softmax_layout, heads, sizes.queries),
        statistics_by_sequence(softmax_sum, layout, call.softmax_layout, heads, sizes.queries),
        strict=True,
    )
    for query, key, value, masked, out_view, max_view, sum_view in views:
        if query.size(1) == 0:
            continue
        scores = _scores(query, key, masked, call.scale)
        row_max = scores.amax(dim=-1, keepdim=True)
        exponentials = torch.exp(scores - row_max)
        row_sum = exponentials.sum(dim=-1, keepdim=True)
        dead = masked.all(dim=-1, keepdim=True)
        out_view.copy_((exponentials / row_sum @ value).masked_fill(dead, 0.0))
        max_view.copy_(row_max)
        sum_view.copy_(row_sum.masked_fill(dead, FLT_MAX))
    return out, softmax_max, softmax_sum, call.query.new_empty(0), 0, 0, sizes.num_scores


def fusion_attention_grad(call: SimpleNamespace) -> tuple[Tensor, ...]:
    """dq, dk, dv, dpse (empty), dsink (empty). Rows of T behind the last sequence get gradients 0 (inferred)."""
    sizes, masks = _checked(call)
    _check_saved(call, sizes)
    layout, heads = call.input_layout, sizes.num_heads
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.query, call.key, call.value))
    views = zip(
        *_inputs(call, sizes),
        masks,
        *(by_sequence(x.float(), layout, heads, sizes.queries) for x in (call.dy, call.attention_in)),
        *(
            statistics_by_sequence(x, layout, call.softmax_layout, heads, sizes.queries)
            for x in (call.softmax_max, call.softmax_sum)
        ),
        by_sequence(dq, layout, heads, sizes.queries),
        by_sequence(dk, layout, sizes.num_kv_heads, sizes.keys),
        by_sequence(dv, layout, sizes.num_kv_heads, sizes.keys),
        strict=True,
    )
    for query, key, value, masked, dy, out, row_max, row_sum, dq_view, dk_view, dv_view in views:
        probs = torch.exp(_scores(query, key, masked, call.scale_value) - row_max[..., :1]) / row_sum[..., :1]
        delta = (dy * out).sum(dim=-1, keepdim=True)
        dscores = probs * (dy @ value.mT - delta) * call.scale_value
        dq_view.copy_(dscores @ key)
        dk_view.copy_(_sum_over_shared_heads(dscores.mT @ query, sizes))
        dv_view.copy_(_sum_over_shared_heads(probs.mT @ dy, sizes))
    return dq, dk, dv, call.query.new_empty(0), call.query.new_empty(0)


def _inputs(call: SimpleNamespace, sizes: Sizes) -> list[list[Tensor]]:
    """query [N, S, D], key [N, T, D] and value [N, T, V] of each sequence in fp32; head n reads K/V head n // R."""
    shared = sizes.num_heads // sizes.num_kv_heads
    queries = by_sequence(call.query.float(), call.input_layout, sizes.num_heads, sizes.queries)
    keys, values = (
        [view.repeat_interleave(shared, dim=0) for view in views]
        for views in (
            by_sequence(x.float(), call.input_layout, sizes.num_kv_heads, sizes.keys) for x in (call.key, call.value)
        )
    )
    return [queries, keys, values]


def _sum_over_shared_heads(gradient: Tensor, sizes: Sizes) -> Tensor:
    """[N, T, D] as [G, T, D]: a K/V head's gradient is the sum over the query heads that read it."""
    return gradient.unflatten(0, (sizes.num_kv_heads, -1)).sum(dim=1)


def _scores(query: Tensor, key: Tensor, masked: Tensor, scale: float) -> Tensor:
    """[N, S, T]; masked entries are replaced by the lowest fp32 number, so that a row of them is uniform, not NaN."""
    return (query @ key.mT * scale).masked_fill(masked, -FLT_MAX)


def _checked(call: SimpleNamespace) -> tuple[Sizes, list[Tensor]]:
    """Sizes and masks of a call that both ops accept."""
    query, key, value = call.query, call.key, call.value
    dtypes = [x.dtype for x in (query, key, value)]
    require(len(set(dtypes)) == 1, f"query, key and value differ in dtype: {dtypes}")
    require(query.dtype in (torch.float16, torch.bfloat16, torch.float32), f"{query.dtype}: use fp16, bf16 or fp32")
    needs_derivative = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    require(not needs_derivative, "the op's own derivative is not emulated; call it in an autograd.Function")
    for name in ("pse", "sink", "dropout_mask", "padding_mask", "softmax_in"):
        require(getattr(call, name, None) is None, f"{name} is not emulated")
    require(0 < call.keep_prob <= 1, f"keep_prob {call.keep_prob} is not in (0, 1]")
    require(call.keep_prob == 1, f"keep_prob {call.keep_prob}: dropout is not emulated")
    require(call.inner_precise in (0, 2), f"inner_precise {call.inner_precise}: use 0, or 2 for rows that see no key")
    require(call.softmax_layout in ("", "TND"), f"softmax_layout {call.softmax_layout!r} is neither '' nor 'TND'")
    for_tnd = call.softmax_layout == "" or call.input_layout == "TND"
    require(for_tnd, f"softmax_layout 'TND' is for input_layout TND, not {call.input_layout}")
    sizes = sizes_of(call)
    return sizes, masked_pairs(call, sizes)


def _check_no_tail(call: SimpleNamespace, sizes: Sizes) -> None:
    if call.input_layout == "TND":
        end, total = max(rows.stop for rows in sizes.queries), call.query.size(0)
        require(end == total, f"the sequences end at row {end} of {total}: what out holds behind them is unknown")


def _check_saved(call: SimpleNamespace, sizes: Sizes) -> None:
    """What the forward pass left for the gradient."""
    expected = output_shape(call.query, call.input_layout, sizes)
    for name in ("dy", "attention_in"):
        x = getattr(call, name)
        require(x is not None, f"{name} is missing")
        require(x.dtype == call.query.dtype, f"{name} is {x.dtype}, query {call.query.dtype}")
        require(x.shape == expected, f"{name} is {tuple(x.shape)}; expected {tuple(expected)}")
    expected = statistics_shape(call.query, call.input_layout, sizes)
    for name in ("softmax_max", "softmax_sum"):
        x = getattr(call, name)
        require(x is not None, f"{name} is missing")
        require(x.dtype == torch.float32, f"{name} is {x.dtype}; it is always fp32")
        require(x.shape == expected, f"{name} is {tuple(x.shape)}; expected {tuple(expected)}")
        require(x.is_contiguous(), f"{name} is not contiguous")
        bits = x.view(torch.int32)  # so that NaN equals NaN
        require(torch.equal(bits, bits[..., :1].expand_as(bits)), f"the 8 copies of {name} differ")
