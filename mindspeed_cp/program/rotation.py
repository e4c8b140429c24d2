"""Programs in which blocks pass from rank to rank: along an inner ring, and from its first step to the next one.

Only tokens travel that are seen: a message holds those that some rank from here on needs, and a hop that nobody needs
is not made.

Note [Gradients]
    Each partial dK/dV goes straight to the rank of its own inner ring that stands where the owner does in its own, and
    is added there. After the steps of an inner ring that is not the owner's, that sum crosses to the owner. So every
    partial gradient is rounded once, however many ranks there are, and one block for each foreign inner ring leaves
    over the slow links.

Note [Pieces]
    A sum crosses only after its inner ring has been worked on as a whole, and nothing is left to hide the last one
    behind. With `pieces` above 1 foreign inner rings are worked on piece by piece (a piece is a share of the K/V
    heads), and a piece crosses while the next one is computed.
    In a plain ring each step is worked on piece by piece. A piece goes on as soon as it is worked on, and not when its
    whole block is: what travels is in step with what is computed, from the first block to the last gradients.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mindspeed_cp.plan import Tile, union
from mindspeed_cp.program.needs import Needs
from mindspeed_cp.program.steps import Axis, Message, Step, live, message, some
from mindspeed_cp.schedule import Hop


@dataclass(frozen=True)
class Rotation:
    """How one rank takes part. backward: whether gradients travel home. pieces: see Note [Pieces]."""

    needs: Needs
    rank: int
    backward: bool
    pieces: int

    room: ClassVar[int] = 0
    """See Program: gradients are waited for one by one."""

    def steps(self, own: tuple[Tile, ...], rest: tuple[Tile, ...]) -> Iterator[Step]:
        """All steps. own: what is computed of this rank's own block at the first. rest: what is at the last."""
        schedule = self.needs.schedule
        if schedule.outer == 1 and self.pieces > 1:
            for inner, share in itertools.product(range(schedule.inner), range(self.pieces)):
                yield from live(self._step(0, inner, share, own))
            for share in range(self.pieces):
                yield from live(Step(self.rank, rest, piece=share))
            return
        for outer in range(schedule.outer):
            for piece in range(self.pieces) if outer and self.pieces > 1 else (None,):
                for inner in range(schedule.inner):
                    yield from live(self._step(outer, inner, piece, own))
                if outer and self.backward:
                    yield from live(self._crossing(outer, piece))
        yield from live(Step(self.rank, rest))

    def _step(self, outer: int, inner: int, piece: int | None, own: tuple[Tile, ...]) -> Step:
        """The step at which this rank works on the block from so many inner rings and so many places away."""
        plan, schedule = self.needs.plan, self.needs.schedule
        owner = self._peer(-outer, -inner)
        tiles = plan.tiles(self.rank, owner) if outer or inner else own
        passed_on: list[tuple[Message | None, Message | None]] = []
        if inner == 0 and outer + 1 < schedule.outer:
            crossing = range(self.pieces) if self.pieces > 1 and outer == 0 else (piece,)
            passed_on += [self._passed_on(Hop(outer, inner), Hop(1, 0), Axis.OUTER, each) for each in crossing]
        if inner + 1 < schedule.inner:
            passed_on.append(self._passed_on(Hop(outer, inner), Hop(0, 1), Axis.INNER, piece))
        receives = tuple(each for receive, _ in passed_on for each in some(receive))
        sends = tuple(each for _, send in passed_on for each in some(send))
        gives, gets = None, None
        if self.backward and inner:
            gives = message(self._peer(0, -inner), owner, union(tile.keys for tile in tiles), Axis.HOME, piece)
            source, summed_for = self._peer(0, inner), self._peer(-outer, 0)
            gets = message(source, summed_for, plan.needed(source, summed_for), Axis.HOME, piece)
        return Step(owner, tiles, receives, sends, gives, gets, piece)

    def _crossing(self, outer: int, piece: int | None) -> Step:
        """The sum of this inner ring's gradients goes to its owner, and that of another one comes for this rank."""
        owner, source = self._peer(-outer, 0), self._peer(outer, 0)
        gives = message(owner, owner, self.needs.in_inner_ring(owner, outer), Axis.ACROSS, piece)
        gets = message(source, self.rank, self.needs.in_inner_ring(self.rank, outer), Axis.ACROSS, piece)
        return Step(owner, gives=gives, gets=gets, piece=piece)

    def _passed_on(self, now: Hop, hop: Hop, axis: Axis, piece: int | None) -> tuple[Message | None, Message | None]:
        """What comes and what leaves when blocks go on by `hop`: the one to work on after it, and the one at hand.

        now: by how many inner rings and places the one at hand is away from home.
        """
        then = Hop(now.outer + hop.outer, now.inner + hop.inner)
        number = then.outer * self.needs.schedule.inner + then.inner
        at_hand, arriving = self._peer(-now.outer, -now.inner), self._peer(-then.outer, -then.inner)
        to, source = self._peer(*hop), self._peer(-hop.outer, -hop.inner)
        return (
            message(source, arriving, self.needs.onwards(arriving, number), axis, piece),
            message(to, at_hand, self.needs.onwards(at_hand, number), axis, piece),
        )

    def _peer(self, outer: int, inner: int) -> int:
        return self.needs.schedule.peer(self.rank, Hop(outer, inner))
