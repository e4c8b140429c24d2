"""What travels when: the steps of one rank, with the messages that it sends and receives at each. No torch.

Everything that depends on it reads `program`: attention plays it, and bytes, memory, predictions and drawings are read
off it. Who sees whom is the plan's (plan.py), in which order owners are met is the schedule's (schedule.py).

Note [Program]
    A step has an owner: the ring rank whose keys and values are worked on. What happens at a step, in this order:

        receives    are posted: K/V that later steps work on
        sends       K/V that is at hand goes on to the next rank
        tiles       are computed
        gives       the gradients of the owner's K/V leave, or are kept where the step gives nothing
        gets        gradients that another rank has found are added to the sum for their owner

    A step works on what has arrived, or is this rank's own. Kept gradients and those that come in are added to one sum
    for each owner, in the order of the steps; a step without tiles that gives, gives that sum. What is left in the end
    is the sum for this rank itself.

    Only tokens travel that are seen: a message holds those that some rank from here on needs, and a hop that nobody
    needs is not made.

Note [Gradients]
    Each partial dK/dV goes straight to the rank of its own inner ring that stands where the owner does in its own, and
    is added there. After the steps of an inner ring that is not the owner's, that sum crosses to the owner. So every
    partial gradient is rounded once, however many ranks there are, and one block for each foreign inner ring leaves
    over the slow links.

Note [Two parts of the own block]
    In a backward pass the own block is done in two parts of about equal area: the first hides the first K/V on its way,
    the last one the last gradients. Other steps have their neighbours' work to hide behind.

Note [Pieces]
    A sum crosses only after its inner ring has been worked on as a whole, and nothing is left to hide the last one
    behind. With `pieces` above 1 foreign inner rings are worked on piece by piece (a piece is a share of the K/V
    heads), and a piece crosses while the next one is computed.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from mindspeed_cp.plan import AttentionPlan, Tile, halves, union
from mindspeed_cp.schedule import Hop, RingSchedule


class Axis(Enum):
    """Which way a message goes; each has its own order among messages, and may have a process group of its own."""

    INNER = "K/V within the inner ring"
    OUTER = "K/V between inner rings"
    HOME = "gradients within the inner ring"
    ACROSS = "gradients between inner rings"


class Phase(Enum):
    """The forward pass, in which K/V travel, or the backward pass, in which their gradients travel home too."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Message(NamedTuple):
    """Tokens of `owner`'s K/V, or of their gradients, to or from `peer`.

    peer, owner: ring ranks. piece: which of the pieces of the K/V heads; None for all.
    """

    peer: int
    owner: int
    tokens: tuple[slice, ...]
    axis: Axis
    piece: int | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return sum(each.stop - each.start for each in self.tokens)


class Step(NamedTuple):
    """What is done with the K/V of one owner, see Note [Program].

    piece: the piece of the K/V heads that is worked on, with their query heads; None for all of them.
    """

    owner: int
    tiles: tuple[Tile, ...] = ()
    receives: tuple[Message, ...] = ()
    sends: tuple[Message, ...] = ()
    gives: Message | None = None
    gets: Message | None = None
    piece: int | None = None


@dataclass(frozen=True)
class Program:
    """The steps of one rank. pieces: into how many the heads are cut where they are."""

    rank: int
    steps: tuple[Step, ...]
    pieces: int = 1

    def sent(self) -> Counter[Axis]:
        """Tokens that leave this rank along each axis; a piece counts as its share of a token, in all of 1 / pieces."""
        sent: Counter[Axis] = Counter()
        for step in self.steps:
            for message in (*step.sends, *_some(step.gives)):
                sent[message.axis] += message.num_tokens * (1 if message.piece is not None else self.pieces)
        return Counter({axis: tokens // self.pieces for axis, tokens in sent.items()})

    def last_uses(self) -> dict[tuple[int, int | None], int]:
        """The number of the last step that works on a block, or sends it, by owner and piece."""
        last_use: dict[tuple[int, int | None], int] = {}
        for number, step in enumerate(self.steps):
            used = {(step.owner, step.piece)} | {(message.owner, message.piece) for message in step.sends}
            last_use.update(dict.fromkeys(used, number))
        return last_use

    def held(self) -> int:
        """The most tokens of others' K/V that are in memory at once; one that is received counts from its posting."""
        last_use = self.last_uses()
        alive: dict[tuple[int, int | None], int] = {}
        most = 0
        for number, step in enumerate(self.steps):
            for message in step.receives:
                share = self.pieces if message.piece is None else 1
                alive[message.owner, message.piece] = message.num_tokens * share
            most = max(most, sum(alive.values()))
            alive = {block: tokens for block, tokens in alive.items() if last_use[block] > number}
        return most // self.pieces


def program(
    plan: AttentionPlan, schedule: RingSchedule, rank: int, phase: Phase, *, pieces: int = 1, in_two: bool = True
) -> Program:
    """What `rank` does: K/V pass from rank to rank, and gradients go home, see the notes above.

    plan: between the ring's ranks. pieces: of the heads, in foreign inner rings. in_two: whether a backward pass does
    the own block in two parts. Steps at which nothing is computed and nothing travels are left out.
    """
    rotation, backward = _Rotation(plan, schedule), phase is Phase.BACKWARD
    own = plan.tiles(rank, rank)
    parts = halves(own) if backward and in_two and schedule.size > 1 else (own, ())
    return Program(rank, tuple(_steps(rotation, rank, backward, pieces, *parts)), pieces)


def _steps(
    rotation: "_Rotation", rank: int, backward: bool, pieces: int, first: tuple[Tile, ...], last: tuple[Tile, ...]
) -> Iterator[Step]:
    schedule = rotation.schedule
    for outer in range(schedule.outer):
        for piece in range(pieces) if outer and pieces > 1 else (None,):
            for inner in range(schedule.inner):
                yield from _live(rotation.step(rank, outer, inner, piece, pieces, backward, own=first))
            if outer and backward:
                yield from _live(rotation.crossing(rank, outer, piece))
    yield from _live(Step(rank, last))


def _live(step: Step) -> tuple[Step, ...]:
    """The step, unless nothing happens at it."""
    return (step,) if any(step[1:6]) else ()


@dataclass(frozen=True)
class _Rotation:
    """Blocks that pass from rank to rank: along an inner ring, and from its first step to the next inner ring."""

    plan: AttentionPlan
    schedule: RingSchedule

    def step(
        self, rank: int, outer: int, inner: int, piece: int | None, pieces: int, backward: bool, own: tuple[Tile, ...]
    ) -> Step:
        """The step at which `rank` works on the block from so many inner rings and so many places away."""
        at, schedule = (outer, inner), self.schedule
        owner = schedule.peer(rank, Hop(-outer, -inner))
        tiles = own if at == (0, 0) else self.plan.tiles(rank, owner)
        sends: list[Message] = []
        receives: list[Message] = []
        if inner == 0 and outer + 1 < schedule.outer:
            crossing = range(pieces) if pieces > 1 and outer == 0 else (piece,)
            for each in crossing:
                self._pass_on(rank, (outer, inner), Hop(1, 0), Axis.OUTER, each, sends, receives)
        if inner + 1 < schedule.inner:
            self._pass_on(rank, (outer, inner), Hop(0, 1), Axis.INNER, piece, sends, receives)
        gives, gets = None, None
        if backward and inner:
            gives = _message(schedule.peer(rank, Hop(0, -inner)), owner, union(t.keys for t in tiles), Axis.HOME, piece)
            source, summed_for = schedule.peer(rank, Hop(0, inner)), schedule.peer(rank, Hop(-outer, 0))
            gets = _message(source, summed_for, self.plan.needed(source, summed_for), Axis.HOME, piece)
        return Step(owner, tiles, tuple(receives), tuple(sends), gives, gets, piece)

    def crossing(self, rank: int, outer: int, piece: int | None) -> Step:
        """The sum of this inner ring's gradients goes to its owner, and that of another one comes for this rank."""
        owner = self.schedule.peer(rank, Hop(-outer, 0))
        source = self.schedule.peer(rank, Hop(outer, 0))
        gives = _message(owner, owner, self._needed_in_inner_ring(rank, owner), Axis.ACROSS, piece)
        gets = _message(source, rank, self._needed_in_inner_ring(source, rank), Axis.ACROSS, piece)
        return Step(owner, gives=gives, gets=gets, piece=piece)

    def _pass_on(
        self,
        rank: int,
        at: tuple[int, int],
        hop: Hop,
        axis: Axis,
        piece: int | None,
        sends: list[Message],
        receives: list[Message],
    ) -> None:
        """The block that is at hand goes on by `hop`, and the one that will be worked on after that hop comes."""
        outer, inner = at
        then = outer + hop.outer, inner + hop.inner
        to = self.schedule.peer(rank, hop)
        source = self.schedule.peer(rank, Hop(-hop.outer, -hop.inner))
        at_hand = self.schedule.peer(rank, Hop(-outer, -inner))
        arriving = self.schedule.peer(rank, Hop(-then[0], -then[1]))
        sends += _some(_message(to, at_hand, self._needed_from(at_hand, *then), axis, piece))
        receives += _some(_message(source, arriving, self._needed_from(arriving, *then), axis, piece))

    def _needed_from(self, owner: int, outer: int, inner: int) -> tuple[slice, ...]:
        """Those of the owner's tokens that the rank which works on them at this step needs, or one after it."""
        schedule, needed = self.schedule, list[slice]()
        for later in range(outer, schedule.outer if inner == 0 else outer + 1):
            for place in range(inner if later == outer else 0, schedule.inner):
                needed += self.plan.needed(schedule.peer(owner, Hop(later, place)), owner)
        return union(needed)

    def _needed_in_inner_ring(self, member: int, owner: int) -> tuple[slice, ...]:
        """Those of the owner's tokens that some rank of a member's inner ring sees."""
        ranks = (self.schedule.peer(member, Hop(0, place)) for place in range(self.schedule.inner))
        return union(each for rank in ranks for each in self.plan.needed(rank, owner))


def _message(peer: int, owner: int, tokens: tuple[slice, ...], axis: Axis, piece: int | None) -> Message | None:
    return Message(peer, owner, tokens, axis, piece) if tokens else None


def _some(message: Message | None) -> tuple[Message, ...]:
    return () if message is None else (message,)
