"""A ring's large messages: sent from where keys, values and gradients lie, with the same results and the same bytes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention.blocks import BlockFormat
from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_ring import assert_same_bits
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.ring_cases import attend_every_way, attend_virtually, case_on, dense, grid_name, passes
from unit_tests.ulysses_cases import restored

ROWS = pairwise(
    {
        "topology": [CPTopology(inner=4), CPTopology(outer=2, inner=2), CPTopology(inner=2, ulysses=2)],
        "layout": ["zigzag", "contiguous"],
        "memory": ["BNSD", "SBND"],
        "batch": [1, 2],
        "heads": [(1, 1, 8), (4, 2, 4)],
        "mask": ["causal", "full"],
        "pieces": [1, 2],
        "policy": [None, "full", "half"],
        "overlap": [False, True],
    }
)


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{grid_name(row['topology'])}, {row['memory']}, {row['mask']}, {row['policy']}"
)
def test_keys_and_values_that_are_sent_by_themselves_give_dense_attention(row, monkeypatch):
    heads, kv_heads, value_head_size = row["heads"]
    case = case_on(
        row["topology"],
        layout=row["layout"],
        memory=row["memory"],
        batch=row["batch"],
        heads=heads,
        kv_heads=kv_heads,
        value_head_size=value_head_size,
        mask=row["mask"],
        kv_cache_policy=row["policy"],
        overlap=row["overlap"],
        pieces=row["pieces"] if kv_heads > 1 else 1,
    )
    in_one = passes(case)
    monkeypatch.setattr("mindspeed_cp.attention.blocks.LARGE", 1)
    in_two = passes(case)
    assert [each.bytes for both in in_two for each in both] == [each.bytes for both in in_one for each in both]
    assert sum(len(each.messages) for both in in_two for each in both) > sum(
        len(each.messages) for both in in_one for each in both
    )
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


def test_large_messages_over_processes_equal_those_of_virtual_ranks(gloo):
    case = case_on(CPTopology(inner=2), tokens=2048, memory="SBND", dtype=torch.float32)
    runs = gloo.run_on_all(2, attend_every_way, case)
    for shards, virtual in zip(runs, attend_virtually(replace(case, overlap=True)), strict=True):
        assert_same_bits(*shards, virtual)


def sent_of(k: Sequence[Tensor], v: Sequence[Tensor]) -> list[bool]:
    """Whether keys and values are sent from where they lie."""
    content = BlockFormat.of(k[0], v[0]).content(k, v)
    assert [x.tolist() for x in content] == [
        torch.cat([part.permute(2, 0, 1, 3) for part in parts]).flatten().tolist() for parts in (k, v)
    ]
    return [x.data_ptr() == parts[0].data_ptr() for x, parts in zip(content, (k, v), strict=True)]


def test_what_lies_token_after_token_is_sent_from_where_it_is(monkeypatch):
    monkeypatch.setattr("mindspeed_cp.attention.blocks.LARGE", 1)
    tokens_first = torch.arange(48.0).view(6, 1, 2, 4).permute(1, 2, 0, 3)
    heads_first = torch.arange(48.0).view(1, 2, 6, 4)
    assert sent_of([tokens_first], [heads_first]) == [True, False]
    late = tokens_first[:, :, 3:]
    assert sent_of([late], [late]) == [True, True]
    assert sent_of([late, tokens_first[:, :, :3]], [heads_first, heads_first]) == [False, False]
