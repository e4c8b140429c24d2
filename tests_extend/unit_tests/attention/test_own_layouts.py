"""A layout of the caller's own: what attention refuses before anything is sent."""

import dataclasses

import pytest
import torch

from mindspeed_cp.attention import ContextParallelAttention, local_attention
from mindspeed_cp.plan import AttentionPlan, Run
from unit_tests.call_cases import ALGORITHMS, run_virtually
from unit_tests.ring_cases import case_on

RUNS = {rank: (Run(0, 4, 4 * rank),) for rank in range(4)}


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """Four tokens on each of four ranks, in the order of ranks where no other runs are given."""

    changed: tuple[tuple[int, tuple[Run, ...]], ...] = ()
    num_ranks: int = 4

    def num_tokens(self, rank: int) -> int:
        return 4

    def runs(self, rank: int) -> tuple[Run, ...]:
        return dict(RUNS | dict(self.changed))[rank]


def attend(queries: Own, keys: Own) -> set[str]:
    """What each rank has to say."""

    def on_rank(attention: ContextParallelAttention, rank: int) -> str:
        x = torch.zeros(1, 2, 4, 8)
        try:
            attention(x, x, x, plan=AttentionPlan(queries, keys))
        except ValueError as error:
            return str(error)
        return "done"

    return set(run_virtually(case_on(ALGORITHMS["ring"]), on_rank))


@pytest.mark.parametrize(
    ("rank", "runs", "message"),
    [
        (2, (Run(0, 4, 7),), "position 7 of document 0, sample None, is held twice: see rank 2"),
        (1, (Run(0, 4, 5),), "position 4 of document 0, sample None, is held by no rank: see rank 1"),
        (3, (Run(0, 3, 12),), "rank 3: runs of sample None end at 3, of 4 tokens"),
    ],
    ids=["twice", "gap", "not all tokens"],
)
def test_keys_that_overlap_or_leave_gaps_are_refused_on_all_ranks(rank, runs, message):
    (said,) = attend(Own(), Own(((rank, runs),)))
    assert message in said


def test_queries_of_some_positions_are_taken_and_tokens_without_one_refused():
    assert attend(Own(((0, (Run(0, 4, 4),)),)), Own()) == {"done"}
    (said,) = attend(Own(((0, (Run(1, 4, 0),)),)), Own())
    assert "rank 0: Run(start=1, stop=4, position=0, document=0, sample=None) does not begin at token 0" in said


def test_a_mask_that_does_not_fit_is_refused_on_one_rank_as_well():
    x, visible = torch.zeros(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="a mask of \\(4, 4\\) is not one for this rank's 8 queries"):
        local_attention(causal=False)(*(torch.zeros(1, 2, 8, 8),) * 3, visible=visible)
    assert local_attention(causal=False)(x, x, x, visible=visible).shape == x.shape
