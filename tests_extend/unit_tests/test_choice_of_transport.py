"""Which transport a plan takes where none is named: the rule in words, counted from programs and tiles alone."""

import random

import pytest

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.layouts import Balanced
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Phase, Transport, cheapest_transport, program
from mindspeed_cp.schedule import RingSchedule
from unit_tests.test_transports import random_plans


def tokens_of_the_busiest(plan: AttentionPlan, size: int, transport: Transport) -> int:
    programs = (program(plan, RingSchedule(1, size), rank, Phase.FORWARD, transport=transport) for rank in range(size))
    return max(each.sent().total() for each in programs)


def chosen_by_the_rule(plan: AttentionPlan, size: int, *, ahead: bool) -> Transport:
    direct, rotated = (tokens_of_the_busiest(plan, size, each) for each in (Transport.DIRECT, Transport.ROTATION))
    if direct <= rotated or not ahead:
        return Transport.DIRECT if direct < rotated else Transport.ROTATION
    largest = max(sum(plan.area(rank, owner) for owner in range(size)) for rank in range(size))
    in_step = sum(max(plan.area(rank, (rank - number) % size) for rank in range(size)) for number in range(size))
    return Transport.DIRECT if direct * largest < rotated * in_step else Transport.ROTATION


@pytest.mark.parametrize("ahead", [False, True])
def test_the_choice_weighs_tokens_and_with_overlap_waits_where_steps_are_uneven(ahead):
    met = set()
    for seed in range(16):
        rng = random.Random(seed)
        size = rng.randrange(3, 7)
        lengths = tuple(rng.randrange(4, 60) for _ in range(12))
        layout = Balanced(size, (lengths,))
        for plan in (*random_plans(rng, size)[:3], AttentionPlan(layout, layout)):
            chosen = cheapest_transport(plan, RingSchedule(1, size), ahead=ahead)
            assert chosen is chosen_by_the_rule(plan, size, ahead=ahead), plan
            direct, rotated = (
                tokens_of_the_busiest(plan, size, each) for each in (Transport.DIRECT, Transport.ROTATION)
            )
            met.add((direct > rotated, chosen))
    more_tokens = {chosen for more, chosen in met if more}
    assert more_tokens == ({Transport.DIRECT, Transport.ROTATION} if ahead else {Transport.ROTATION})


def test_what_is_no_transport_is_refused_on_one_rank_as_on_many():
    with pytest.raises(ValueError, match=r"transport='direct' is none; give Transport\.ROTATION, Transport\.DIRECT, "):
        build_attention(ContextParallelConfig(), transport="direct")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": None}, "config=None is none; give a ContextParallelConfig"),
        ({"layout": Balanced(1, ((9,),))}, "layout=a Balanced is none; give a SequenceLayout, or None; another one"),
        ({"kernels": "reference"}, "kernels='reference' is none; give a KernelRegistry"),
    ],
)
def test_an_argument_of_another_kind_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_attention(**{"config": ContextParallelConfig(), **options})
