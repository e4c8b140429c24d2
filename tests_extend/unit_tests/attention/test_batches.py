"""Batches at random, of every layout and mask, through attention on virtual ranks against dense attention."""

import random
from itertools import accumulate

import pytest
import torch

from mindspeed_cp.batch import PackedBatch
from unit_tests.call_cases import run_virtually
from unit_tests.dense import Result, assert_equal_to, dense_attention
from unit_tests.layout_cases import random_samples
from unit_tests.ring_cases import case_on, grids

LAYOUTS = ("contiguous", "zigzag", "zigzag_by_document", "balanced")


def random_mask(rng, lengths):
    """What from_cu_seqlens is told, and whether query i of a document sees its key j."""
    kind = rng.choice(["causal", "full", "prefix", "window", "each"])
    if kind == "prefix":
        prefixes = [rng.randrange(length + 1) for length in lengths]
        return {"mask_type": kind, "prefix_lengths": prefixes}, lambda d, i, j: (j <= i) | (j < prefixes[d])
    if kind == "window":
        window = left, right = rng.randrange(-1, 6), rng.randrange(-1, 3)
        return {
            "window_size": window
        }, lambda d, i, j: ((i - j <= left) | (left < 0)) & ((j - i <= right) | (right < 0))
    if kind == "each":
        windows = [(rng.randrange(9), 0) for _ in lengths]
        return {"window_size": windows}, lambda d, i, j: (j <= i) & (i - j <= windows[d][0])
    return {"mask_type": kind}, lambda d, i, j: (j <= i) | (kind == "full")


def visible_of(samples, padded, rule):
    """[B, 1, S, S] by the definition; padding sees nothing and is not seen."""
    visible, document = [], 0
    for lengths in samples:
        blocks = []
        for place, length in enumerate(lengths):
            i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
            is_padding = padded and place % 2
            seen = torch.zeros(length, length) if is_padding else rule(document, i, j)
            blocks.append(torch.as_tensor(seen, dtype=torch.bool).expand(length, length))
            document += not is_padding
        visible.append(torch.block_diag(*blocks).bool())
    return torch.stack(visible).unsqueeze(1)


def check(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    padded, num_ranks = rng.random() < 0.3, rng.randrange(2, 9)
    samples = random_samples(rng, padded)
    every = 2 if padded else 1
    told, rule = random_mask(rng, [length for lengths in samples for length in lengths[::every]])
    ends = [[0, *accumulate(lengths[::every])] for lengths in samples]
    whole = [[0, *accumulate(map(sum, zip(lengths[::2], lengths[1::2], strict=True)))] for lengths in samples if padded]
    layout = LAYOUTS[seed % len(LAYOUTS)]
    batch = PackedBatch.from_cu_seqlens(ends, num_ranks, cu_seqlens_padded=whole or None, layout=layout, **told)
    topology = rng.choice(grids(num_ranks))
    heads, length = 2 * topology.ulysses, sum(samples[0])
    shapes = ((heads, 4), (heads // 2, 4), (heads // 2, 6), (heads, 6))
    q, k, v, dout = (
        torch.randn(len(samples), n, length, d, generator=generator, dtype=torch.float64) for n, d in shapes
    )

    def on_rank(attention, rank):
        leaves = [batch.shard(x, rank, dim=2).requires_grad_() for x in (q, k, v)]
        out, lse = attention.with_lse(*leaves, plan=batch.plan)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, batch.shard(dout, rank, dim=2))]

    case = case_on(topology, heads=2, kv_heads=1, overlap=rng.random() < 0.5)
    shards = run_virtually(case, on_rank)
    actual = Result(*(batch.restore(each, dim=2) for each in zip(*shards, strict=True)))
    assert_equal_to(dense_attention(q, k, v, dout, visible=visible_of(samples, padded, rule)), actual)


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_at_random_equals_dense_attention(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 212))
def test_more_batches_at_random_equal_dense_attention(seed):
    check(seed)
