"""What a program's messages carry: K/V on their way from rank to rank, and gradients on theirs to the owners.

Shapes: B batch, G key/value heads, S tokens of one rank, D key head size, V value head size. What travels when is data,
see program.py; here it is played: `KeyValues` has what is at hand, `Gradients` adds up what is found.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from mindspeed_cp.attention.sums import TokenSum
from mindspeed_cp.comm import Communicator, Transfer
from mindspeed_cp.kernels.calls import Place, in_all_samples, place_within
from mindspeed_cp.program import Axis, Message, Phase, Program, Step
from mindspeed_cp.schedule import RingSchedule


class RingCommunicators(NamedTuple):
    """The ring's ranks, in its order, once for each kind of message; with overlap they must be different groups.

    inner: K/V within an inner ring. outer: K/V between inner rings. gradients: dK/dV.
    """

    inner: Communicator
    outer: Communicator
    gradients: Communicator

    def along(self, axis: Axis) -> Communicator:
        """The one for messages of this axis."""
        return {Axis.INNER: self.inner, Axis.OUTER: self.outer}.get(axis, self.gradients)


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

    def post(
        self,
        kind: "_Kind",
        owner: int,
        send: Message | None,
        content: Tensor | None,
        receive: Message | None,
        whole: "BlockFormat",
    ) -> "_Posted":
        """Start a message that leaves and one that comes along the same axis, one of which there is.

        owner: of the step that they are told by. content: of the one that leaves. whole: how a message of all heads
        lies in memory.
        """
        assert self.communicators is not None, "a program of one rank has no messages"
        axis, like = next(message.axis for message in (send, receive) if message), whole.like
        received = None
        if receive is not None:
            received = like.new_empty(self.format(whole, receive.piece).numel(receive.num_tokens))
        name, alone = self.name(owner), self.program.rank
        peers = send.peer if send else alone, receive.peer if receive else alone
        try:
            with in_profiles(f"{name}: {kind.leaving}"):
                transfer = self.communicators.along(axis).exchange(content, peers[0], received, peers[1])
        except RuntimeError as error:
            raise RuntimeError(kind.lost(name, *peers, error)) from error
        return _Posted(transfer, content, receive, received, name, peers, kind)

    def heads(self, piece: int | None, num_heads: int) -> slice:
        """The heads of a piece; all of them for None."""
        if piece is None:
            return slice(None)
        share = num_heads // self.program.pieces
        return slice(piece * share, (piece + 1) * share)

    def format(self, whole: "BlockFormat", piece: int | None) -> "BlockFormat":
        """The format of a piece of the heads; the whole one for None."""
        return whole if piece is None else whole._replace(num_heads=whole.num_heads // self.program.pieces)


@functools.lru_cache(maxsize=4096)
def _name(schedule: RingSchedule, rank: int, phase: Phase, owner: int) -> str:
    kind = "ring" if schedule.outer == 1 else "double ring"
    number = schedule.number(rank, owner)
    return f"{kind} {phase.value} step {number} of {schedule.size}, block of ring rank {owner}"


def in_profiles(name: str) -> AbstractContextManager[object]:
    """Within it, what runs has this name in a profile. Without a profiler it costs one look."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


class BlockFormat(NamedTuple):
    """How keys and values, or their gradients, lie in one flat message: the keys [S, B, G, D], then the values.

    like: of the dtype and device of a message.
    """

    like: Tensor
    batch: int
    num_heads: int
    head_size: int
    value_head_size: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "BlockFormat":
        """The format of k [B, G, S, D] and v [B, G, S, V]."""
        return cls(k, k.size(0), k.size(1), k.size(3), v.size(3))

    def numel(self, num_tokens: int) -> int:
        """Numbers in a message of so many tokens."""
        return num_tokens * self.batch * self.num_heads * (self.head_size + self.value_head_size)

    def unpack(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a message as k [B, G, S, D] and v [B, G, S, V]."""
        num_tokens = message.numel() // self.numel(1)
        values_from = num_tokens * self.batch * self.num_heads * self.head_size
        k = message[:values_from].view(num_tokens, self.batch, self.num_heads, self.head_size)
        v = message[values_from:].view(num_tokens, self.batch, self.num_heads, self.value_head_size)
        return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

    def pack(self, k: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """A new message of tokens that lie in several tensors."""
        message = self.like.new_empty(self.numel(sum(x.size(2) for x in k)))
        for place, parts in zip(self.unpack(message), (k, v), strict=True):
            if len(parts) == 1:
                place.copy_(parts[0])
                continue
            for target, part in zip(place.split([x.size(2) for x in parts], dim=2), parts, strict=True):
                target.copy_(part)
        return message


class Block(NamedTuple):
    """Some tokens of an owner's K/V.

    tokens: which of the owner's. k, v: [B, G, S, D] and [B, G, S, V], those one after another. message: where they
    lie in one, as they have arrived.
    """

    tokens: tuple[slice, ...]
    k: Tensor
    v: Tensor
    message: Tensor | None = None

    def place(self, keys: slice) -> slice:
        """Where the owner's tokens `keys`, all of which are here, are in k and v."""
        return place_within(self.tokens, keys)


class _Kind(NamedTuple):
    """How messages of a kind are called while they leave and are waited for; what is said of the step that lost one."""

    leaving: str
    waiting: str
    lost: Callable[[str, int, int, RuntimeError], str]


def _kv_lost(step: str, to: int, source: int, error: RuntimeError) -> str:
    return f"{step}: the K/V block did not come from ring rank {source}, or not get to {to}: {error}"


def _gradients_lost(step: str, to: int, source: int, error: RuntimeError) -> str:
    way = f"{step}: send dK/dV home"
    return f"{way}: no gradients from ring rank {source}, or none got to {to}: {error}"


_KV = _Kind("send K/V on", "ring: wait for K/V", _kv_lost)
_GRADIENTS = _Kind("send dK/dV home", "ring: wait for dK/dV", _gradients_lost)


class _Posted(NamedTuple):
    """A message under way to this rank, and one from it. sent: kept alive until it has left."""

    transfer: Transfer
    sent: Tensor | None
    message: Message | None
    received: Tensor | None
    step: str
    peers: tuple[int, int]
    kind: "_Kind"

    def wait(self) -> None:
        """Return when it has arrived, and left. Raises RuntimeError that says which step and which peer it was."""
        try:
            with in_profiles(self.kind.waiting):
                self.transfer.wait()
        except RuntimeError as error:
            raise RuntimeError(self.kind.lost(self.step, *self.peers, error)) from error


class KeyValues:
    """The K/V that a rank has at hand in the course of a program: its own, and what has arrived and is still needed.

    k, v: its own.
    """

    def __init__(self, player: Player, k: Tensor, v: Tensor) -> None:
        self._player = player
        self._whole = BlockFormat.of(k, v)
        own = Block((slice(0, k.size(2)),), k, v)
        self._here: dict[tuple[int, int | None], Block] = {(player.program.rank, None): own}
        self._coming: dict[Axis, list[_Posted]] = {}
        self._last_use = player.program.last_uses()

    def steps(self) -> Iterator[Step]:
        """The program's steps; when one is given, what has to travel meanwhile is on its way."""
        own = self._player.program.rank, None
        for number, step in enumerate(self._player.program.steps):
            self._post(step)
            yield step
            for block in [block for block in self._here if self._last_use.get(block, number) <= number]:
                if block != own:
                    del self._here[block]
        for axis in list(self._coming):
            self._settle(axis)

    def block(self, step: Step) -> "Block":
        """K/V of the step's owner, waited for where they have not arrived; of its piece of the heads.

        Not to be kept: the block is gone after the step.
        """
        return self._block(step.owner, step.piece)

    def _post(self, step: Step) -> None:
        """Start what travels at a step; a message that comes and one that goes along an axis are one exchange."""
        packed: list[tuple[Message, Tensor]] = []  # What goes both ways is packed once.
        for axis in (Axis.OUTER, Axis.INNER):
            sends = [message for message in step.sends if message.axis is axis]
            receives = [message for message in step.receives if message.axis is axis]
            if not sends and not receives:
                continue
            for message in sends:
                if not any(_same_content(message, other) for other, _ in packed):
                    packed.append((message, self._message(message)))
            self._settle(axis)
            for send, receive in zip_longest(sends, receives):
                content = next((each for other, each in packed if send and _same_content(send, other)), None)
                told_by = receive.owner if receive else step.owner
                posted = self._player.post(_KV, told_by, send, content, receive, self._whole)
                self._coming.setdefault(axis, []).append(posted)
            if not self._player.overlap:
                self._settle(axis)

    def _settle(self, axis: Axis) -> None:
        """Wait for what is under way along an axis."""
        for posted in self._coming.pop(axis, []):
            posted.wait()
            if posted.message is not None and posted.received is not None:
                k, v = self._player.format(self._whole, posted.message.piece).unpack(posted.received)
                key = posted.message.owner, posted.message.piece
                self._here[key] = Block(posted.message.tokens, k, v, posted.received)

    def _block(self, owner: int, piece: int | None) -> Block:
        """A block that is at hand, or is waited for; the piece of a whole one where only that is here."""
        if (owner, piece) not in self._here and (owner, None) not in self._here:
            for axis, posted in list(self._coming.items()):
                if any(each.message and (each.message.owner, each.message.piece) == (owner, piece) for each in posted):
                    self._settle(axis)
        if (owner, piece) in self._here:
            return self._here[owner, piece]
        whole = self._here[owner, None]
        heads = self._player.heads(piece, whole.k.size(1))
        return Block(whole.tokens, whole.k[:, heads], whole.v[:, heads])

    def _message(self, message: Message) -> Tensor:
        """Its content: what has arrived as it is, where it goes on as a whole; else a copy."""
        block = self._block(message.owner, message.piece)
        if block.message is not None and block.tokens == message.tokens:
            return block.message
        places = [block.place(tokens) for tokens in message.tokens]
        return BlockFormat.of(block.k, block.v).pack(
            *([x[:, :, place] for place in places] for x in (block.k, block.v))
        )


def _same_content(message: Message, other: Message) -> bool:
    return (message.owner, message.tokens, message.piece) == (other.owner, other.tokens, other.piece)


class Partial(NamedTuple):
    """The gradients that a call has found for some of the owner's tokens: [b, h, s, D] and [b, h, s, V]."""

    keys: Place
    dk: Tensor
    dv: Tensor


def _are_of(partials: Sequence[Partial], tokens: Sequence[slice]) -> bool:
    """Whether they are the gradients of these tokens of all samples, one for each slice."""
    in_slices = all(isinstance(partial.keys.tokens, slice) for partial in partials)
    return in_slices and [partial.keys for partial in partials] == [in_all_samples(each) for each in tokens]


class Gradients:
    """Sums of the gradients of K/V: of this rank's own, and of others' until they leave; see Note [Program].

    Messages are in the dtype of K/V, sums in fp32. k, v: this rank's own.
    """

    def __init__(self, player: Player, k: Tensor, v: Tensor) -> None:
        self._player, self._k, self._v = player, k, v
        self._whole = BlockFormat.of(k, v)
        self._sums: dict[tuple[int, int | None], tuple[TokenSum, TokenSum]] = {}
        self._coming: dict[Axis, _Posted] = {}

    def take(self, step: Step, partials: Sequence[Partial]) -> None:
        """What a step has found: kept, or sent to where it is added up; and what the step gets is on its way."""
        self._settle(Axis.HOME)
        if step.gives is None and partials:
            self._add(step.owner, step.piece, partials)
        axis = next((message.axis for message in (step.gives, step.gets) if message), None)
        if axis is None:
            return
        self._settle(axis)
        content = None if step.gives is None else self._content(step, step.gives, partials)
        posted = self._player.post(_GRADIENTS, step.owner, step.gives, content, step.gets, self._whole)
        if not self._player.overlap:
            posted.wait()
        self._coming[axis] = posted

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's own keys and values, rounded once."""
        for axis in list(self._coming):
            self._settle(axis)
        dk, dv = self._sum(self._player.program.rank, None)
        return dk.result(), dv.result()

    def _settle(self, axis: Axis) -> None:
        """Wait for what is under way along an axis, and add it. Without overlap it has been waited for already."""
        posted = self._coming.pop(axis, None)
        if posted is None:
            return
        if self._player.overlap:
            posted.wait()
        if posted.message is not None and posted.received is not None:
            self._add_message(posted.message, posted.received)

    def _add_message(self, message: Message, received: Tensor) -> None:
        dk, dv = self._player.format(self._whole, message.piece).unpack(received)
        if len(message.tokens) == 1:
            self._add(message.owner, message.piece, [Partial(in_all_samples(message.tokens[0]), dk, dv)])
            return
        sizes = [each.stop - each.start for each in message.tokens]
        parts = zip(map(in_all_samples, message.tokens), dk.split(sizes, dim=2), dv.split(sizes, dim=2), strict=True)
        self._add(message.owner, message.piece, [Partial(*part) for part in parts])

    def _content(self, step: Step, gives: Message, partials: Sequence[Partial]) -> Tensor:
        """The message that leaves: what the step has found or, where it computes nothing, the sum for its owner."""
        if step.tiles and _are_of(partials, gives.tokens):
            found = [each.dk for each in partials], [each.dv for each in partials]
        else:
            if step.tiles:
                sums = self._new_sums(step.piece)
                self._add_to(sums, slice(None), partials)
            else:
                sums = self._sums.pop((step.owner, step.piece))
            found = tuple([each.at(tokens) for tokens in gives.tokens] for each in sums)  # type: ignore[assignment]
        return self._player.format(self._whole, gives.piece).pack(*found)

    def _add(self, owner: int, piece: int | None, partials: Sequence[Partial]) -> None:
        """Add to the sum for an owner, which is of all heads where there is one of that kind already."""
        if owner == self._player.program.rank:
            self._add_to(self._sum(owner, None), self._player.heads(piece, self._k.size(1)), partials)
        else:
            self._add_to(self._sum(owner, piece), slice(None), partials)

    def _add_to(self, sums: tuple[TokenSum, TokenSum], heads: slice, partials: Sequence[Partial]) -> None:
        for partial in partials:
            for total, part in zip(sums, (partial.dk, partial.dv), strict=True):
                total.add(part, partial.keys, heads)

    def _sum(self, owner: int, piece: int | None) -> tuple[TokenSum, TokenSum]:
        if (owner, piece) not in self._sums:
            self._sums[owner, piece] = self._new_sums(piece)
        return self._sums[owner, piece]

    def _new_sums(self, piece: int | None) -> tuple[TokenSum, TokenSum]:
        heads = self._player.heads(piece, self._k.size(1))
        return TokenSum(self._k[:, heads]), TokenSum(self._v[:, heads])
