"""The three ways that K/V travel, and which of them a plan takes where nobody names one.

Note [Two parts of the own block]
    In a backward pass the own block is done in two parts of about equal area: the first hides the first K/V on its way,
    the last one the last gradients. Other steps have their neighbours' work to hide behind.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import Enum

from mindspeed_cp.plan import halves
from mindspeed_cp.program.needs import Needs
from mindspeed_cp.program.rotation import Rotation
from mindspeed_cp.program.steps import KV, Phase, Program, Step, live, num_tokens
from mindspeed_cp.program.straight import Straight
from mindspeed_cp.program.transposed import Carried
from mindspeed_cp.schedule import Hop, RingSchedule

_MOST_RUNS = 50_000
"""Runs of keys, times the ranks that may see them, that are looked at for a choice: some microseconds each."""


class Transport(Enum):
    """How K/V get to the ranks that need them."""

    ROTATION = "from rank to rank: most links are short, best where all need all"
    DIRECT = "straight from owners, one after another: no token to a rank that does not see it"
    ALL_GATHER = "straight from all owners at once: everything is in memory at the same time"


def program(
    plan: Carried,
    schedule: RingSchedule,
    rank: int,
    phase: Phase,
    *,
    transport: Transport = Transport.ROTATION,
    pieces: int = 1,
    in_two: bool = True,
    kept: KV = KV.NEITHER,
    ahead: bool = False,
) -> Program:
    """What `rank` does. Everything that depends on it reads this: attention, bytes, memory, predictions and drawings.

    plan: between the ring's ranks. pieces: of the heads, in a rotation, see Note [Pieces] in rotation.py. in_two:
    whether a backward pass does the own block in two parts, see Note [Two parts of the own block]. kept: see Note
    [Kept K/V] in steps.py. ahead: whether what goes straight is posted as early as there is room, see Note [Room] in
    straight.py; only for ranks that compute while messages travel. Steps at which nothing is computed and nothing
    travels are left out.
    """
    backward = phase is Phase.BACKWARD
    own = plan.tiles(rank, rank)
    first, last = halves(own) if backward and in_two and schedule.size > 1 else (own, ())
    maker: Rotation | Straight
    if transport is Transport.ROTATION:
        maker = Rotation(Needs(plan, schedule), rank, backward, pieces)
    else:
        maker = Straight(plan, schedule, rank, backward, transport is Transport.ALL_GATHER, ahead)
    steps = maker.steps(first, last)
    return Program(rank, tuple(_without(kept, steps) if backward else steps), maker.pieces, kept, maker.room)


def _without(kept: KV, steps: Iterable[Step]) -> Iterator[Step]:
    """The steps, with messages that carry the K/V that are not kept; none where that is nothing."""
    carries = KV.BOTH & ~kept
    for step in steps:
        receives, sends = (
            tuple(message._replace(carries=carries) for message in way if carries)
            for way in (step.receives, step.sends)
        )
        yield from live(step._replace(receives=receives, sends=sends))


def cheapest_transport(plan: Carried, schedule: RingSchedule, *, ahead: bool = False, pieces: int = 1) -> Transport:
    """By bytes, and with `ahead` by waits as well: what a plan takes where no transport is named.

    Bytes are the tokens of K/V that the rank which sends most of them sends, by rotation and by direct transport.
    Where these are fewer it is direct, where they are as many rotation. Gradients are left out: they go straight home
    either way.

    Where they are more it is rotation; but with `ahead`, see Note [Room] in straight.py, only if a rotation saves as
    much in tokens as it loses by going in step: it takes the sum over the steps of the largest area at each, and direct
    transport the largest area of a rank. It is direct where its tokens, times its area, come to less than a rotation's.

    In a double ring gradients do not go straight home, and the links between inner rings are the slow ones: it is
    rotation, unless no key is seen in another inner ring than its own. Where tokens lie in so many runs that it would
    take long to find out, it is rotation. All ranks find the same, as all have the plan.

    pieces: of the heads in a rotation. With pieces the two give a kernel other heads at once, and so other last bits:
    `ahead`, which overlap brings, then decides nothing.
    """
    ahead = ahead and pieces == 1
    return plan.once(("cheapest transport", schedule, ahead), lambda: _cheapest(plan, schedule, ahead))


def _cheapest(plan: Carried, schedule: RingSchedule, ahead: bool) -> Transport:
    owners, readers = range(schedule.size), plan.readers
    met = ((reader // schedule.inner, owner // schedule.inner) for owner in owners for reader in readers(owner))
    if schedule.outer > 1 and any(mine != theirs for mine, theirs in met):
        return Transport.ROTATION
    if sum(len(plan.keys.runs(owner)) * len(readers(owner)) for owner in owners) > _MOST_RUNS:
        return Transport.ROTATION
    needs = Needs(plan, schedule)
    rotated, straight = max(_rotated(needs).values(), default=0), 0
    # Those that most others need come first: where all need all, the first of them already sends as many.
    for owner in sorted(owners, key=lambda owner: (len(readers(owner)), owner), reverse=True):
        sent = sum(num_tokens(plan.needed(reader, owner)) for reader in readers(owner) if reader != owner)
        straight = max(straight, sent)
        if straight == rotated or (straight > rotated and not ahead):
            return Transport.ROTATION
    if straight > rotated:
        apart, in_step = _in_step(plan, schedule)
        return Transport.DIRECT if straight * apart < rotated * in_step else Transport.ROTATION
    return Transport.DIRECT


def _in_step(plan: Carried, schedule: RingSchedule) -> tuple[int, int]:
    """The largest area of a rank, and what it comes to where at each step all wait for the one that has most to do."""
    of_ranks, of_steps = Counter[int](), Counter[int]()
    for owner in range(schedule.size):
        for reader in plan.readers(owner):
            area = sum(tile.area for tile in plan.tiles(reader, owner))
            number = schedule.number(reader, owner)
            of_ranks[reader] += area
            of_steps[number] = max(of_steps[number], area)
    return max(of_ranks.values(), default=0), of_steps.total()


def _rotated(needs: Needs) -> Counter[int]:
    """Tokens of K/V that each rank sends in a rotation."""
    schedule, sent = needs.schedule, Counter[int]()
    for owner in range(schedule.size):
        last = max((schedule.number(reader, owner) for reader in needs.plan.readers(owner)), default=0)
        for number in range(1, last + 1):
            outer, inner = divmod(number, schedule.inner)
            sender = schedule.peer(owner, Hop(outer, inner - 1) if inner else Hop(outer - 1, 0))
            sent[sender] += num_tokens(needs.onwards(owner, number))
    return sent
