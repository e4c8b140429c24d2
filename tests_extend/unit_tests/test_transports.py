"""Transports played with sets of tokens: all arrives, nothing travels that is not seen, and memory is bounded."""

import random
from collections import Counter
from itertools import product

import pytest

from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band
from mindspeed_cp.program import Phase, Transport, cheapest_transport, program, transports
from mindspeed_cp.schedule import RingSchedule
from unit_tests.dealt import at_random, contiguous, zigzag
from unit_tests.test_plan import random_bands, seen_by_definition
from unit_tests.test_program import Played, grids, tokens_of

STRAIGHT = (Transport.DIRECT, Transport.ALL_GATHER)


def window(tokens: int) -> tuple[Band, ...]:
    return (Band(tokens - 1, 0),)


def random_plans(rng: random.Random, num_ranks: int) -> list[AttentionPlan]:
    """Plans whose ranks have nothing, little or much to do with each other."""
    plans = []
    for bands in (CAUSAL, FULL, window(3), random_bands(rng), random_bands(rng)):
        documents = [[rng.randrange(1, 9) for _ in range(4)] for _ in range(rng.randrange(1, 3))]
        length = min(map(sum, documents))
        documents = [[*each[:-1], each[-1] + length - sum(each)] for each in documents]
        if min(map(min, documents)) < 1:
            documents = [[length]]
        layout = at_random(rng, num_ranks, length, documents)
        plans.append(AttentionPlan(layout, layout, bands))
    return plans


@pytest.mark.parametrize("transport", STRAIGHT)
@pytest.mark.parametrize("schedule", [*grids(), RingSchedule(1, 7)], ids=str)
def test_every_pair_is_computed_and_every_gradient_comes_home_and_nothing_travels_that_is_not_seen(schedule, transport):
    size = schedule.size
    for plan in random_plans(random.Random(size), size):
        pairs = Counter(
            (mine, query, owner, key, 0)
            for mine, owner in product(range(size), repeat=2)
            for _, query, key in seen_by_definition(plan, mine, owner)
        )
        home: Counter[tuple[int, int, int, int]] = Counter()
        for (mine, _, owner, key, share), times in pairs.items():
            home[owner, key, mine, share] += times
        for phase in Phase:
            played = Played(plan, schedule, phase, transport=transport)
            assert played.computed == pairs
            for rank, each in enumerate(played.programs):
                for message in (message for step in each.steps for message in step.receives):
                    needed = {key for mine, _, owner, key, _ in pairs if (mine, owner) == (rank, message.owner)}
                    assert (message.peer, tokens_of(message)) == (message.owner, needed)
        assert phase is Phase.BACKWARD
        assert played.arrived == home


def tokens_received(plan: AttentionPlan, rank: int, transport: Transport = Transport.DIRECT) -> dict[int, int]:
    """Tokens of K/V that come from each rank."""
    schedule = RingSchedule(1, plan.keys.num_ranks)
    steps = program(plan, schedule, rank, Phase.FORWARD, transport=transport).steps
    return {message.peer: message.num_tokens for step in steps for message in step.receives}


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 10, 17, 25, 64])
def test_a_window_over_contiguous_shards_is_a_halo(tokens):
    for shards in (contiguous([8] * 8), contiguous([11, 3, 8, 12, 8, 1, 9, 12])):
        plan = AttentionPlan(shards, shards, window(tokens))
        starts = [shards.tokens(rank)[0] for rank in range(8)]
        for rank in range(8):
            received = tokens_received(plan, rank)
            halo = range(max(0, starts[rank] - (tokens - 1)), starts[rank])
            assert sum(received.values()) == len(halo)
            assert set(received) == {owner for owner in range(8) if set(halo) & set(shards.tokens(owner))}
            if shards.num_tokens(rank) == 8 and shards == contiguous([8] * 8):
                assert len(received) <= -(-(tokens - 1) // 8)


@pytest.mark.parametrize("tokens", [2, 4, 5, 6, 9, 13])
def test_a_window_over_a_zigzag_is_two_halos(tokens):
    shards = EqualChunks(8, 8)
    plan = AttentionPlan(shards, shards, window(tokens))
    for rank in range(8):
        received = tokens_received(plan, rank)
        assert len(received) <= 2 * -(-(tokens - 1) // 4)
        assert sum(received.values()) <= 2 * (tokens - 1)
    # Chunks 2 and 13 are preceded by 1 and 12, which are ranks 1 and 3.
    assert tokens_received(AttentionPlan(shards, shards, window(4)), 2) == {1: 3, 3: 3}


@pytest.mark.parametrize("transport", Transport)
def test_documents_that_lie_within_a_rank_send_nothing(transport):
    shards = contiguous([9, 4, 7], documents=[[5, 4, 4, 1, 6]])
    for rank, phase in product(range(3), Phase):
        schedule = RingSchedule(1, 3)
        assert not program(AttentionPlan(shards, shards, FULL), schedule, rank, phase, transport=transport).sent()


@pytest.mark.parametrize("size", [4, 8, 32])
def test_what_is_in_memory_is_two_blocks_whatever_the_ranks_or_all_of_them_at_once(size):
    for shards in (EqualChunks(size, 8), EqualChunks(size, 8, "contiguous")):
        plan, schedule = AttentionPlan(shards, shards, FULL), RingSchedule(1, size)
        for rank, phase in product((0, size - 1), Phase):
            held = {each: program(plan, schedule, rank, phase, transport=each).held_bytes(1, 0) for each in Transport}
            assert held == {
                Transport.ROTATION: 16,
                Transport.DIRECT: 16,
                Transport.ALL_GATHER: 8 * (size - 1),
            }


BY_BYTES = {
    "causal zigzag": (zigzag([4] * 8), CAUSAL, Transport.ROTATION),
    "all to all": (contiguous([8] * 4), FULL, Transport.ROTATION),
    "causal contiguous": (contiguous([8] * 4), CAUSAL, Transport.ROTATION),
    # A block is handed on without what nobody needs: no more than a halo travels.
    "window over contiguous": (contiguous([8] * 4), window(13), Transport.ROTATION),
    # Halos of ranks far apart: a rotation takes them around.
    "window over zigzag": (zigzag([4] * 8), window(4), Transport.DIRECT),
    "documents of two ranks each": (contiguous([8] * 4, [[16, 16]]), CAUSAL, Transport.ROTATION),
    "documents of ranks far apart": (zigzag([4] * 8, [[12, 8, 12]]), CAUSAL, Transport.DIRECT),
    "documents within ranks": (contiguous([8] * 4, [[8, 3, 5, 16]]), CAUSAL, Transport.ROTATION),
}


@pytest.mark.parametrize(("shards", "bands", "chosen"), BY_BYTES.values(), ids=BY_BYTES)
def test_where_no_transport_is_named_the_one_whose_busiest_rank_sends_fewer_keys_is_taken(shards, bands, chosen):
    assert cheapest_transport(AttentionPlan(shards, shards, bands), RingSchedule(1, 4)) is chosen


def test_where_tokens_lie_in_very_many_runs_nothing_is_looked_at_for_a_choice(monkeypatch):
    shards, bands, direct = BY_BYTES["documents of ranks far apart"]
    assert direct is Transport.DIRECT
    monkeypatch.setattr(transports, "_MOST_RUNS", 8)
    plan = AttentionPlan(shards, shards, bands)
    assert cheapest_transport(plan, RingSchedule(1, 4)) is Transport.ROTATION
    assert not plan._tiles


def busiest(plan: AttentionPlan, schedule: RingSchedule, transport: Transport) -> int:
    programs = (program(plan, schedule, rank, Phase.FORWARD, transport=transport) for rank in range(schedule.size))
    return max(each.sent().total() for each in programs)


def test_a_double_ring_rotates_where_the_direct_way_would_send_each_token_over_the_slow_links_more_often():
    shards, _, _ = BY_BYTES["documents of ranks far apart"]
    apart = AttentionPlan(shards, shards)
    assert cheapest_transport(apart, RingSchedule(1, 4)) is Transport.DIRECT
    assert cheapest_transport(apart, RingSchedule(2, 2)) is Transport.ROTATION


@pytest.mark.parametrize("schedule", [each for each in grids()[1:] if each.outer == 1], ids=str)
def test_the_cheapest_transport_is_the_one_whose_programs_send_less(schedule):
    plans = [plan for seed in range(6) for plan in random_plans(random.Random(seed), schedule.size)]
    chosen = set()
    for plan in plans:
        rotation, direct = (busiest(plan, schedule, each) for each in (Transport.ROTATION, Transport.DIRECT))
        chosen.add(cheapest_transport(plan, schedule))
        assert (cheapest_transport(plan, schedule) is Transport.DIRECT) == (direct < rotation)
    assert len(chosen) == 2 or schedule.size == 2


@pytest.mark.parametrize("kind", ["zigzag", "contiguous"])
def test_a_program_of_many_ranks_looks_at_few_pairs(kind, monkeypatch):
    looked_at: Counter[tuple[int, int]] = Counter()
    tiles = AttentionPlan.tiles

    def counted(plan: AttentionPlan, mine: int, theirs: int, **options: bool) -> object:
        looked_at[mine, theirs] += 1
        return tiles(plan, mine, theirs, **options)

    monkeypatch.setattr(AttentionPlan, "tiles", counted)
    shards = EqualChunks(64, 32, kind)
    for bands in (CAUSAL, FULL, window(20)):
        plan, schedule = AttentionPlan(shards, shards, bands), RingSchedule(1, 64)
        looked_at.clear()
        cheapest_transport(plan, schedule)
        for phase in Phase:
            program(plan, schedule, 3, phase)
        assert looked_at.total() <= 8 * 64
