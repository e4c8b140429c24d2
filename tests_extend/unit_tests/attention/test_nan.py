"""A NaN in one rank's keys or values: it reaches what sees it, on every rank, and no more than in dense attention.

Dense attention spreads it further than it has to: 0 * NaN is NaN, so that a value poisons the rows that do not see it
too, and a key the gradients of their queries. Blocks that are never computed, as under a causal mask on a ring, do not.
"""

import itertools
from unittest import mock

import pytest
import torch
from packaging.version import Version

from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.topology import CPTopology
from unit_tests import ring_cases, ulysses_cases
from unit_tests.dense import causal_mask, dense_attention
from unit_tests.ring_cases import case_on, grid_id, grid_name

TOPOLOGIES = [
    CPTopology(ulysses=4),
    CPTopology(inner=4),
    CPTopology(outer=2, inner=2),
    CPTopology(inner=2, ulysses=2),
]


def poisoned_rows(case, kernel, where, token):
    """Which rows [B, H, S] of each result hold a NaN: in the case's attention, and in dense attention.

    where: "k" or "v"; one number of its first head at `token` is NaN.
    """
    whole = ulysses_cases.inputs(case)
    tensors = {name: getattr(whole, name).clone() for name in ("q", "k", "v", "dout")}
    tensors[where][:, 0, token, 0] = torch.nan
    poisoned = whole._replace(**tensors)
    with mock.patch.object(ulysses_cases, "inputs", lambda case: poisoned):
        shards = ring_cases.attend_virtually(case, KERNELS.only([kernel]))
    visible = causal_mask(case.size * case.tokens) if case.mask == "causal" else whole.visible
    dense = dense_attention(*(x.double() for x in tensors.values()), visible=visible)
    actual = ulysses_cases.restored(case, shards)._asdict()
    return [
        {name: getattr(result, name).isnan().any(dim=-1) for name in actual}
        for result in (ulysses_cases.Shard(**actual), dense)
    ]


KERNELS_AND_MASKS = [
    ("reference", torch.float64, "causal"),
    ("reference", torch.float64, "full"),
    ("reference", torch.float64, "2d"),
]
if Version(torch.__version__) >= Version("2.13"):  # Before, it takes no grouped queries.
    KERNELS_AND_MASKS += [("cpu_flash", torch.float32, "causal"), ("cpu_flash", torch.float32, "full")]
TOKENS = (0, 37, 127)


def tokens_in_turn(*axes: list[object]) -> list[tuple[object, ...]]:
    """Every combination of the axes' values, with one token after the other."""
    return [(*row, TOKENS[number % 3]) for number, row in enumerate(itertools.product(*axes))]


@pytest.mark.parametrize(
    ("topology", "kernel", "dtype", "mask", "token"),
    [
        (topology, *kernel_and_mask, token)
        for topology, kernel_and_mask, token in tokens_in_turn(TOPOLOGIES, KERNELS_AND_MASKS)
    ],
    ids=grid_id,
)
def test_nan_key_poisons_exactly_the_outputs_that_see_it_and_no_gradient_that_dense_attention_spares(
    topology, kernel, dtype, mask, token
):
    case = case_on(topology, mask=mask, heads=2, kv_heads=1, tokens=32, dtype=dtype)
    actual, dense = poisoned_rows(case, kernel, "k", token)
    assert torch.equal(actual["out"], dense["out"])
    assert actual["out"].any()
    for name in ("dq", "dk", "dv"):
        assert not (actual[name] & ~dense[name]).any(), name
        assert (actual[name] & dense[name]).any(), f"{name} lost it"
    reached = (actual["out"] & dense["out"]).any(dim=1)
    assert (actual["dq"].any(dim=1) | ~reached).all(), "a query that sees it has a NaN gradient"


@pytest.mark.parametrize(
    ("mask", "topology", "token"), tokens_in_turn(["causal", "full", "2d"], TOPOLOGIES), ids=grid_id
)
def test_nan_value_poisons_what_sees_it_and_no_more_than_in_dense_attention(topology, mask, token):
    case = case_on(topology, mask=mask, heads=2, kv_heads=1, tokens=32)
    actual, dense = poisoned_rows(case, "reference", "v", token)
    visible = causal_mask(128) if mask == "causal" else torch.ones(128, 128, dtype=torch.bool)
    if mask == "2d":
        visible = ulysses_cases.inputs(case).visible
    sees_it = visible[:, token]
    readers = slice(0, 2)  # The query heads of the first K/V head.
    assert actual["out"][:, readers, sees_it].all()
    for name, rows in actual.items():
        assert not (rows & ~dense[name]).any(), name


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=grid_name)
def test_every_rank_with_a_query_that_sees_the_nan_has_it_in_its_own_outputs(topology):
    case = case_on(topology, heads=2, tokens=32)
    actual, _ = poisoned_rows(case, "reference", "k", 0)
    for rank in range(case.size):
        rows = case.sequence_layout.shard(actual["out"], rank, dim=2)
        assert rows.any(dim=1).all(), "under a causal mask every query sees the first key"
