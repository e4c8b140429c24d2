"""Every remainder on one to eight ranks, and every window and length of documents, in the library's own layouts."""

from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import NamedTuple

import pytest

from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, PackedLayout, Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, Band, Run
from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology
from unit_tests.dense import assert_equal_to
from unit_tests.plan_cases import PlanCase, attend_virtually, dense, restored


@dataclass(frozen=True)
class Held:
    """A layout of one kind of sample, with the places in the stream that its runs are."""

    layout: PackedLayout

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @property
    def documents(self) -> tuple[tuple[int, ...], ...]:
        return self.layout.samples

    def num_tokens(self, rank: int) -> int:
        return self.layout.num_tokens(rank)

    def runs(self, rank: int) -> tuple[Run, ...]:
        return self.layout.runs(rank)

    def tokens(self, rank: int) -> list[int]:
        starts = (0, *accumulate(self.documents[0]))
        firsts = ((starts[run.document] + run.position, run.stop - run.start) for run in self.runs(rank))
        return [token for first, count in firsts for token in range(first, first + count)]


class Length(NamedTuple):
    """A stream on ranks. documents: how long they are but for the last; window: of a causal one, 0 for none."""

    ranks: int
    tokens: int
    documents: int
    window: int


REMAINDERS = [
    Length(ranks, 2 * ranks * (more % 3) + more, documents=5 + more, window=0)
    for ranks in range(1, 9)
    for more in range(1, 2 * ranks)
]
WINDOWS = [Length(5, 23, documents=23 - window % 2 * 9, window=window) for window in range(1, 24)]
DOCUMENTS = [Length(7, 23, documents=each, window=each // 3) for each in range(1, 24)]
LAYOUTS = (Contiguous, Zigzag, DocumentZigzag, Balanced)
BANDS = (CAUSAL, FULL, (Band(3, 2),), (Band(None, None, (0, 4)), Band(None, 0, (4, None))))


def cases(lengths: list[Length]) -> list[PlanCase]:
    """Layouts, bands, transports and grids take turns, each at a pace of its own, so that they come to meet."""
    made = []
    transports, overlaps = cycle([*Transport, None, Transport.DIRECT]), cycle([False, True, True])
    for number, length in enumerate(lengths):
        whole, rest = divmod(length.tokens, length.documents)
        documents = (*[length.documents] * whole, *([rest] if rest else []))
        degrees = [each for each in range(1, length.ranks + 1) if length.ranks % each == 0]
        ulysses = degrees[number // 2 % len(degrees)]
        made.append(
            PlanCase(
                Held(LAYOUTS[number % 4](length.ranks, (documents,))),  # type: ignore[arg-type]
                CPTopology(inner=length.ranks // ulysses, ulysses=ulysses),
                (Band(length.window - 1, 0),) if length.window else BANDS[(number + number // 4) % 4],
                transport=next(transports),
                overlap=next(overlaps),
                batch=1 + number % 3,
            )
        )
    return made


def case_id(case: PlanCase) -> str:
    grid = f"{case.topology.inner}x{case.topology.ulysses}"
    return f"{type(case.layout.layout).__name__}, {case.length} tokens, {grid}, {case.bands}"  # type: ignore[attr-defined]


def test_the_cases_have_each_remainder_window_and_length_and_each_layout_meets_each_band():
    assert {(each.ranks, each.tokens % (2 * each.ranks)) for each in REMAINDERS} == {
        (ranks, more) for ranks in range(1, 9) for more in range(1, 2 * ranks)
    }
    assert any(each.tokens < each.ranks for each in REMAINDERS)
    met = {(type(case.layout.layout), case.bands) for case in cases(REMAINDERS)}  # type: ignore[attr-defined]
    assert len(met) == len(LAYOUTS) * len(BANDS)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(REMAINDERS) + cases(WINDOWS) + cases(DOCUMENTS), ids=case_id)
def test_attention_over_every_length_equals_dense_attention(case):
    assert_equal_to(dense(case), restored(case, attend_virtually(case)))
