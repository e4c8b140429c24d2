"""Programs in which K/V go straight from their owner to each rank that needs them, and gradients straight home.

A message holds what its receiver sees and nothing else: a halo for a window, nothing for documents that lie within a
rank.

Note [Order of messages]
    Ranks skip steps, and not the same ones. They never wait in a circle: a message has a number, the distance between
    its ends, which is the same for both, and each rank comes to its messages in the order of their numbers, to the
    gradients of one number before the K/V of its next one. Whoever waits for the message that is first in this order
    finds it posted. K/V are posted when the block before theirs is worked on; without overlap, where they are waited
    for at once, after that and after its gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_cp.plan import Tile, union
from mindspeed_cp.program.steps import Axis, Message, Step, live, message, some
from mindspeed_cp.program.transposed import Carried
from mindspeed_cp.schedule import Hop, RingSchedule


@dataclass(frozen=True)
class Straight:
    """How one rank takes part.

    backward: whether gradients travel home. at_once: whether all K/V travel at the first step, or each while the one
    before it is worked on, so that two blocks are in memory, however many ranks there are.
    """

    plan: Carried
    schedule: RingSchedule
    rank: int
    backward: bool
    at_once: bool

    def steps(self, own: tuple[Tile, ...], rest: tuple[Tile, ...]) -> Iterator[Step]:
        """All steps. own: what is computed of this rank's own block at the first. rest: what is at the last."""
        met = [number for number in range(1, self.schedule.size) if any(self._messages(number))]
        for place, number in enumerate((0, *met)):
            meanwhile = (met if number == 0 else []) if self.at_once else met[place : place + 1]
            messages = [self._messages(each) for each in meanwhile]
            receives = tuple(each for receive, _ in messages for each in some(receive))
            sends = tuple(each for _, send in messages for each in some(send))
            yield from live(self._step(number, own)._replace(receives=receives, sends=sends))
        yield from live(Step(self.rank, rest))

    def _messages(self, number: int) -> tuple[Message | None, Message | None]:
        """The K/V that come for the step of this number, and those that leave for another rank's."""
        axis = Axis.INNER if number < self.schedule.inner else Axis.OUTER
        owner, reader = self._owner(number), self._reader(number)
        return (
            message(owner, owner, self.plan.needed(self.rank, owner), axis),
            message(reader, self.rank, self.plan.needed(reader, self.rank), axis),
        )

    def _step(self, number: int, own: tuple[Tile, ...]) -> Step:
        """What is computed at it, and which gradients travel."""
        if number == 0:
            return Step(self.rank, own)
        owner, reader = self._owner(number), self._reader(number)
        tiles = self.plan.tiles(self.rank, owner) if self.rank in self.plan.readers(owner) else ()
        gives, gets = None, None
        if self.backward:
            axis = Axis.HOME if number < self.schedule.inner else Axis.ACROSS
            gives = message(owner, owner, union(tile.keys for tile in tiles), axis)
            gets = message(reader, self.rank, self.plan.needed(reader, self.rank), axis)
        return Step(owner, tiles, gives=gives, gets=gets)

    def _owner(self, number: int) -> int:
        outer, inner = divmod(number, self.schedule.inner)
        return self.schedule.peer(self.rank, Hop(-outer, -inner))

    def _reader(self, number: int) -> int:
        """The rank that works on this one's block at the step of this number."""
        return self.schedule.peer(self.rank, Hop(*divmod(number, self.schedule.inner)))
