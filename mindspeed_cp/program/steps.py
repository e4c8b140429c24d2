"""What a program is: the steps of one rank, and what follows from them (bytes, what is held and when). No torch.

Note [Program]
    A step has an owner: the ring rank whose keys and values are worked on. What happens at a step, in this order:

        receives    are posted: K/V that later steps work on
        sends       K/V that is at hand goes to other ranks
        tiles       are computed
        gives       the gradients of the owner's K/V leave, or are kept where the step gives nothing
        gets        gradients that another rank has found are added to the sum for their owner

    Without overlap, messages with K/V come last instead of first, and each is waited for at once.

    Messages of one axis, number and piece are posted, and waited for, as one exchange. Those of K/V are waited for when
    their block is worked on, or when another exchange of their axis is posted at a step of their number or a later one.
    Gradients are waited for, and added, in the order in which they were posted: before the next ones leave where there
    is no room for these as well, which with a `Program.room` of 0 is always.

    A step works on what has arrived, or is this rank's own. Kept gradients and those that come in are added to one sum
    for each owner, in the order of the steps; a step without tiles that gives, gives that sum. What is left in the end
    is the sum for this rank itself.

Note [Kept K/V]
    A forward pass may keep the keys, the values or both that its steps have worked on. In the backward pass these do
    not travel again: messages carry the rest, and where nothing is left there are none. What is kept of a block is what
    this rank's own queries see of it, which may be less than it has received to pass on.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, Flag
from typing import NamedTuple

from mindspeed_cp.plan import Tile, union


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


class KV(Flag):
    """Keys, values, both of them or neither."""

    NEITHER = 0
    KEYS = 1
    VALUES = 2
    BOTH = 3


class Message(NamedTuple):
    """Tokens of `owner`'s K/V, or of their gradients, to or from `peer`.

    peer, owner: ring ranks. piece: which of the pieces of the K/V heads; None for all. carries: which of the two it
    holds, see Note [Kept K/V]. number: which exchange of its axis it is part of, the same at both ends; a rotation has
    one after another, which need none.
    """

    peer: int
    owner: int
    tokens: tuple[slice, ...]
    axis: Axis
    piece: int | None = None
    carries: KV = KV.BOTH
    number: int = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return num_tokens(self.tokens)


class Step(NamedTuple):
    """What is done with the K/V of one owner, see Note [Program].

    piece: the piece of the K/V heads that is worked on, with their query heads; None for all of them. number: that of
    the messages which bring its block, where they have one.
    """

    owner: int
    tiles: tuple[Tile, ...] = ()
    receives: tuple[Message, ...] = ()
    sends: tuple[Message, ...] = ()
    gives: Message | None = None
    gets: Message | None = None
    piece: int | None = None
    number: int = 0

    @property
    def gradients(self) -> "Exchange | None":
        """What it gives and gets, as one exchange; None where that is nothing."""
        first = self.gives or self.gets
        if first is None:
            return None
        return Exchange(first.axis, self.piece, self.owner, some(self.gives), some(self.gets), first.number)


BlockName = tuple[int, int | None]
"""K/V by their owner, and the piece of the heads; None for all of them."""


class Exchange(NamedTuple):
    """Messages of one axis, number and piece of the heads: they are posted, and waited for, as one.

    owner: of the step that it is told by in profiles and errors.
    """

    axis: Axis
    piece: int | None
    owner: int
    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    number: int = 0

    @property
    def widest(self) -> int:
        """The tokens of what leaves or of what comes, whichever are more."""
        return max(sum(each.num_tokens for each in way) for way in (self.sends, self.receives))

    def brings(self, owner: int, piece: int | None) -> bool:
        """Whether a piece of an owner's heads comes with it."""
        return any((message.owner, message.piece) == (owner, piece) for message in self.receives)

    def is_before(self, other: "Exchange", step: Step) -> bool:
        """Whether it is waited for before another one of K/V is posted at a step."""
        return self.axis is other.axis and self.piece in (None, other.piece) and self.number <= step.number


@dataclass(frozen=True)
class Program:
    """The steps of one rank.

    pieces: into how many the heads are cut where they are. kept: what a forward pass keeps of others' K/V, or a
    backward pass has of them, see Note [Kept K/V]. room: tokens of gradients that may be on their way, either way,
    before the first of them are waited for; the last ones posted always are.
    """

    rank: int
    steps: tuple[Step, ...]
    pieces: int = 1
    kept: KV = KV.NEITHER
    room: int = 0

    def sent(self) -> Counter[Axis]:
        """Tokens that leave this rank along each axis; a token of one piece of the heads counts 1 / pieces."""
        return self._sent(lambda message: 1)

    def sent_bytes(self, key_bytes: int, value_bytes: int) -> Counter[Axis]:
        """Bytes that leave this rank along each axis, where a token's keys and values in all heads have so many."""
        return self._sent(lambda message: _width(message.carries, key_bytes, value_bytes))

    def _sent(self, width: Callable[[Message], int]) -> Counter[Axis]:
        """Tokens that leave along each axis, each as often as its message is wide."""
        sent: Counter[Axis] = Counter()
        for step in self.steps:
            for message in (*step.sends, *some(step.gives)):
                tokens = message.num_tokens * (1 if message.piece is not None else self.pieces)
                sent[message.axis] += tokens * width(message)
        return Counter({axis: number // self.pieces for axis, number in sent.items()})

    @functools.cached_property
    def keeps(self) -> dict[BlockName, tuple[slice, ...]]:
        """The tokens of others that are kept, by owner and piece."""
        if not self.kept:
            return {}
        return {
            (step.owner, step.piece): union(tile.keys for tile in step.tiles)
            for step in self.steps
            if step.tiles and step.owner != self.rank
        }

    def kept_bytes(self, key_bytes: int, value_bytes: int) -> int:
        """Bytes that are kept, where a token's keys and values in all heads have so many."""
        tokens = sum(
            num_tokens(tokens) * (1 if piece is not None else self.pieces) for (_, piece), tokens in self.keeps.items()
        )
        return tokens // self.pieces * _width(self.kept, key_bytes, value_bytes)

    @functools.cached_property
    def exchanges(self) -> tuple[tuple[Exchange, ...], ...]:
        """Of each step, in the order in which they are posted: what has to go far first."""
        return tuple(tuple(_exchanges(step)) for step in self.steps)

    @functools.cached_property
    def added(self) -> tuple[tuple[int, ...], ...]:
        """Of each step, those before it whose gradients are waited for, and added, before its own leave.

        What is still on its way after them is at most `room`. Other pieces of the heads may stay on theirs.
        """
        under_way: dict[int, Exchange] = {}
        added: list[tuple[int, ...]] = []
        for number, step in enumerate(self.steps):
            own = step.gradients
            ways = {(Axis.HOME, None), (Axis.HOME, step.piece), *([(own.axis, own.piece)] if own else [])}
            room = max(0, self.room - own.widest) if own else self.room
            if not own and step.owner == self.rank:
                # All are added before the last part of the own block, whichever way and with what room they come.
                ways |= {(axis, piece) for axis, piece, *_ in under_way.values() if step.piece in (None, piece)}
                room = 0
            earlier = [place for place, each in under_way.items() if (each.axis, each.piece) in ways]
            left = sum(under_way[place].widest for place in earlier)
            now: list[int] = []
            for place in earlier:
                if left > room:
                    now.append(place)
                    left -= under_way.pop(place).widest
            added.append(tuple(now))
            if own:
                under_way[number] = own
        return tuple(added)

    @functools.cached_property
    def done_with(self) -> tuple[tuple[BlockName, ...], ...]:
        """Of each step, the blocks of others that no later one works on, or sends."""
        last_use = self._last_uses()
        foreign = [block for block in last_use if block[0] != self.rank]
        return tuple(
            tuple(block for block in foreign if last_use[block] == number) for number in range(len(self.steps))
        )

    @functools.cached_property
    def sums(self) -> dict[BlockName, tuple[slice, ...]]:
        """The tokens of the sums that leave for their owners, see Note [Program]."""
        return {
            (step.owner, step.piece): step.gives.tokens
            for step in self.steps
            if step.gives is not None and not step.tiles
        }

    def _last_uses(self) -> dict[BlockName, int]:
        """The number of the last step that works on a block, or sends it."""
        last_use: dict[BlockName, int] = {}
        for number, step in enumerate(self.steps):
            used = {(step.owner, step.piece)} | {(message.owner, message.piece) for message in step.sends}
            last_use.update(dict.fromkeys(used, number))
        return last_use

    def held_bytes(self, key_bytes: int, value_bytes: int) -> int:
        """The most bytes of others' K/V that steps have at hand or are receiving, from the posting on.

        A block that is only still being sent is not counted, nor what is kept for the backward pass.
        """
        last_use = self._last_uses()
        alive: dict[BlockName, int] = {}
        most = 0
        for number, step in enumerate(self.steps):
            for message in step.receives:
                share = self.pieces if message.piece is None else 1
                width = _width(message.carries, key_bytes, value_bytes)
                alive[message.owner, message.piece] = message.num_tokens * share * width
            most = max(most, sum(alive.values()))
            alive = {block: held for block, held in alive.items() if last_use[block] > number}
        return most // self.pieces


def _width(of: KV, key_bytes: int, value_bytes: int) -> int:
    return key_bytes * (KV.KEYS in of) + value_bytes * (KV.VALUES in of)


def _exchanges(step: Step) -> Iterator[Exchange]:
    for axis in (Axis.OUTER, Axis.INNER):
        sends = [message for message in step.sends if message.axis is axis]
        receives = [message for message in step.receives if message.axis is axis]
        for piece, number in dict.fromkeys(sorted(map(_name, (*sends, *receives)), key=lambda name: name[1])):
            coming = tuple(message for message in receives if _name(message) == (piece, number))
            leaving = tuple(message for message in sends if _name(message) == (piece, number))
            owner = coming[0].owner if len(coming) == 1 else step.owner
            yield Exchange(axis, piece, owner, leaving, coming, number)


def _name(message: Message) -> tuple[int | None, int]:
    """Of the exchange along its axis that it is part of."""
    return message.piece, message.number


def message(
    peer: int, owner: int, tokens: tuple[slice, ...], axis: Axis, piece: int | None = None, number: int = 0
) -> Message | None:
    """The message with these tokens; None where there are none to send."""
    return Message(peer, owner, tokens, axis, piece, number=number) if tokens else None


def some(message: Message | None) -> tuple[Message, ...]:
    """The message, unless it is none."""
    return () if message is None else (message,)


def num_tokens(tokens: Iterable[slice]) -> int:
    """How many they are."""
    return sum(each.stop - each.start for each in tokens)


def live(step: Step) -> tuple[Step, ...]:
    """The step, unless nothing happens at it."""
    return (step,) if any((step.tiles, step.receives, step.sends, step.gives, step.gets)) else ()
