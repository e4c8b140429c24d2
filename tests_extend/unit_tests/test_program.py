"""Programs played by all ranks with sets of tokens instead of tensors; bytes against numbers written by hand."""

import random
from collections import Counter, defaultdict, deque
from itertools import product
from typing import Any

import pytest

from mindspeed_cp.layouts import EqualChunks, Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Tile, halves
from mindspeed_cp.program import Axis, Message, Phase, Program, program
from mindspeed_cp.schedule import RingSchedule
from unit_tests.test_plan import random_bands, random_layout, seen_by_definition, seen_by_tiles

INNER, OUTER, HOME, ACROSS = Axis


def tokens_of(message: Message) -> set[int]:
    return {token for each in message.tokens for token in range(each.start, each.stop)}


class Played:
    """What came of the programs of all ranks: pairs computed, and where the gradients of each ended."""

    def __init__(self, plan: AttentionPlan, schedule: RingSchedule, phase: Phase, **options: Any) -> None:
        self.programs = [program(plan, schedule, rank, phase, **options) for rank in range(schedule.size)]
        pieces = self.programs[0].pieces
        self.computed: Counter[tuple[int, int, int, int, int]] = Counter()
        self.arrived: Counter[tuple[int, int, int, int]] = Counter()
        self._pieces, self._plan, self._phase, self._moved = pieces, plan, phase, 0
        mail: dict[tuple[int, int, Axis], deque[object]] = defaultdict(deque)
        waiting = {rank: self._run(each, mail) for rank, each in enumerate(self.programs)}
        while waiting:
            before = len(waiting), self._moved
            waiting = {rank: run for rank, run in waiting.items() if next(run, "end") != "end"}
            assert before != (len(waiting), self._moved), f"ranks {list(waiting)} wait for messages that nobody sends"
        assert not any(mail.values()), "a message that nobody receives"

    def _shares(self, piece: int | None) -> tuple[int, ...]:
        return tuple(range(self._pieces)) if piece is None else (piece,)

    def _run(self, program: Program, mail):
        """Play one rank; stops where it has to wait for a message."""
        me = program.rank
        at_hand = {(me, share): set(range(self._plan.keys.num_tokens(me))) for share in range(self._pieces)}
        coming: dict[tuple[int, int], Message] = {}
        sums: dict[tuple[int, int], Counter[tuple[int, int]]] = defaultdict(Counter)

        def ready(owner: int, share: int):
            while (owner, share) in coming:
                message = coming[owner, share]
                box = mail[message.peer, me, message.axis]
                if not box:
                    yield
                    continue
                sent, content = box.popleft()
                self._moved += 1
                assert (sent.owner, sent.tokens, sent.piece) == (message.owner, message.tokens, message.piece)
                for each in self._shares(message.piece):
                    at_hand[owner, each] = content
                    coming.pop((owner, each), None)

        for step in program.steps:
            for message in step.receives:
                coming.update({(message.owner, share): message for share in self._shares(message.piece)})
            shares = self._shares(step.piece)
            for message in step.sends:
                for share in self._shares(message.piece):
                    yield from ready(message.owner, share)
                    assert tokens_of(message) <= at_hand[message.owner, share]
                mail[me, message.peer, message.axis].append((message, tokens_of(message)))
                self._moved += 1
            found: Counter[tuple[int, int]] = Counter()
            for _, query, key in seen_by_tiles(step.tiles):
                found[me, key] += 1
                for share in shares:
                    self.computed[me, query, step.owner, key, share] += 1
            for share in shares if step.tiles else ():
                yield from ready(step.owner, share)
                assert {key for _, key in found} <= at_hand[step.owner, share]
            if self._phase is Phase.FORWARD:
                continue
            if step.gives:
                leaving = {}
                for share in self._shares(step.gives.piece):
                    leaving[share] = found if step.tiles else sums.pop((step.owner, share))
                    assert {key for _, key in leaving[share]} == tokens_of(step.gives)
                mail[me, step.gives.peer, step.gives.axis].append((step.gives, leaving))
                self._moved += 1
            else:
                for share in shares:
                    sums[step.owner, share] += found
            if step.gets:
                box = mail[step.gets.peer, me, step.gets.axis]
                while not box:
                    yield
                sent, arriving = box.popleft()
                self._moved += 1
                assert (sent.owner, sent.tokens, sent.piece) == (step.gets.owner, step.gets.tokens, step.gets.piece)
                for share, partial in arriving.items():
                    sums[step.gets.owner, share] += partial
        assert not coming, "received for nothing"
        assert not {owner for (owner, _), total in sums.items() if total} - {me}
        for share in range(self._pieces):
            for (query_rank, key), pairs in sums[me, share].items():
                self.arrived[me, key, query_rank, share] += pairs


def grids() -> list[RingSchedule]:
    return [RingSchedule(*grid) for grid in ((1, 1), (1, 2), (1, 3), (2, 2), (1, 5), (2, 3), (3, 2), (2, 4), (4, 2))]


@pytest.mark.parametrize("schedule", grids(), ids=str)
def test_every_pair_is_computed_once_and_every_gradient_reaches_its_owner_once(schedule):
    rng = random.Random(schedule.size)
    zigzag = EqualChunks(schedule.size, 4)
    plans = [AttentionPlan(zigzag, zigzag, bands) for bands in (CAUSAL, FULL, (Band(3, 0),))]
    for _ in range(4):
        layout = random_layout(rng, [rng.randrange(1, 14) for _ in range(3)], schedule.size)
        plans.append(AttentionPlan(layout, layout, random_bands(rng)))
    for plan, pieces in product(plans, (1, 2)):
        for phase in Phase:
            played = Played(plan, schedule, phase, pieces=pieces)
            pairs = {
                (mine, query, owner, key, share): 1
                for mine, owner in product(range(schedule.size), repeat=2)
                for _, query, key in seen_by_definition(plan, mine, owner)
                for share in range(pieces)
            }
            assert played.computed == pairs
        assert phase is Phase.BACKWARD
        home: Counter[tuple[int, int, int, int]] = Counter()
        for mine, _, owner, key, share in pairs:
            home[owner, key, mine, share] += 1
        assert played.arrived == home


# Grid, what is seen, a rank, and the tokens that it sends, of eight that each rank holds.
BY_HAND = [
    # Ring of 4, all see all: three whole blocks of K/V; three of gradients.
    ((1, 4), FULL, 1, {INNER: 24, HOME: 24}),
    # Causal zigzag: rank 0 sends its early half alone at the first step, what others find of rank 0's K/V is a half.
    ((1, 4), CAUSAL, 0, {INNER: 4 + 8 + 8, HOME: 8 + 8 + 8}),
    ((1, 4), CAUSAL, 1, {INNER: 8 + 4 + 8, HOME: 4 + 8 + 8}),
    ((1, 4), CAUSAL, 3, {INNER: 24, HOME: 4 + 4 + 4}),
    ((1, 2), CAUSAL, 0, {INNER: 4, HOME: 8}),
    ((1, 2), CAUSAL, 1, {INNER: 8, HOME: 4}),
    # Two inner rings of two: one block within each, one between; a partial within each, a sum between.
    ((2, 2), FULL, 0, {INNER: 16, OUTER: 8, HOME: 16, ACROSS: 8}),
    ((2, 2), CAUSAL, 0, {INNER: 4 + 8, OUTER: 4, HOME: 8 + 8, ACROSS: 8}),
    ((2, 2), CAUSAL, 3, {INNER: 8 + 4, OUTER: 8, HOME: 4 + 4, ACROSS: 4}),
    ((1, 1), CAUSAL, 0, {}),
]


@pytest.mark.parametrize(("grid", "bands", "rank", "sent"), BY_HAND)
def test_what_travels_is_what_was_counted_by_hand(grid, bands, rank, sent):
    schedule = RingSchedule(*grid)
    zigzag = EqualChunks(schedule.size, 8)
    plan = AttentionPlan(zigzag, zigzag, bands)
    assert program(plan, schedule, rank, Phase.BACKWARD).sent() == Counter(sent)
    kv = {axis: tokens for axis, tokens in sent.items() if axis in (INNER, OUTER)}
    assert program(plan, schedule, rank, Phase.FORWARD).sent() == Counter(kv)
    in_pieces = program(plan, schedule, rank, Phase.BACKWARD, pieces=4)
    assert in_pieces.sent() == Counter(sent)


@pytest.mark.parametrize(("inner", "held"), [(2, 8), (3, 16), (8, 16), (32, 16)])
def test_blocks_in_memory_do_not_grow_with_the_ring(inner, held):
    zigzag = EqualChunks(inner, 8)
    for phase in Phase:
        assert program(AttentionPlan(zigzag, zigzag, FULL), RingSchedule(1, inner), 0, phase).held_bytes(1, 0) == held


def test_a_window_makes_no_hop_that_nobody_needs():
    contiguous = EqualChunks(8, 16, "contiguous")
    for rank in range(8):
        steps = program(AttentionPlan(contiguous, contiguous, (Band(16, 0),)), RingSchedule(1, 8), rank, Phase.FORWARD)
        assert [step.owner for step in steps.steps] == ([rank, rank - 1] if rank else [0])
        assert steps.sent() == Counter({INNER: 16} if rank < 7 else {})


@pytest.mark.parametrize("bands", [CAUSAL, FULL, (Band(9, 0),), (Band(None, None, (0, 5)), Band(None, 0, (5, None)))])
@pytest.mark.parametrize("layout", [EqualChunks(2, 16), Zigzag(2, ((5, 20, 7),)), EqualChunks(1, 2)])
def test_the_own_block_in_two_parts_is_the_whole_and_neither_is_much_the_larger(layout, bands):
    tiles = AttentionPlan(layout, layout, bands).tiles(0, 0)
    first, last = halves(tiles)
    assert Counter(seen_by_tiles(first + last)) == Counter(seen_by_tiles(tiles))
    areas = [sum(tile.area for tile in part) for part in (first, last)]
    assert max(areas) <= 0.625 * sum(areas) or layout.num_tokens(0) < 4


def test_the_own_block_of_a_causal_zigzag_is_the_late_rectangle_and_two_triangles():
    zigzag = EqualChunks(4, 8)
    steps = program(AttentionPlan(zigzag, zigzag), RingSchedule(1, 4), 1, Phase.BACKWARD).steps
    early, late = slice(0, 4), slice(4, 8)
    assert steps[0].tiles == (Tile(late, early, None, None, 16),)
    assert [(tile.queries, tile.keys, tile.right) for tile in steps[-1].tiles] == [(early, early, 0), (late, late, 0)]


def test_dropping_one_tile_of_the_plan_changes_the_program(monkeypatch):
    zigzag = EqualChunks(4, 8)
    before = program(AttentionPlan(zigzag, zigzag), RingSchedule(1, 4), 2, Phase.BACKWARD)
    tiles = AttentionPlan.tiles
    monkeypatch.setattr(
        AttentionPlan,
        "tiles",
        lambda plan, mine, theirs, **at: () if (mine, theirs) == (2, 0) else tiles(plan, mine, theirs, **at),
    )
    after = program(AttentionPlan(zigzag, zigzag), RingSchedule(1, 4), 2, Phase.BACKWARD)
    assert after.sent() != before.sent()
    assert len(after.steps) == len(before.steps)
