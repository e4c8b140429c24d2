"""Straight transport goes ahead of the steps, see Note [Room] in program/straight.py: how far, and what it is worth."""

import random
from itertools import product

import pytest
import torch

from mindspeed_cp.benchmark.documents import areas, lognormal_mix
from mindspeed_cp.layouts import Balanced, EqualChunks, Zigzag
from mindspeed_cp.plan import FULL, AttentionPlan
from mindspeed_cp.planner import AttentionPass, AttentionShape, Network, predicted_seconds
from mindspeed_cp.program import Phase, Program, Transport, cheapest_transport, program
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology
from unit_tests.dealt import contiguous, zigzag
from unit_tests.plan_cases import PlanCase, attend_virtually
from unit_tests.test_program import Played
from unit_tests.test_transports import random_plans

RING = RingSchedule(1, 8)
TOKENS = 2**14
MIXES = [lognormal_mix(seed, TOKENS) for seed in range(1, 11)]


def plan_of(rule: type[Balanced] | type[Zigzag], documents: tuple[int, ...]) -> AttentionPlan:
    layout = rule(8, (documents,))
    return AttentionPlan(layout, layout)


def seconds(plan: AttentionPlan) -> float:
    """Of both passes, where messages take no time, and a pair of query and key a second in all."""
    network = Network(num_ranks=8, ranks_per_node=8, fast_mbit=1e12, slow_mbit=1e12)
    shape = AttentionShape(num_tokens=TOKENS, num_heads=1, num_kv_heads=1, head_size=1)
    return sum(
        predicted_seconds(
            network,
            AttentionPass(
                topology=CPTopology(inner=8), shape=shape, phase=phase, flops_per_s=14.0, overlap=True, plan=plan
            ).events,
        )
        for phase in Phase
    )


def test_ranks_that_compute_as_much_in_all_hardly_wait_however_uneven_their_steps_are():
    plans = [plan_of(Balanced, documents) for documents in MIXES]
    waiting = [seconds(plan) / max(areas(plan)) for plan in plans]
    assert sum(waiting) / 10 <= 1.02
    assert max(waiting) <= 1.1


def test_a_balanced_mix_is_half_as_fast_again_as_a_zigzag_over_the_stream():
    ratios = [seconds(plan_of(Zigzag, documents)) / seconds(plan_of(Balanced, documents)) for documents in MIXES]
    assert sum(ratios) / 10 >= 1.75
    assert sorted(ratios)[4] >= 1.5


def under_way(program: Program, way: str) -> int:
    """The most tokens of K/V that leave, or of gradients that leave or come, at once."""
    most, left = 0, dict[int, int]()
    for number, (step, added) in enumerate(zip(program.steps, program.added, strict=True)):
        if way == "sends":
            left = {each: tokens for each, tokens in left.items() if each > step.number}
            left.update({message.number: message.num_tokens for message in step.sends})
        else:
            left = {each: tokens for each, tokens in left.items() if each not in added}
            message = getattr(step, way)
            left.update({} if message is None else {number: message.num_tokens})
        most = max(most, sum(left.values()))
    return most


@pytest.mark.parametrize("transport", [Transport.DIRECT, Transport.ALL_GATHER])
def test_what_goes_ahead_arrives_and_takes_two_blocks_at_most_each_way(transport):
    rng = random.Random(1)
    for size, phase in product((2, 5, 8), Phase):
        schedule = RingSchedule(1, size)
        for plan in random_plans(rng, size):
            played = Played(plan, schedule, phase, transport=transport, ahead=True)
            assert played.computed == Played(plan, schedule, phase, transport=transport).computed
            room = 2 * max(map(plan.keys.num_tokens, range(size)))
            for each in played.programs if transport is Transport.DIRECT else ():
                assert max(each.held_bytes(1, 0), *(under_way(each, way) for way in ("sends", "gives", "gets"))) <= room


def test_messages_go_as_far_ahead_as_there_is_room_and_no_further():
    shards = EqualChunks(8, 8)
    whole = program(AttentionPlan(shards, shards, FULL), RING, 2, Phase.FORWARD, transport=Transport.DIRECT, ahead=True)
    assert [len(step.receives) for step in whole.steps] == [2, 0, 1, 1, 1, 1, 1, 0]
    parts = plan_of(Balanced, MIXES[6])
    few = 0
    for rank in range(8):
        steps = program(parts, RING, rank, Phase.FORWARD, transport=Transport.DIRECT, ahead=True).steps
        ways = ([each for step in steps for each in getattr(step, way)] for way in ("receives", "sends"))
        if max(sum(message.num_tokens for message in way) for way in ways) <= 2 * TOKENS // 8:
            assert not any(step.receives or step.sends for step in steps[1:])
            few += len(steps) > 3
    assert few


@pytest.mark.parametrize("transport", [Transport.DIRECT, None])
def test_what_goes_ahead_is_added_in_the_order_of_the_steps_to_the_bit(transport):
    layout, ring = zigzag([3, 5, 2, 4, 6, 1, 7, 2], [[30]]), CPTopology(inner=4)
    cases = (
        PlanCase(layout, ring, transport=transport, overlap=overlap, dtype=torch.float32) for overlap in (False, True)
    )
    found = map(attend_virtually, cases)
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_rotation_is_not_taken_for_fewer_bytes_where_it_waits_for_longer():
    uneven = plan_of(Balanced, MIXES[9])
    assert cheapest_transport(uneven, RING) is Transport.ROTATION
    assert cheapest_transport(uneven, RING, ahead=True) is Transport.DIRECT
    for even in (EqualChunks(8, 8), contiguous([8] * 8)):
        assert cheapest_transport(AttentionPlan(even, even), RING, ahead=True) is Transport.ROTATION
