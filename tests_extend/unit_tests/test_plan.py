"""Who sees whom, against brute force: every pair of tokens of random documents, cuts, samples and bands."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest

from mindspeed_cp.layouts import Contiguous, EqualChunks
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Part, Run, Tile, check_runs, joined


@dataclass(frozen=True)
class Listed:
    """Runs as they are written down."""

    runs_of: tuple[tuple[Run, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.runs_of)

    def num_tokens(self, rank: int) -> int:
        return max((run.stop for run in self.runs_of[rank]), default=0)

    def runs(self, rank: int) -> tuple[Run, ...]:
        return self.runs_of[rank]


def random_layout(rng: random.Random, documents: list[int], num_ranks: int, sample: int | None = None) -> Listed:
    """The documents of these lengths, cut at random and dealt out at random."""
    held: list[list[Run]] = [[] for _ in range(num_ranks)]
    for document, length in enumerate(documents):
        cuts = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.randrange(6)))})
        for begin, end in pairwise(cuts):
            runs = held[rng.randrange(num_ranks)]
            start = runs[-1].stop if runs else 0
            runs.append(Run(start, start + end - begin, begin, document, sample))
    return Listed(tuple(map(tuple, held)))


def random_bands(rng: random.Random) -> tuple[Band, ...]:
    kind = rng.randrange(6)
    if kind == 0:
        return CAUSAL
    if kind == 1:
        return FULL
    if kind == 2:
        return (Band(rng.randrange(12), 0),)
    if kind == 3:
        return (Band(rng.randrange(8), rng.randrange(8)),)
    prefix = rng.randrange(10)
    if kind == 4:
        return (Band(None, None, (0, prefix)), Band(None, 0, (prefix, None)))
    return (Band(rng.randrange(3, 9), -rng.randrange(3)),)


def seen_by_tiles(tiles: tuple[Tile, ...]) -> Iterator[tuple[int | None, int, int]]:
    """Sample, query and key of every pair, by FlashAttention's rule for a window."""
    for tile in tiles:
        rows, keys = tile.queries.stop - tile.queries.start, tile.keys.stop - tile.keys.start
        for a in range(rows):
            for b in range(keys):
                after = b - (a + keys - rows)
                if (tile.left is None or after >= -tile.left) and (tile.right is None or after <= tile.right):
                    yield tile.sample, tile.queries.start + a, tile.keys.start + b


def seen_by_definition(plan: AttentionPlan, query_rank: int, key_rank: int) -> Iterator[tuple[int | None, int, int]]:
    for mine in plan.queries.runs(query_rank):
        for theirs in plan.keys.runs(key_rank):
            if (mine.document, mine.sample) != (theirs.document, theirs.sample):
                continue
            for query in range(mine.start, mine.stop):
                for key in range(theirs.start, theirs.stop):
                    i, j = mine.position + query - mine.start, theirs.position + key - theirs.start
                    if any(
                        (band.behind is None or i - j <= band.behind)
                        and (band.ahead is None or i - j >= -band.ahead)
                        and band.keys[0] <= j < (band.keys[1] if band.keys[1] is not None else j + 1)
                        for band in plan.bands_of.get(mine.document, plan.bands)
                    ):
                        yield mine.sample, query, key


def random_plans(count: int) -> Iterator[AttentionPlan]:
    rng = random.Random(1)
    for _ in range(count):
        num_ranks = rng.randrange(1, 9)
        documents = [rng.randrange(1, 14) for _ in range(rng.randrange(1, 5))]
        layout = random_layout(rng, documents, num_ranks)
        keys = layout if rng.random() < 0.8 else random_layout(rng, documents, num_ranks)
        bands_of = {document: random_bands(rng) for document in range(len(documents)) if rng.random() < 0.3}
        yield AttentionPlan(layout, keys, random_bands(rng), bands_of)


def pairs_of_ranks(plan: AttentionPlan) -> Iterator[tuple[int, int]]:
    return ((mine, theirs) for mine in range(plan.queries.num_ranks) for theirs in range(plan.keys.num_ranks))


def test_tiles_hold_every_pair_that_sees_each_other_once_and_no_other():
    for plan in random_plans(300):
        for pair in pairs_of_ranks(plan):
            tiles = plan.tiles(*pair)
            seen = Counter(seen_by_tiles(tiles))
            assert seen == Counter(seen_by_definition(plan, *pair)), (plan, pair)
            assert sum(tile.area for tile in tiles) == seen.total()


def test_tiles_have_no_dead_row_and_no_dead_key_and_no_bound_below_zero_or_without_effect():
    for plan in random_plans(300):
        for pair in pairs_of_ranks(plan):
            for tile in plan.tiles(*pair):
                seen = list(seen_by_tiles((tile,)))
                assert {query for _, query, _ in seen} == set(range(tile.queries.start, tile.queries.stop))
                assert {key for _, _, key in seen} == set(range(tile.keys.start, tile.keys.stop))
                assert all(bound is None or bound >= 0 for bound in (tile.left, tile.right))
                for without in (tile._replace(left=None), tile._replace(right=None)):
                    assert without == tile or len(list(seen_by_tiles((without,)))) > len(seen)


def test_there_are_never_more_tiles_than_runs_and_documents():
    for plan in random_plans(600):
        for mine, theirs in pairs_of_ranks(plan):
            queries, keys = joined(plan.queries.runs(mine)), joined(plan.keys.runs(theirs))
            documents = {run.document for run in queries} & {run.document for run in keys}
            assert len(plan.tiles(mine, theirs)) <= len(queries) + len(keys) + len(documents)


def merged_samples(rng: random.Random, num_ranks: int) -> Listed:
    """Two samples with documents of their own, of as many tokens on each rank."""
    lengths = [[rng.randrange(1, 9) for _ in range(3)] for _ in range(2)]
    held: list[list[Run]] = [[] for _ in range(num_ranks)]
    for sample, documents in enumerate(lengths):
        documents[-1] += 10 * num_ranks - sum(documents)
        layout = Contiguous(num_ranks, (tuple(documents),))
        for rank in range(num_ranks):
            held[rank] += [run._replace(sample=sample) for run in layout.runs(rank)]
    return Listed(tuple(map(tuple, held)))


def test_samples_with_documents_of_their_own_see_nothing_of_each_other():
    rng = random.Random(2)
    for _ in range(50):
        layout = merged_samples(rng, 4)
        check_runs(layout)
        plan = AttentionPlan(layout, layout, random_bands(rng))
        for pair in pairs_of_ranks(plan):
            assert Counter(seen_by_tiles(plan.tiles(*pair))) == Counter(seen_by_definition(plan, *pair))


def test_a_group_holds_the_tokens_of_its_members_in_the_order_of_the_stream():
    rng = random.Random(3)
    for number in range(60):
        documents = [rng.randrange(1, 14) for _ in range(3)]
        layout = merged_samples(rng, 4) if number % 2 else random_layout(rng, documents, 4)
        plan = AttentionPlan(layout, layout).of_groups(((0, 1), (2, 3)))
        check_runs(plan.queries)
        for group, members in enumerate(plan.queries.groups):
            shards = [positions_and_documents(layout, member) for member in members]
            for sample, parts in plan.queries.parts(group).items():
                together = [
                    shards[part.member][sample, token] for part in parts for token in range(part.start, part.stop)
                ]
                held = positions_and_documents(plan.queries, group)
                assert together == sorted(together)
                assert together == [held[sample, token] for token in range(len(together))]
            for other in range(2):
                pair = group, other
                assert Counter(seen_by_tiles(plan.tiles(*pair))) == Counter(seen_by_definition(plan, *pair))


def positions_and_documents(layout: Listed, rank: int) -> dict[tuple[int | None, int], tuple[int, int]]:
    """Document and position of each token."""
    return {
        (run.sample, token): (run.document, run.position + token - run.start)
        for run in layout.runs(rank)
        for token in range(run.start, run.stop)
    }


def test_a_group_of_neighbours_holds_the_zigzag_shard_of_a_shorter_ring():
    zigzag = EqualChunks(4, 8)
    plan = AttentionPlan(zigzag, zigzag).of_groups(((0, 1), (2, 3)))
    for rank in (0, 1):
        assert plan.queries.runs(rank) == EqualChunks(2, 16).runs(rank)
    assert plan.queries.parts(0) == {None: (Part(0, 0, 4), Part(1, 0, 8), Part(0, 4, 8))}


EARLY, LATE = Run(0, 4, 0), Run(4, 8, 4)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([[EARLY, Run(5, 8, 4)]], r"does not begin at token 4"),
        ([[EARLY, Run(3, 8, 4)]], r"does not begin at token 4"),
        ([[EARLY, Run(4, 4, 4)]], r"or is empty"),
        ([[Run(0, 4, 4), Run(4, 8, 0)]], r"runs go by document and position"),
        ([[EARLY], [Run(0, 4, 5)]], r"position 4 of document 0, .* is held by no rank: see rank 1"),
        ([[EARLY], [Run(0, 4, 3)]], r"position 3 of document 0, .* is held twice: see rank 1"),
        ([[Run(0, 4, 1)]], r"position 0 of document 0, .* is held by no rank"),
        ([[EARLY, Run(0, 4, 0, sample=1)]], r"give each a sample, or none"),
        ([[Run(0, 4, 0, sample=0), Run(0, 3, 0, sample=1)]], r"runs of sample 1 end at 3, of 4 tokens"),
    ],
)
def test_runs_that_are_no_layout_are_refused_with_rank_and_rule(runs, message):
    check_runs(Listed(((EARLY, LATE),)))
    with pytest.raises(ValueError, match=message):
        check_runs(Listed(tuple(map(tuple, runs))))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (((5, 0),), r"bands hold \(5, 0\); give Band\(behind, ahead\), None being without bound"),
        ((Band(2, -3),), "nothing sees anything"),
        ((Band(0, 0, (4, 2)),), "keys from 0 on"),
        ((Band(None, 0, (0, 5)), Band(None, None, (4, 9))), "about the same keys"),
        ((Band(None, 0), Band(3, 3, (7, None))), "about the same keys"),
    ],
)
def test_bands_that_contradict_are_refused(bands, message):
    layout = EqualChunks(2, 4)
    with pytest.raises(ValueError, match=message):
        AttentionPlan(layout, layout, bands)
    with pytest.raises(ValueError, match=message):
        AttentionPlan(layout, layout, bands_of={3: bands})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, "over 1 rank or more"),
        ({"kind": "striped"}, "zigzag or contiguous"),
        ({"tokens": 5}, "no two equal chunks; give 6"),
    ],
)
def test_equal_chunks_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EqualChunks(**{"num_ranks": 2, "tokens": 4, **options})


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_equal_chunks_hold_every_token_once(kind):
    for num_ranks in (1, 2, 3, 6):
        check_runs(EqualChunks(num_ranks, 24 // num_ranks, kind))
