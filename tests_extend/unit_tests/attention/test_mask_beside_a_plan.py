"""A boolean mask over shards that a plan deals: any number of tokens a rank, on every algorithm."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention
from mindspeed_cp.batch import PackedBatch
from unit_tests.call_cases import ALGORITHMS, run_virtually
from unit_tests.dense import Result, assert_equal_to, dense_attention
from unit_tests.ring_cases import case_on

LENGTH = 13
SHARDS = PackedBatch.from_cu_seqlens([0, LENGTH], 4, layout="zigzag", mask_type="full")
"""Of 3, 3, 3 and 4 tokens."""


def visible(heads: int) -> Tensor:
    """[B, 1 or N, S, S]: each query sees itself, and about half of the others."""
    seen = torch.rand(2, heads, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    return seen | torch.eye(LENGTH, dtype=torch.bool)


@pytest.mark.parametrize(("algorithm", "heads"), [(name, 1 if name == "ring" else 4) for name in ALGORITHMS])
def test_rows_of_unequal_shards_equal_dense_attention(algorithm, heads):
    generator, topology = torch.Generator().manual_seed(1), ALGORITHMS[algorithm]
    whole = [torch.randn(2, 4, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    mask = visible(heads)

    def on_rank(attention: ContextParallelAttention, rank: int) -> list[Tensor]:
        q, k, v, dout = (SHARDS.shard(x, rank, dim=2) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = attention.with_lse(*leaves, visible=SHARDS.shard(mask, rank, dim=2), plan=SHARDS.plan)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    shards = run_virtually(case_on(topology, heads=4 // topology.ulysses, mask="2d"), on_rank)
    found = Result(*(SHARDS.restore(each, dim=2) for each in zip(*shards, strict=True)))
    assert_equal_to(dense_attention(*whole, visible=mask), found)


def errors(mask_of: Callable[[int], Tensor]) -> set[str]:
    def on_rank(attention: ContextParallelAttention, rank: int) -> str:
        x = torch.zeros(1, 4, SHARDS.layout.num_tokens(rank), 8)
        with pytest.raises(ValueError) as error:
            attention(x, x, x, visible=mask_of(rank), plan=SHARDS.plan)
        return str(error.value)

    return set(run_virtually(case_on(ALGORITHMS["ring"], mask="2d"), on_rank))


def test_rows_of_equal_shards_and_masks_that_differ_between_ranks_are_refused_on_all():
    (message,) = errors(lambda rank: torch.ones(SHARDS.layout.num_tokens(rank), 16, dtype=torch.bool))
    assert "is not one for this rank's 3 queries over the 13 keys of 4 ranks" in message
    (message,) = errors(
        lambda rank: torch.ones(*(() if rank == 2 else (1, 1)), SHARDS.layout.num_tokens(rank), 13, dtype=torch.bool)
    )
    assert "rank 2: " in message and "a mask (tokens, 13)" in message and "a mask (1, 1, tokens, 13)" in message
