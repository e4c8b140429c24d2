"""Overlap changes when messages travel, and no bit of what is computed."""

import pytest
import torch

from mindspeed_cp.attention import RingAttention
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.layouts import Balanced
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Transport, cheapest_transport
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests.dealt import zigzag
from unit_tests.plan_cases import PlanCase, attend_virtually


@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.ALL_GATHER])
def test_gradients_between_inner_rings_are_added_in_one_order(transport):
    layout, grid = zigzag([3, 5, 2, 4, 6, 1, 7, 2, 3, 4, 2, 5], [[44]]), CPTopology(outer=3, inner=2)
    without, with_overlap = (
        attend_virtually(PlanCase(layout, grid, transport=transport, overlap=overlap, dtype=torch.float32))
        for overlap in (False, True)
    )
    for one, other in zip(without, with_overlap, strict=True):
        assert all(map(torch.equal, one, other))


def test_it_decides_nothing_where_the_heads_are_worked_on_in_pieces():
    layout, ring = Balanced(4, ((2, 13, 21, 13, 5, 40),)), RingSchedule(1, 4)
    plan = AttentionPlan(layout, layout)
    assert cheapest_transport(plan, ring) is not cheapest_transport(plan, ring, ahead=True)
    q = torch.zeros(1, 2, layout.num_tokens(0), 8)
    case = TileCase.of(q, q, q, TileTerms(1.0))
    without, with_overlap = (
        RingAttention(ring, pieces=2, overlap=overlap).forward_pass(plan, case) for overlap in (False, True)
    )
    assert without.transport is with_overlap.transport
