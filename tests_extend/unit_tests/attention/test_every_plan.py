"""Every algorithm and transport over every plan, against dense attention in fp64."""

import random
from typing import Any

import pytest

from mindspeed_cp.plan import CAUSAL, FULL, Band
from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology
from unit_tests.dealt import Dealt, at_random, contiguous, zigzag
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.plan_cases import PlanCase, attend_virtually, dense, restored
from unit_tests.ring_cases import grid_name

GRIDS = [
    CPTopology(outer=outer, inner=inner, ulysses=ulysses)
    for outer, inner, ulysses in [
        (1, 1, 1),
        (1, 2, 1),
        (1, 1, 3),
        (2, 2, 1),
        (1, 2, 2),
        (1, 5, 1),
        (1, 1, 5),
        (3, 2, 1),
        (1, 3, 2),
        (1, 7, 1),
        (2, 2, 2),
        (1, 2, 4),
    ]
]
BANDS: dict[str, tuple[Band, ...]] = {
    "causal": CAUSAL,
    "full": FULL,
    "window of 1": (Band(0, 0),),
    "window of 6": (Band(5, 0),),
    "both sides": (Band(3, 2),),
    "prefix": (Band(None, None, (0, 4)), Band(None, 0, (4, None))),
    "of each document": CAUSAL,
    "mask": FULL,
}
OF_EACH_DOCUMENT = {0: (Band(2, 0),), 1: FULL, 2: (Band(1, 1),)}
LENGTH = 37
DOCUMENTS = {
    "one": [[LENGTH]],
    "several": [[9, 1, 17, 1, 9]],
    "of one token": [[1] * LENGTH],
    "others in each sample": [[20, 17], [1, 30, 6], [LENGTH]],
}
CUTS = ("contiguous", "zigzag", "at random", "few ranks hold all")
AXES = {
    "grid": GRIDS,
    "bands": list(BANDS),
    "documents": list(DOCUMENTS),
    "cut": CUTS,
    "transport": [*Transport, None],
    "overlap": [False, True],
    "batch": [1, 2],
    "pieces": [1, 2],
}


def layout(cut: str, size: int, documents: list[list[int]]) -> Dealt:
    """The stream of `LENGTH` tokens, cut unevenly."""
    rng = random.Random(size)
    if cut == "at random":
        return at_random(rng, size, LENGTH, documents)
    parts = size if cut == "contiguous" else 2 * size
    edges = sorted(rng.randrange(LENGTH + 1) for _ in range(parts - 1))
    lengths = [b - a for a, b in zip([0, *edges], [*edges, LENGTH], strict=True)]
    if cut == "few ranks hold all":
        return contiguous([LENGTH - 2, *[0] * (size - 2), 2][:size] if size > 1 else [LENGTH], documents)
    return contiguous(lengths, documents) if cut == "contiguous" else zigzag(lengths, documents)


def case_of(row: dict[str, Any]) -> PlanCase:
    """The case of a row of the table. A boolean mask goes with one document, a piece with heads of its own."""
    documents = DOCUMENTS["one" if row["bands"] == "mask" else row["documents"]]
    return PlanCase(
        layout=layout(row["cut"], row["grid"].size, documents),
        topology=row["grid"],
        bands=BANDS[row["bands"]],
        bands_of=OF_EACH_DOCUMENT if row["bands"] == "of each document" else {},
        transport=row["transport"],
        overlap=row["overlap"],
        masked=row["bands"] == "mask",
        batch=row["batch"],
        pieces=row["pieces"],
    )


def row_id(row: dict[str, Any]) -> str:
    named = [grid_name(row["grid"]), row["bands"], row["documents"], row["cut"]]
    return ", ".join([*named, row["transport"].name if row["transport"] else "cheapest"])


@pytest.mark.parametrize("row", pairwise(AXES), ids=row_id)
def test_attention_over_any_plan_equals_dense_attention(row):
    case = case_of(row)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))
