"""Everything that attention is told, on every algorithm and transport, against dense attention in fp64."""

from typing import Any

import pytest

from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_every_plan import BANDS, CUTS, DOCUMENTS, MORE_GRIDS, OF_EACH_DOCUMENT, layout
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.plan_cases import PlanCase
from unit_tests.ring_cases import grid_name
from unit_tests.term_cases import TermCase, attend_virtually, dense, restored

GRIDS = [
    CPTopology(),
    CPTopology(ulysses=3),
    CPTopology(outer=2, inner=2),
    CPTopology(inner=5),
    CPTopology(inner=3, ulysses=2),
    CPTopology(ulysses=7),
]
TERMS: list[tuple[str, ...]] = [
    ("sinks",),
    ("off by one", "softcap"),
    ("alibi", "sinks", "dropout"),
    ("bias",),
    ("bias of all", "dropout", "softcap"),
    ("sinks", "softcap", "alibi", "bias", "dropout"),
]
HEADS = [(7, 7), (8, 2), (8, 1), (12, 3), (9, 3)]
AXES: dict[str, list[Any]] = {
    "grid": GRIDS,
    "told": TERMS,
    "heads": HEADS,
    "bands": [*BANDS],
    "documents": [*DOCUMENTS],
    "cut": [*CUTS],
    "transport": [*Transport, None],
    "overlap": [False, True],
    "batch": [1, 2],
}


def case_of(values: dict[str, Any]) -> TermCase:
    bands, documents = values["bands"], DOCUMENTS[values["documents"]]
    masked = bands == "mask" and values["documents"] == "one"
    plan = PlanCase(
        layout(values["cut"], values["grid"].size, documents),
        values["grid"],
        BANDS[bands],
        OF_EACH_DOCUMENT if bands == "of each document" else {},
        values["transport"],
        values["overlap"],
        batch=values["batch"],
    )
    return TermCase(plan, values["heads"], (*values["told"], *["mask"] * masked))


def check(case: TermCase) -> None:
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


def name(values: dict[str, Any]) -> str:
    said = (str(values[axis]) for axis in ("heads", "bands", "documents"))
    return "-".join([grid_name(values["grid"]), "+".join(values["told"]), *said])


TABLE = pairwise(AXES)
MORE_HEADS = [(8, 8), (12, 4), (8, 1), (14, 2), (11, 1)]
MORE_TERMS = [*TERMS, ("softcap", "alibi"), ("dropout",), ("bias", "dropout")]
MORE = [*MORE_GRIDS, CPTopology(inner=2), CPTopology(inner=2, ulysses=4)]


@pytest.mark.parametrize("values", TABLE, ids=name)
def test_every_term_equals_dense_attention(values):
    check(case_of(values))


@pytest.mark.slow
@pytest.mark.parametrize("values", pairwise(AXES | {"grid": MORE, "heads": MORE_HEADS, "told": MORE_TERMS}), ids=name)
def test_every_term_on_more_grids_equals_dense_attention(values):
    check(case_of(values))
