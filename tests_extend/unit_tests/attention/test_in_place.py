"""Ulysses' large exchanges: received where they belong and sent from where they lie, with the same results."""

import pytest

from mindspeed_cp.attention import in_place
from mindspeed_cp.topology import CPTopology
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.ring_cases import attend_virtually, case_on, dense, grid_name
from unit_tests.ulysses_cases import restored

ROWS = pairwise(
    {
        "topology": [CPTopology(ulysses=2), CPTopology(ulysses=3), CPTopology(inner=2, ulysses=2)],
        "layout": ["zigzag", "contiguous"],
        "memory": ["BNSD", "SBND"],
        "batch": [1, 2],
        "heads": [(1, 1, 8), (4, 2, 4)],
    }
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{grid_name(row['topology'])}, {row['layout']}, {row['memory']}")
def test_exchanges_in_place_give_dense_attention(row, monkeypatch):
    taken: list[int] = []
    worth = in_place.is_worth_it
    monkeypatch.setattr(in_place, "LARGE", 0)
    monkeypatch.setattr(
        "mindspeed_cp.attention.head_exchange.is_worth_it", lambda *case: taken.append(worth(*case)) or taken[-1]
    )
    heads, kv_heads, value_head_size = row["heads"]
    case = case_on(
        row["topology"],
        layout=row["layout"],
        memory=row["memory"],
        batch=row["batch"],
        heads=heads,
        kv_heads=kv_heads,
        value_head_size=value_head_size,
    )
    whole = restored(case, attend_virtually(case))
    assert taken and all(taken)
    assert_equal_to(dense(case), whole)
