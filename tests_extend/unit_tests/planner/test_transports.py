"""Predictions of every transport and plan: all ranks come to their end, and send what their programs say."""

import itertools

import pytest

from mindspeed_cp.layouts import EqualChunks, Zigzag
from mindspeed_cp.plan import FULL, AttentionPlan, Band
from mindspeed_cp.planner import AttentionPass, AttentionShape, Network, predicted_bytes, predicted_seconds
from mindspeed_cp.program import Phase, Transport, cheapest_transport
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology

CONTIGUOUS, ZIGZAG = EqualChunks(6, 4, "contiguous"), EqualChunks(6, 4)
PLANS = {
    "causal zigzag": AttentionPlan(ZIGZAG, ZIGZAG),
    "full": AttentionPlan(ZIGZAG, ZIGZAG, FULL),
    "sliding window": AttentionPlan(CONTIGUOUS, CONTIGUOUS, (Band(5, 0),)),
}
SHAPE = AttentionShape(num_tokens=24, num_heads=2, num_kv_heads=2, head_size=8)
NETWORK = Network(num_ranks=6, ranks_per_node=3, fast_mbit=100.0, slow_mbit=1.0)


def passes(plan: AttentionPlan, transport: Transport | None) -> list[AttentionPass]:
    grids = (CPTopology(inner=6), CPTopology(outer=2, inner=3))
    return [
        AttentionPass(
            topology=grid, shape=SHAPE, phase=phase, flops_per_s=1e6, overlap=overlap, transport=transport, plan=plan
        )
        for grid, phase, overlap in itertools.product(grids, Phase, (False, True))
    ]


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize("plan", PLANS)
def test_all_ranks_come_to_their_end_and_send_what_their_programs_say(plan, transport):
    for each in passes(PLANS[plan], transport):
        sent = [sum(predicted_bytes(NETWORK, each.events(rank), rank)) for rank in range(6)]
        assert sent == [each.program(rank).sent().total() * SHAPE.kv_bytes(1) for rank in range(6)]
        assert each.num_bytes() == sum(sent)
        busy = max(sum(tile.area for owner in range(6) for tile in PLANS[plan].tiles(rank, owner)) for rank in range(6))
        assert predicted_seconds(NETWORK, each.events) > 0.999 * SHAPE.flops(busy, each.phase) / 1e6


def test_where_none_is_named_the_cheapest_is_played():
    far = Zigzag(6, ((12, 12),))
    plan, ring = AttentionPlan(far, far), RingSchedule(outer=1, inner=6)
    cheapest = cheapest_transport(plan, ring)
    assert cheapest is Transport.DIRECT
    by_default, named = passes(plan, None)[0], passes(plan, cheapest)[0]
    assert by_default.program(2) == named.program(2) != passes(plan, Transport.ROTATION)[0].program(2)
