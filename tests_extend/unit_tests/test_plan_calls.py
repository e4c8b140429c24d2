"""What tiles of packed documents cost on the host: a count of calls, which no load of the machine changes."""

import sys
from functools import partial

import pytest

from mindspeed_cp.benchmark.documents import lognormal_mix
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, Zigzag
from mindspeed_cp.plan import AttentionPlan

DOCUMENTS = lognormal_mix(1, 2**15, mean=2**7)


@pytest.mark.parametrize(
    "layout", [Contiguous, Zigzag, DocumentZigzag, Balanced, partial(Balanced, prefer="balance")], ids=str
)
def test_a_tile_of_packed_documents_costs_fewer_than_three_calls(layout):
    shards = layout(8, (DOCUMENTS,))
    for rank in range(8):
        shards.runs(rank)
    plan, calls = AttentionPlan(shards, shards), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        tiles = [plan.tiles(mine, theirs) for mine in range(8) for theirs in range(8)]
    finally:
        sys.setprofile(before)
    assert calls < 3 * sum(map(len, tiles))
