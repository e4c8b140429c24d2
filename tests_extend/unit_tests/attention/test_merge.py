"""Merging of partial attention: exact in any order of the keys, and with rows that see nothing."""

import itertools

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.kernels import TileOutput
from mindspeed_cp.kernels.places import in_all_samples

EVERY_ROW = slice(None)
HEADS, QUERIES, KEYS, HEAD_SIZE = 2, 5, 12, 4


def scores_and_values(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scores [1, N, S, T] and values [1, N, T, V]."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1, HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)
    return scores.to(dtype), torch.randn(1, HEADS, KEYS, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def block(scores: Tensor, values: Tensor, keys: slice = EVERY_ROW, queries: slice = EVERY_ROW) -> TileOutput:
    """Attention of some queries over some keys, as a kernel gives it."""
    scores = scores[:, :, queries, keys]
    return TileOutput(torch.softmax(scores, dim=-1).nan_to_num(0.0) @ values[:, :, keys], scores.logsumexp(dim=-1))


def merged_of(first: TileOutput) -> MergedOutput:
    """A merge that has begun with a block of all queries."""
    merged = MergedOutput(first.out)
    merged.merge(first, in_all_samples(EVERY_ROW))
    return merged


def assert_same(merged: MergedOutput, expected: TileOutput) -> None:
    for actual, exact in zip(merged.result(torch.float64)[:2], expected[:2], strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", list(itertools.permutations([slice(0, 3), slice(3, 4), slice(4, 9), slice(9, 12)])))
def test_merge_of_disjoint_keys_in_any_order_is_attention_over_all(order):
    scores, values = scores_and_values()
    first, *others = order
    merged = merged_of(block(scores, values, first))
    for keys in others:
        merged.merge(block(scores, values, keys), in_all_samples(EVERY_ROW))
    assert_same(merged, block(scores, values))


def test_merge_of_some_queries_leaves_the_others_as_they_are():
    scores, values = scores_and_values()
    rows = slice(2, QUERIES)
    merged = merged_of(block(scores, values, slice(0, 8)))
    merged.merge(block(scores, values, slice(8, 12), rows), in_all_samples(rows))
    scores[:, :, :2, 8:] = -torch.inf
    assert_same(merged, block(scores, values))


@pytest.mark.parametrize("dead", [slice(0, 8), slice(8, 12)], ids=["dead first", "dead second"])
def test_merge_takes_the_one_block_that_a_row_sees(dead):
    scores, values = scores_and_values()
    scores[:, :, 1:3, dead] = -torch.inf
    merged = merged_of(block(scores, values, slice(0, 8)))
    merged.merge(block(scores, values, slice(8, 12)), in_all_samples(EVERY_ROW))
    assert_same(merged, block(scores, values))


def test_merge_of_rows_that_see_nothing_stays_zero_and_minus_infinity_until_they_see_a_key():
    scores, values = scores_and_values()
    scores[:, :, 1, :8] = -torch.inf
    merged = merged_of(block(scores, values, slice(0, 4)))
    merged.merge(block(scores, values, slice(4, 8)), in_all_samples(EVERY_ROW))
    out, lse, _ = merged.result(torch.float64)
    assert torch.equal(out[:, :, 1], torch.zeros(1, HEADS, HEAD_SIZE, dtype=torch.float64))
    assert torch.equal(lse[:, :, 1], torch.full((1, HEADS), -torch.inf, dtype=torch.float64))
    merged.merge(block(scores, values, slice(8, 12)), in_all_samples(EVERY_ROW))
    assert_same(merged, block(scores, values))


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_merge_of_large_log_sum_exps_neither_overflows_nor_vanishes(size):
    scores, values = scores_and_values()
    expected = block(scores, values)
    merged = merged_of(block(scores + size, values, slice(0, 5)))
    merged.merge(block(scores + size, values, slice(5, 12)), in_all_samples(EVERY_ROW))
    out, lse, _ = merged.result(torch.float64)
    torch.testing.assert_close(out, expected.out, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, expected.lse + size, rtol=0, atol=1e-11)


@pytest.mark.parametrize("later", [5.0, -5.0])
def test_merge_weighs_two_blocks_by_their_exponentials(later):
    ones, lse = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    merged = merged_of(TileOutput(ones, lse))
    merged.merge(TileOutput(3 * ones, lse + later), in_all_samples(EVERY_ROW))
    weight = 1 / (1 + torch.exp(torch.tensor(-later, dtype=torch.float64)))
    assert merged.result(torch.float64).out.item() == pytest.approx((1 - weight + 3 * weight).item(), abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_accumulates_in_fp32_and_rounds_once(dtype):
    scores, values = scores_and_values(torch.float32)
    blocks = [block(scores, values, slice(start, start + 1)) for start in range(KEYS)]
    blocks = [each._replace(out=each.out.to(dtype)) for each in blocks]
    merged, in_fp32 = merged_of(blocks[0]), merged_of(blocks[0]._replace(out=blocks[0].out.float()))
    for each in blocks[1:]:
        merged.merge(each, in_all_samples(EVERY_ROW))
        in_fp32.merge(each._replace(out=each.out.float()), in_all_samples(EVERY_ROW))
    out, lse, state = merged.result(dtype)
    assert (out.dtype, lse.dtype, state) == (dtype, torch.float32, ())
    assert torch.equal(out, in_fp32.result(torch.float32).out.to(dtype))
    assert torch.equal(merged.result(torch.float32).out, in_fp32.result(torch.float32).out)


def test_merge_leaves_its_blocks_as_they_were():
    scores, values = scores_and_values()
    blocks = [block(scores, values, slice(0, 6)), block(scores, values, slice(6, 12))]
    before = [(each.out.clone(), each.lse.clone()) for each in blocks]
    merged_of(blocks[0]).merge(blocks[1], in_all_samples(EVERY_ROW))
    for each, (out, lse) in zip(blocks, before, strict=True):
        assert torch.equal(each.out, out)
        assert torch.equal(each.lse, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_fp32_and_those_of_fp64_in_fp64(dtype):
    assert accumulation_dtype(dtype) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
