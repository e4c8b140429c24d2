"""npu_ring_attention_update: the merge of two partial results over disjoint keys.

    max = larger of max_1, max_2      s_1 = sum_1 * exp(max_1 - max)      s_2 = sum_2 * exp(max_2 - max)
    sum = s_1 + s_2                   out = out_1 * s_1 / sum + out_2 * s_2 / sum

Rows that see nothing (max -FLT_MAX, sum +FLT_MAX) merge well with rows that see keys. Two of them add up to an infinite
sum, and that merged with a row that sees keys is NaN.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from unit_tests.emulated_npu.layouts import COPIES, by_sequence, packed_rows, statistics_by_sequence
from unit_tests.emulated_npu.rejection import require


def ring_attention_update(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """out in the dtype of the outs, softmax_max and softmax_sum, in the layouts of the inputs."""
    outs = call.prev_attn_out, call.cur_attn_out
    maxima = call.prev_softmax_max, call.cur_softmax_max
    sums = call.prev_softmax_sum, call.cur_softmax_sum
    rows = _checked_rows(call, outs, (*maxima, *sums))
    layout, num_heads = call.input_layout, maxima[0].size(1)
    results = tuple(torch.full_like(x, torch.nan) for x in (outs[0], maxima[0], sums[0]))

    def views(out: Tensor, row_max: Tensor, row_sum: Tensor) -> list[tuple[Tensor, ...]]:
        statistics = (
            statistics_by_sequence(x, layout, call.input_softmax_layout, num_heads, rows) for x in (row_max, row_sum)
        )
        return list(zip(by_sequence(out, layout, num_heads, rows), *statistics, strict=True))

    triples = zip(
        views(outs[0].float(), maxima[0], sums[0]),
        views(outs[1].float(), maxima[1], sums[1]),
        views(*results),
        strict=True,
    )
    for (out_1, max_1, sum_1), (out_2, max_2, sum_2), (out_view, max_view, sum_view) in triples:
        row_max = torch.maximum(max_1, max_2)
        s_1, s_2 = sum_1 * torch.exp(max_1 - row_max), sum_2 * torch.exp(max_2 - row_max)
        row_sum = s_1 + s_2
        weight_1, weight_2 = (s / row_sum for s in (s_1, s_2))
        out_view.copy_(out_1 * weight_1[..., :1] + out_2 * weight_2[..., :1])
        max_view.copy_(row_max)
        sum_view.copy_(row_sum)
    return results


def _checked_rows(call: SimpleNamespace, outs: tuple[Tensor, ...], statistics: tuple[Tensor, ...]) -> list[slice]:
    """The rows of each sequence, empty outside TND."""
    layout, ends = call.input_layout, call.actual_seq_qlen
    require(layout in ("SBH", "TND"), f"input_layout {layout!r} is neither SBH nor TND")
    fits = call.input_softmax_layout in (("", "TND") if layout == "TND" else ("", "SBH"))
    require(fits, f"input_softmax_layout {call.input_softmax_layout!r} does not go with {layout}")
    shapes = [tuple(x.shape) for x in (*outs, *statistics)]
    require(outs[0].dim() == 3 and shapes[0] == shapes[1], f"outs must be 3-D and of one shape: {shapes[:2]}")
    dtypes = [x.dtype for x in outs]
    allowed = dtypes[0] == dtypes[1] and dtypes[0] in (torch.float16, torch.bfloat16, torch.float32)
    require(allowed, f"outs must be of one dtype, fp16, bf16 or fp32: {dtypes}")
    require(all(x.dtype == torch.float32 for x in statistics), "softmax_max and softmax_sum must be fp32")
    require(all(x.is_contiguous() for x in statistics), "softmax_max and softmax_sum must be contiguous")
    require(len(set(shapes[2:])) == 1, f"softmax_max and softmax_sum differ in shape: {shapes[2:]}")
    rank = 4 if layout == "SBH" else 3
    require(statistics[0].dim() == rank, f"softmax_max and softmax_sum must be {rank}-D for {layout}: {shapes[2]}")
    out, num_heads = outs[0], statistics[0].size(1)
    if layout == "SBH":
        fits = shapes[2] == (out.size(1), num_heads, out.size(0), COPIES) and out.size(2) % num_heads == 0
        require(fits, f"{shapes}: expected [S, B, H] and [B, N, S, 8]")
        return []
    require(shapes[2] == (*out.shape[:2], COPIES), f"{shapes}: expected [T, N, D] and [T, N, 8]")
    require(out.size(2) % 64 == 0 and out.size(2) <= 768, f"head size {out.size(2)}: in TND a multiple of 64 up to 768")
    require(ends is not None and ends.dtype == torch.int64, "layout TND needs actual_seq_qlen, an int64 tensor")
    if call.input_softmax_layout == "TND":
        return [slice(0, out.size(0))]
    starts_at_zero = ends.dim() == 1 and len(ends) > 1 and ends[0] == 0 and ends[-1] == out.size(0)
    require(bool(starts_at_zero), f"actual_seq_qlen {ends.tolist()} must run from 0 to {out.size(0)} here")
    return packed_rows("actual_seq_qlen", ends[1:].tolist(), out.size(0))
