"""ALiBi goes by positions: batches of which some sequences have nothing, queries of which a part travels."""

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import prefill_plan, prefix_attention, put, take
from mindspeed_cp.plan import CAUSAL, Band

SLOPES = torch.tensor([0.3, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q"])
@pytest.mark.parametrize(
    ("lengths", "behind"),
    [([9, 6, 0], None), ([9, 0], None), ([0, 9, 0, 0], None), ([16, 16], 2), ([16, 9], 2)],
)
def test_positions_of_ragged_batches_and_of_windows_equal_dense_attention(lengths, behind, strategy):
    """A window has part of an owner's queries travel; the last sequences have no token on any rank."""
    size, longest = 4, max(lengths)
    bands = CAUSAL if behind is None else (Band(behind, 0),)
    q, k, v = torch.randn(
        3, len(lengths), 2, longest, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    distance = torch.arange(longest)[:, None] - torch.arange(longest)
    seen = (distance >= 0) & (distance <= (longest if behind is None else behind))
    scores = q @ k.transpose(2, 3) / 2.0 - SLOPES[:, None, None] * distance.abs()
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    plan, world, terms = (
        prefill_plan(lengths, size, bands=bands),
        VirtualWorld(size),
        AttentionTerms(alibi_slopes=SLOPES),
    )

    def run(rank):
        mine = [take(x, layout, rank) for x, layout in ((q, plan.queries), (k, plan.keys), (v, plan.keys))]
        ranks = VirtualCommunicator(world, range(size), rank, "")
        return prefix_attention(*mine, plan=plan, communicator=ranks, strategy=strategy, terms=terms).out

    found = torch.zeros_like(expected)
    for rank, out in enumerate(world.run(run)):
        put(out, found, plan.queries, rank)
    for sample, length in enumerate(lengths):
        torch.testing.assert_close(found[sample, :, :length], expected[sample, :, :length], rtol=0, atol=1e-12)
