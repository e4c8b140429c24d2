"""Programs in which K/V go straight from their owner to each rank that needs them, and gradients straight home.

A message holds what its receiver sees and nothing else: a halo for a window, nothing for documents that lie within a
rank.

Note [Order of messages]
    Ranks skip steps, and not the same ones. They never wait in a circle: a message has a number, the distance between
    its ends, which is the same for both, and each rank comes to its messages in the order of their numbers, to the
    gradients of one number before the K/V of its next one. Whoever waits for the message that is first in this order
    finds it posted. K/V are posted when the block before theirs is worked on, or earlier; without overlap, where they
    are waited for at once, after that and after its gradients.

Note [Room]
    Ranks that compute as much in all do not at each step: whole documents make one rank's own block large, and
    another's small. If K/V leave when the block before theirs is worked on, and gradients are waited for one by one,
    whoever comes early to a step waits for the one who comes late, at step after step. So both go ahead, as far as
    there is room: two blocks for K/V that are at hand or come (what one step ahead takes where all is needed), two for
    what leaves, and two for gradients either way. Where only parts of blocks travel, as with packed documents, that is
    mostly everything, from the first step on.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mindspeed_cp.plan import Tile, union
from mindspeed_cp.program.steps import Axis, Message, Step, live, message, some
from mindspeed_cp.program.transposed import Carried
from mindspeed_cp.schedule import Hop, RingSchedule


@dataclass(frozen=True)
class Straight:
    """How one rank takes part.

    backward: whether gradients travel home. at_once: whether all K/V travel at the first step, whatever the room; else
    each while the one before it is worked on, or with `ahead` earlier, where there is room: see Note [Room]. Then no
    more than two blocks come or are at hand, however many ranks there are.
    """

    plan: Carried
    schedule: RingSchedule
    rank: int
    backward: bool
    at_once: bool
    ahead: bool

    pieces: ClassVar[int] = 1
    """All heads travel together."""

    @functools.cached_property
    def room(self) -> int:
        """Tokens that may be on their way, either way, see Note [Room]; 0 where each message waits for its step."""
        return 2 * max(map(self.plan.keys.num_tokens, range(self.schedule.size))) if self.ahead else 0

    def steps(self, own: tuple[Tile, ...], rest: tuple[Tile, ...]) -> Iterator[Step]:
        """All steps. own: what is computed of this rank's own block at the first. rest: what is at the last."""
        met = [number for number in range(1, self.schedule.size) if any(self._messages(number))]
        messages = [self._messages(number) for number in met]
        posted = 0
        for place, number in enumerate((0, *met)):
            before, posted = posted, self._posted(place, posted, messages)
            receives = tuple(each for receive, _ in messages[before:posted] for each in some(receive))
            sends = tuple(each for _, send in messages[before:posted] for each in some(send))
            yield from live(self._step(number, own)._replace(receives=receives, sends=sends))
        yield from live(Step(self.rank, rest, number=self.schedule.size))

    def _posted(self, place: int, posted: int, messages: Sequence[tuple[Message | None, Message | None]]) -> int:
        """How many of the messages have been posted when a step is worked on. posted: at the step before it."""
        if self.at_once:
            return len(messages)
        due = min(place + 1, len(messages))
        coming, leaving = ([sum(one.num_tokens for one in some(each[way])) for each in messages] for way in (0, 1))
        at_hand = max(0, place - 1)
        while posted < len(messages) and (
            posted < due or max(sum(coming[at_hand : posted + 1]), sum(leaving[place : posted + 1])) <= self.room
        ):
            posted += 1
        return posted

    def _messages(self, number: int) -> tuple[Message | None, Message | None]:
        """The K/V that come for the step of this number, and those that leave for another rank's."""
        axis = Axis.INNER if number < self.schedule.inner else Axis.OUTER
        owner, reader = self._owner(number), self._reader(number)
        return (
            message(owner, owner, self.plan.needed(self.rank, owner), axis, number=number),
            message(reader, self.rank, self.plan.needed(reader, self.rank), axis, number=number),
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
            gives = message(owner, owner, union(tile.keys for tile in tiles), axis, number=number)
            gets = message(reader, self.rank, self.plan.needed(reader, self.rank), axis, number=number)
        return Step(owner, tiles, gives=gives, gets=gets, number=number)

    def _owner(self, number: int) -> int:
        outer, inner = divmod(number, self.schedule.inner)
        return self.schedule.peer(self.rank, Hop(-outer, -inner))

    def _reader(self, number: int) -> int:
        """The rank that works on this one's block at the step of this number."""
        return self.schedule.peer(self.rank, Hop(*divmod(number, self.schedule.inner)))
