"""What a program's messages carry: K/V on their way from rank to rank, and gradients on theirs to the owners.

Shapes: B batch, G key/value heads, S tokens of one rank, D key head size, V value head size. What travels when is data,
see program/; here it is played: `KeyValues` has what is at hand, `Gradients` adds up what is found.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mindspeed_cp.attention.blocks import Block, BlockFormat, Content, in_one
from mindspeed_cp.attention.profiles import in_profiles
from mindspeed_cp.attention.sums import TokenSum
from mindspeed_cp.comm import Addressed, LostRank, RingCommunicators, Transfer
from mindspeed_cp.kernels.places import ALL, Place, in_all_samples, part, place_within
from mindspeed_cp.program import KV, BlockName, Exchange, Message, Phase, Program, Step, num_tokens
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True)
class Player:
    """How a rank plays a program.

    program: its steps. schedule: the grid that it is on. communicators: None for a ring of one rank, which sends
    nothing. overlap: whether messages travel while a step is computed, or one thing is done after the other; the
    results are the same to the bit.
    """

    program: Program
    phase: Phase
    schedule: RingSchedule
    communicators: RingCommunicators | None
    overlap: bool

    def name(self, owner: int) -> str:
        """How the step on the block of `owner` is called in profiles and errors."""
        return _name(self.schedule, self.program.rank, self.phase, owner)

    def step(self, owner: int) -> AbstractContextManager[object]:
        """Within it, what runs has the name of the step in a profile."""
        return in_profiles(lambda: self.name(owner))

    def post(
        self,
        kind: "Kind",
        exchange: Exchange,
        sent: Sequence[Content],
        whole: BlockFormat,
    ) -> "_Posted":
        """Start an exchange. sent: the content of what leaves. whole: how a message of all heads lies in memory."""
        assert self.communicators is not None, "a program of one rank has no messages"
        numel = self.format(whole, (exchange.receives or exchange.sends)[0]).numel
        received = [whole.like.new_empty(numel(message.num_tokens)) for message in exchange.receives]
        arriving = [self.format(whole, of).split(x) for of, x in zip(exchange.receives, received, strict=True)]
        leave = [Addressed(to.peer, x) for to, content in zip(exchange.sends, sent, strict=True) for x in content]
        come = [Addressed(of.peer, x) for of, content in zip(exchange.receives, arriving, strict=True) for x in content]
        communicator = self.communicators.along(exchange.axis)
        try:
            with in_profiles(lambda: f"{self.name(exchange.owner)}: {kind.leaving}"):
                transfer = communicator.exchange_all(leave, come)
        except RuntimeError as error:
            raise self.lost(kind, exchange, error) from error
        return _Posted(transfer, exchange, sent, received)

    def wait(self, kind: "Kind", posted: "_Posted") -> None:
        """Return when all has arrived, and left. Raises RuntimeError that says which step and which peers it was."""
        try:
            with in_profiles(kind.waiting):
                posted.transfer.wait()
        except RuntimeError as error:
            raise self.lost(kind, posted.exchange, error) from error

    def lost(self, kind: "Kind", exchange: Exchange, error: RuntimeError) -> RuntimeError:
        """What is raised where an exchange fails."""
        to, source = self._peers(exchange.sends), self._peers(exchange.receives)
        named = LostRank if isinstance(error, LostRank) else RuntimeError
        return named(f"{self.name(exchange.owner)}: {kind.exchange} failed (from ring rank {source}, to {to}): {error}")

    def _peers(self, messages: Iterable[Message]) -> str:
        """The ranks of some messages, in words; this one where there are none."""
        return ", ".join(str(message.peer) for message in messages) or str(self.program.rank)

    def heads(self, piece: int | None, num_heads: int) -> slice:
        """The heads of a piece; all of them for None."""
        if piece is None:
            return ALL
        share = num_heads // self.program.pieces
        return slice(piece * share, (piece + 1) * share)

    def format(self, whole: BlockFormat, message: Message) -> BlockFormat:
        """How a message lies in memory. whole: how one with the keys and values of all heads does."""
        return self._format(whole, message.piece, message.carries)

    def format_kept(self, whole: BlockFormat, piece: int | None) -> BlockFormat:
        """How what is kept of a block lies in memory."""
        return self._format(whole, piece, self.program.kept)

    def _format(self, whole: BlockFormat, piece: int | None, carries: KV) -> BlockFormat:
        if piece is not None:
            whole = whole._replace(num_heads=whole.num_heads // self.program.pieces)
        return whole if carries is KV.BOTH else whole.only(carries)


@functools.lru_cache(maxsize=4096)
def _name(schedule: RingSchedule, rank: int, phase: Phase, owner: int) -> str:
    kind = "ring" if schedule.outer == 1 else "double ring"
    number = schedule.number(rank, owner)
    return f"{kind} {phase.value} step {number} of {schedule.size}, block of ring rank {owner}"


class Kind(NamedTuple):
    """How messages of a kind are called: while they leave, while they are waited for, and where they are lost."""

    leaving: str
    waiting: str
    exchange: str


_KV = Kind("send K/V on", "ring: wait for K/V", "K/V exchange")
_GRADIENTS = Kind("send dK/dV home", "ring: wait for dK/dV", "dK/dV exchange")
QUERIES = Kind("send queries on", "ring: wait for queries", "query exchange")


class _Posted(NamedTuple):
    """An exchange under way, with the content of its messages: what is sent is kept alive until it has left."""

    transfer: Transfer
    exchange: Exchange
    sent: Sequence[Content]
    received: Sequence[Tensor]

    def arrived(self) -> Iterator[tuple[Message, Tensor]]:
        """What has come, once it has been waited for."""
        return zip(self.exchange.receives, self.received, strict=True)


class KeyValues:
    """The K/V that a rank has at hand in the course of a program: its own, and what has arrived and is still needed.

    k, v: its own. kept: in a backward pass what the forward pass has kept; in that it is filled. kind: how its
    messages are called, where what travels as keys do are queries.
    """

    def __init__(
        self,
        player: Player,
        k: Tensor,
        v: Tensor,
        kept: Mapping[BlockName, Tensor] | None = None,
        kind: Kind = _KV,
    ) -> None:
        self._player, self._kind = player, kind
        self.kept: dict[BlockName, Tensor] = dict(kept or {})
        self._whole = BlockFormat.of(k, v)
        own = Block((slice(0, k.size(2)),), k, v)
        self._here: dict[BlockName, Block] = {(player.program.rank, None): own}
        self._coming: list[_Posted] = []

    def steps(self) -> Iterator[Step]:
        """The program's steps; with overlap, when one is given, what has to travel meanwhile is on its way."""
        program, overlap = self._player.program, self._player.overlap
        for step, exchanges, done_with in zip(program.steps, program.exchanges, program.done_with, strict=True):
            if overlap:
                self._post(step, exchanges)
            yield step
            if not overlap:
                # Last of all: ranks that skip steps of each other's meet in one order, see Note [Order of messages].
                self._post(step, exchanges)
            self._keep(step)
            for block in done_with:
                self._here.pop(block, None)
        self._settle(list(self._coming))

    def block(self, step: Step) -> Block:
        """K/V of the step's owner, waited for where they have not arrived; of its piece of the heads.

        Not to be held: the block is gone after the step.
        """
        name = step.owner, step.piece
        return self._with_kept(name) if self._is_backward and name in self.kept else self._block(*name)

    @property
    def _is_backward(self) -> bool:
        return self._player.phase is Phase.BACKWARD

    def _keep(self, step: Step) -> None:
        """Keep of the block of a step what the program says: what has come as it is, or a copy of less."""
        name = step.owner, step.piece
        tokens = self._player.program.keeps.get(name)
        if tokens is None or self._is_backward:
            return
        block = self._block(*name)
        if block.message is not None and block.tokens == tokens and self._player.program.kept is KV.BOTH:
            self.kept[name] = block.message
            return
        only = block.only(self._player.program.kept)
        self.kept[name] = BlockFormat.of(only.k, only.v).pack(*only.parts(tokens))

    def _with_kept(self, name: BlockName) -> Block:
        """The block of a step, as much of it as is seen: from what was kept, and what has come for the rest."""
        tokens, (_, piece) = self._player.program.keeps[name], name
        k, v = self._player.format_kept(self._whole, piece).unpack(self.kept[name])
        kept = self._player.program.kept
        if kept is not KV.BOTH:
            of_k, of_v = self._block(*name).parts(tokens)
            k, v = (k, in_one(of_v)) if kept is KV.KEYS else (in_one(of_k), v)
        return Block(tokens, k, v)

    def _post(self, step: Step, exchanges: Iterable[Exchange]) -> None:
        """Start what travels at a step.

        Pieces travel one after another, and each is waited for by itself: the first is worked on while the next comes.
        """
        packed: list[tuple[Message, Content]] = []  # What goes several ways is packed once.
        for exchange in exchanges:
            leaving = [self._packed(message, packed) for message in exchange.sends]
            self._settle([each for each in self._coming if each.exchange.is_before(exchange, step)])
            self._coming.append(self._player.post(self._kind, exchange, leaving, self._whole))
            if not self._player.overlap:
                self._settle(self._coming[-1:])

    def _packed(self, message: Message, packed: list[tuple[Message, Content]]) -> Content:
        """The content of a message, which is that of one already packed where it is the same."""
        content = next((each for other, each in packed if _same_content(message, other)), None)
        content = self._message(message) if content is None else content
        packed.append((message, content))
        return content

    def _settle(self, some: Sequence[_Posted]) -> None:
        """Wait for some of what is under way."""
        for posted in some:
            self._coming = [each for each in self._coming if each is not posted]
            self._player.wait(self._kind, posted)
            for message, received in posted.arrived():
                k, v = self._player.format(self._whole, message).unpack(received)
                self._here[message.owner, message.piece] = Block(message.tokens, k, v, received)

    def _block(self, owner: int, piece: int | None) -> Block:
        """A block that is at hand, or is waited for; the piece of a whole one where only that is here."""
        if (owner, piece) in self._here:
            return self._here[owner, piece]
        whole = self._here.get((owner, None))
        if whole is None:
            self._settle([each for each in self._coming if each.exchange.brings(owner, piece)])
            return self._here[owner, piece]
        heads = self._player.heads(piece, whole.k.size(1))
        return Block(whole.tokens, part(whole.k, 1, heads), part(whole.v, 1, heads))

    def _message(self, message: Message) -> Content:
        """Its content: what has arrived as it is, where it goes on as a whole; else what is to be had of the block."""
        block = self._block(message.owner, message.piece)
        if block.message is not None and block.tokens == message.tokens:
            return self._player.format(self._whole, message).split(block.message)
        if message.carries is not KV.BOTH:
            block = block.only(message.carries)
        return BlockFormat.of(block.k, block.v).content(*block.parts(message.tokens))


def _same_content(message: Message, other: Message) -> bool:
    return (message.owner, message.tokens, message.piece) == (other.owner, other.tokens, other.piece)


class Partial(NamedTuple):
    """The gradients that were found for some of the owner's tokens: [b, h, s, D] and [b, h, s, V].

    tokens: which, where it is one slice of all samples; else None. place: where they are among tokens that hold them.
    """

    tokens: slice | None
    place: Callable[[Sequence[slice]], Place]
    dk: Tensor
    dv: Tensor

    @classmethod
    def of_slice(cls, tokens: slice, dk: Tensor, dv: Tensor) -> "Partial":
        """Those of one slice of all samples."""
        return cls(tokens, lambda held: in_all_samples(place_within(held, tokens)), dk, dv)


class _OwnerSum:
    """The sum of gradients of some of an owner's K/V, in fp32.

    tokens: which of the owner's. k, v: of the owner's heads and sizes, of any number of tokens.
    """

    def __init__(self, tokens: tuple[slice, ...], k: Tensor, v: Tensor) -> None:
        self._tokens = tokens
        count = num_tokens(tokens)
        self._sums = [TokenSum(x.new_empty(()).expand(*x.shape[:2], count, x.size(3))) for x in (k, v)]

    def add(self, partials: Iterable[Partial], heads: slice = slice(None)) -> None:
        """Add gradients of some samples, heads and tokens."""
        for partial in partials:
            here = partial.place(self._tokens)
            for total, more in zip(self._sums, (partial.dk, partial.dv), strict=True):
                total.add(more, here, heads)

    def result(self) -> tuple[Tensor, Tensor]:
        """The sums, rounded to the dtype of K/V."""
        dk, dv = (total.result() for total in self._sums)
        return dk, dv

    def unrounded(self) -> tuple[Tensor, Tensor]:
        """The sums as they are kept."""
        dk, dv = (total.at(slice(None)) for total in self._sums)
        return dk, dv


class Gradients:
    """Sums of the gradients of K/V: of this rank's own, and of others' until they leave; see Note [Program].

    Messages are in the dtype of K/V, sums in fp32. k, v: this rank's own.
    """

    def __init__(self, player: Player, k: Tensor, v: Tensor) -> None:
        self._player, self._k, self._v = player, k, v
        self._whole = BlockFormat.of(k, v)
        self._own = _OwnerSum((slice(0, k.size(2)),), k, v)
        self._others: dict[BlockName, _OwnerSum] = {}
        self._coming: dict[int, _Posted] = {}  # By the number of the step that it was posted at.

    def take(self, number: int, partials: Sequence[Partial]) -> None:
        """What a step has found: kept, or sent to where it is added up; and what the step gets is on its way."""
        step = self._player.program.steps[number]
        for earlier in self._player.program.added[number]:
            self._settle(earlier)
        if step.gives is None and partials:
            self._add(step.owner, step.piece, partials)
        exchange = step.gradients
        if exchange is None:
            return
        sent = [] if step.gives is None else [self._content(step, step.gives, partials)]
        posted = self._player.post(_GRADIENTS, exchange, sent, self._whole)
        if not self._player.overlap:
            self._player.wait(_GRADIENTS, posted)
        self._coming[number] = posted

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's own keys and values, rounded once."""
        for number in list(self._coming):
            self._settle(number)
        return self._own.result()

    def _settle(self, number: int) -> None:
        """Wait for what was posted at a step, and add it. Without overlap that has been waited for."""
        posted = self._coming.pop(number)
        if self._player.overlap:
            self._player.wait(_GRADIENTS, posted)
        for message, received in posted.arrived():
            self._add_message(message, received)

    def _add_message(self, message: Message, received: Tensor) -> None:
        dk, dv = self._player.format(self._whole, message).unpack(received)
        if len(message.tokens) == 1:
            self._add(message.owner, message.piece, [Partial.of_slice(message.tokens[0], dk, dv)])
            return
        sizes = [each.stop - each.start for each in message.tokens]
        parts = zip(message.tokens, dk.split(sizes, dim=2), dv.split(sizes, dim=2), strict=True)
        self._add(message.owner, message.piece, [Partial.of_slice(*part) for part in parts])

    def _content(self, step: Step, gives: Message, partials: Sequence[Partial]) -> Content:
        """The message that leaves: what the step has found or, where it computes nothing, the sum for its owner."""
        if step.tiles and [each.tokens for each in partials] == list(gives.tokens):
            found = [each.dk for each in partials], [each.dv for each in partials]
        else:
            if step.tiles:
                total = self._sum_of(gives.tokens, step.piece)
                total.add(partials)
            else:
                total = self._others.pop((step.owner, step.piece))
            dk, dv = total.unrounded()
            found = [dk], [dv]
        return self._player.format(self._whole, gives).content(*found)

    def _add(self, owner: int, piece: int | None, partials: Sequence[Partial]) -> None:
        """Add to the sum for an owner, which is of all heads where it is this rank's own."""
        if owner == self._player.program.rank:
            self._own.add(partials, self._player.heads(piece, self._k.size(1)))
            return
        if (owner, piece) not in self._others:
            self._others[owner, piece] = self._sum_of(self._player.program.sums[owner, piece], piece)
        self._others[owner, piece].add(partials)

    def _sum_of(self, tokens: tuple[slice, ...], piece: int | None) -> _OwnerSum:
        heads = self._player.heads(piece, self._k.size(1))
        return _OwnerSum(tokens, part(self._k, 1, heads), part(self._v, 1, heads))
