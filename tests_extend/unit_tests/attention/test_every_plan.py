"""Every algorithm and transport over every plan, against dense attention in fp64."""

import random
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from mindspeed_cp.attention.build import KEPT
from mindspeed_cp.comm import Addressed, Transfer, VirtualCommunicator
from mindspeed_cp.plan import CAUSAL, FULL, Band
from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology
from unit_tests.dealt import Dealt, at_random, contiguous, zigzag
from unit_tests.dense import assert_equal_to
from unit_tests.pairwise import pairwise
from unit_tests.plan_cases import PlanCase, attend_virtually, dense, restored
from unit_tests.ring_cases import grid_name

GRIDS = [
    CPTopology(),
    CPTopology(inner=2),
    CPTopology(ulysses=3),
    CPTopology(outer=2, inner=2),
    CPTopology(inner=5),
    CPTopology(inner=3, ulysses=2),
    CPTopology(inner=7),
    CPTopology(inner=2, ulysses=4),
]
MORE_GRIDS = [
    CPTopology(inner=3),
    CPTopology(inner=2, ulysses=2),
    CPTopology(ulysses=5),
    CPTopology(outer=3, inner=2),
    CPTopology(outer=2, inner=3),
    CPTopology(ulysses=7),
    CPTopology(outer=2, inner=2, ulysses=2),
    CPTopology(outer=2, inner=4),
    CPTopology(inner=8),
]
BANDS: dict[str, tuple[Band, ...]] = {
    "causal": CAUSAL,
    "full": FULL,
    "window of 6": (Band(5, 0),),
    "both sides": (Band(3, 2),),
    "prefix": (Band(None, None, (0, 4)), Band(None, 0, (4, None))),
    "of each document": CAUSAL,
    "mask": FULL,
}
OF_EACH_DOCUMENT = {0: (Band(0, 0),), 1: FULL, 2: (Band(1, 1),)}
LENGTH = 25
DOCUMENTS = {
    "one": [[LENGTH]],
    "several": [[5, 1, 13, 1, 5]],
    "of one token": [[1] * LENGTH],
    "others in each sample": [[12, 13], [1, 18, 6], [LENGTH]],
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
    "kept": list(KEPT.values()),
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
        kept=row["kept"],
    )


def row_id(row: dict[str, Any]) -> str:
    named = [grid_name(row["grid"]), row["bands"], row["documents"], row["cut"]]
    return ", ".join([*named, row["transport"].name if row["transport"] else "cheapest"])


@pytest.mark.parametrize("row", pairwise(AXES), ids=row_id)
def test_attention_over_any_plan_equals_dense_attention(row):
    case = case_of(row)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", pairwise(AXES | {"grid": MORE_GRIDS}) + pairwise(AXES | {"grid": MORE_GRIDS[::-1]}), ids=row_id
)
def test_attention_over_any_plan_equals_dense_attention_on_more_grids(row):
    case = case_of(row)
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))


class Held(VirtualCommunicator):
    """Notes the most bytes of messages, coming and going, that a rank has had in memory at once."""

    now: Counter[int] = Counter()
    most: Counter[int] = Counter()

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        for _, content in (*sends, *receives):
            self.now[self.rank] += content.nbytes
            weakref.finalize(content, self.now.subtract, {self.rank: content.nbytes})
        self.most[self.rank] = max(self.most[self.rank], self.now[self.rank])
        return super().exchange_all(sends, receives)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("transport", "grows"), [(Transport.DIRECT, False), (Transport.ALL_GATHER, True)])
def test_messages_in_memory_do_not_grow_with_the_ranks_but_for_an_all_gather(transport, grows, overlap):
    most = []
    for size in (4, 8):
        Held.most.clear()
        ring = CPTopology(inner=size)
        case = PlanCase(contiguous([6] * size), ring, FULL, transport=transport, overlap=overlap)
        attend_virtually(case, Held)
        most.append(max(Held.most.values()))
    # With room for the gradient of lse. Direct: the block at hand, the next one, the own one, and gradients both ways;
    # with overlap as much as Note [Room] in program/straight.py allows.
    block = 6 * (8 + 12 + 8) * 8
    assert most[0] < most[1] if grows else most == [(7 if overlap else 5) * block] * 2
