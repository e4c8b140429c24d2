"""What travels around a ring: K/V blocks from rank to rank, and their gradients home to their owners.

Shapes: B batch, G key/value heads, S tokens of one rank, D key head size, V value head size. What travels when is data:
see Note [One schedule] in schedule.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from mindspeed_cp.attention.merge import accumulator_dtype
from mindspeed_cp.comm import Communicator, Transfer
from mindspeed_cp.kernels import add_
from mindspeed_cp.layout import BlockWork, SequenceLayout
from mindspeed_cp.schedule import Hop, RingSchedule, Step


class RingCommunicators(NamedTuple):
    """The ring's ranks, in its order, once for each kind of message; with overlap they must be different groups.

    inner: K/V within a window. outer: K/V between windows. gradients: dK/dV.
    """

    inner: Communicator
    outer: Communicator
    gradients: Communicator


@dataclass(frozen=True)
class Ring:
    """The ring that a rank is in.

    schedule: what is worked on at each step. layout: which tokens each of its ranks holds. causal: whether a query sees
    only itself and earlier keys; else it sees all of them, or what the mask says. overlap: whether messages travel
    while a block is computed, or one thing is done after the other; the results are the same to the bit.
    """

    schedule: RingSchedule
    layout: SequenceLayout
    communicators: RingCommunicators
    causal: bool
    overlap: bool = False

    @property
    def rank(self) -> int:
        """This rank's place in the ring."""
        return self.communicators.inner.rank

    def work(self, query_owner: int, key_owner: int, num_tokens: int) -> BlockWork | None:
        """The work between the tokens of two ranks of this ring."""
        return self.layout.work(query_owner, key_owner, causal=self.causal, num_tokens=num_tokens)

    def step_name(self, phase: str, step: Step) -> str:
        """How a step is called in profiles and errors."""
        kind = "ring" if self.schedule.outer == 1 else "double ring"
        number = step.window * self.schedule.inner + step.offset
        owner = self.schedule.owner(self.rank, step)
        return f"{kind} {phase} step {number} of {self.schedule.size}, block of ring rank {owner}"


class BlockFormat(NamedTuple):
    """How keys and values, or their gradients, lie in one flat message: the keys [S, B, G, D], then the values."""

    batch: int
    num_heads: int
    head_size: int
    value_head_size: int

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "BlockFormat":
        """The format of k [B, G, S, D] and v [B, G, S, V]."""
        return cls(k.size(0), k.size(1), k.size(3), v.size(3))

    def numel(self, num_tokens: int) -> int:
        """Numbers in a message of so many tokens."""
        return num_tokens * self.batch * self.num_heads * (self.head_size + self.value_head_size)

    def unpack(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a message as k [B, G, S, D] and v [B, G, S, V]."""
        per_token = self.numel(1)
        num_tokens = message.numel() // per_token
        values_from = num_tokens * self.batch * self.num_heads * self.head_size
        k = message[:values_from].view(num_tokens, self.batch, self.num_heads, self.head_size)
        v = message[values_from:].view(num_tokens, self.batch, self.num_heads, self.value_head_size)
        return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """A new message of k and v, in their dtype."""
        message = k.new_empty(self.numel(k.size(2)))
        for place, x in zip(self.unpack(message), (k, v), strict=True):
            place.copy_(x)
        return message


def travel(ring: Ring, k: Tensor, v: Tensor, phase: str) -> Iterator[tuple[Step, int, Tensor, Tensor]]:
    """Follow the ring's schedule: at each step give the owner of the block at hand, and its keys and values.

    With overlap, what has to travel is on its way when a step is given, and what is needed is waited for at its step.
    """
    block_format, schedule = BlockFormat.of(k, v), ring.schedule
    block = block_format.pack(k, v)
    buffers = BlockBuffers(block)
    arrivals: dict[Step, _Arrival] = {}
    for step in schedule.steps:
        if step in arrivals:
            block = arrivals.pop(step).wait()
        for needed_at, hop in schedule.departures(step).items():
            arrival = _Arrival(ring, phase, block, hop, needed_at, buffers)
            arrivals[needed_at] = arrival
            if not ring.overlap:
                arrival.wait()
        yield step, schedule.owner(ring.rank, step), *block_format.unpack(block)
        buffers.release(block)


class _Arrival:
    """A block on its way to this rank, and the present one on its way to the next."""

    def __init__(
        self, ring: Ring, phase: str, block: Tensor, hop: Hop, needed_at: Step, buffers: "BlockBuffers"
    ) -> None:
        communicator = ring.communicators.outer if hop.outer else ring.communicators.inner
        to = ring.schedule.peer(ring.rank, hop)
        source = ring.schedule.peer(ring.rank, Hop(-hop.outer, -hop.inner))
        name = ring.step_name(phase, needed_at)
        self._what = f"{name}: the K/V block did not come from ring rank {source}, or not get to {to}"
        self._sent, self._received, self._buffers = block, buffers.take(), buffers
        buffers.hold(block)
        self._transfer: Transfer | None
        with _explained(self._what), record_function(f"{name}: send K/V on"):
            self._transfer = communicator.exchange(block, to, self._received, source)

    def wait(self) -> Tensor:
        """The block that has arrived."""
        if self._transfer is not None:
            with _explained(self._what), record_function("ring: wait for K/V"):
                self._transfer.wait()
            self._transfer = None
            self._buffers.release(self._sent)
        return self._received


class BlockBuffers:
    """Buffers for blocks that arrive, used again as soon as they are read: their number does not grow with the ring.

    In use at once are the block worked on and the one that arrives; in a double ring also the next window's first
    block, and the present window's while it still travels on.
    """

    def __init__(self, own: Tensor) -> None:
        self._own = own
        self._free: list[Tensor] = []
        self._uses: dict[int, int] = {id(own): 1}
        self.made = 0

    def take(self) -> Tensor:
        """A buffer in which a block can arrive, in use once."""
        if self._free:
            buffer = self._free.pop()
        else:
            buffer = torch.empty_like(self._own)
            self.made += 1
        self._uses[id(buffer)] = 1
        return buffer

    def hold(self, buffer: Tensor) -> None:
        """One more use of a buffer."""
        self._uses[id(buffer)] += 1

    def release(self, buffer: Tensor) -> None:
        """One use less; without any it is free."""
        self._uses[id(buffer)] -= 1
        if self._uses[id(buffer)] == 0:
            self._free.append(buffer)


class GradientsHome:
    """Partial gradients of K/V on their way to the owners, who add them up; see Note [One schedule].

    Each message is in the input type and holds the tokens that the work touched, so that under a causal mask on a
    zigzag layout an earlier rank's block sends half of itself. Sums are kept in fp32.
    """

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self._ring, self._schedule, self._rank = ring, ring.schedule, ring.rank
        self._format = BlockFormat.of(k, v)
        self._k, self._num_tokens = k, k.size(2)
        self._home = self._new_sum()
        self._window = self._home
        self._within: _PendingSum | None = None
        self._across: _PendingSum | None = None

    def bring(self, step: Step, dk: Tensor | None, dv: Tensor | None) -> None:
        """Take the partial gradients of the block worked on at `step`; None where there was nothing to do."""
        schedule, rank = self._schedule, self._rank
        _settle(self._within)
        gathered_for = schedule.peer(rank, Hop(-step.window, 0))
        if step.offset == 0:
            self._window = self._home if step.window == 0 else self._new_sum()
            if dk is not None and dv is not None:
                work = self._ring.work(rank, gathered_for, self._num_tokens)
                assert work is not None, f"gradients at {step} without work"
                self._add(self._window, work.keys, dk, dv)
        else:
            to, source = schedule.peer(rank, Hop(0, -step.offset)), schedule.peer(rank, Hop(0, step.offset))
            work = self._ring.work(source, gathered_for, self._num_tokens)
            message = None if dk is None or dv is None else self._format.pack(dk, dv)
            self._within = self._post(step, message, to, source, work.keys if work else None, self._window)
        if schedule.ends_window(step):
            _settle(self._within)
            if step.window > 0:
                self._cross(step, gathered_for)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's own keys and values, in their dtype, rounded once."""
        _settle(self._across)
        dk, dv = self._format.unpack(self._home)
        return dk.to(self._k.dtype), dv.to(self._k.dtype)

    def _cross(self, step: Step, owner: int) -> None:
        """Send the window's sum to its owner, and get the sum that another window has of this rank's block."""
        _settle(self._across)
        source = self._schedule.peer(self._rank, Hop(step.window, 0))
        message = None
        if (touched := self._touched(self._rank, owner)) is not None:
            dk, dv = (x[:, :, touched].to(self._k.dtype) for x in self._format.unpack(self._window))
            message = self._format.pack(dk, dv)
        self._across = self._post(step, message, owner, source, self._touched(source, self._rank), self._home)

    def _touched(self, window_member: int, owner: int) -> slice | None:
        """Keys of `owner` that the ranks of `window_member`'s window see, as one slice; None where they see none."""
        members = [self._schedule.peer(window_member, Hop(0, offset)) for offset in range(self._schedule.inner)]
        works = [work for member in members if (work := self._ring.work(member, owner, self._num_tokens))]
        if not works:
            return None
        return slice(min(work.keys.start for work in works), max(work.keys.stop for work in works))

    def _post(
        self, step: Step, message: Tensor | None, to: int, source: int, keys: slice | None, total: Tensor
    ) -> "_PendingSum":
        name = f"{self._ring.step_name('backward', step)}: send dK/dV home"
        what = f"{name}: no gradients from ring rank {source}, or none got to {to}"
        received = None if keys is None else self._k.new_empty(self._format.numel(keys.stop - keys.start))
        with _explained(what), record_function(name):
            transfer = self._ring.communicators.gradients.exchange(message, to, received, source)
        pending = _PendingSum(self, transfer, message, received, keys, total, what)
        if not self._ring.overlap:
            pending.settle()
        return pending

    def _new_sum(self) -> Tensor:
        return torch.zeros(
            self._format.numel(self._num_tokens), dtype=accumulator_dtype(self._k.dtype), device=self._k.device
        )

    def _add(self, total: Tensor, keys: slice, dk: Tensor, dv: Tensor) -> None:
        for summed, partial in zip(self._format.unpack(total), (dk, dv), strict=True):
            add_(summed[:, :, keys], partial)

    def add_message(self, total: Tensor, keys: slice, message: Tensor) -> None:
        """Add to the sum `total` what has arrived for its `keys`."""
        self._add(total, keys, *self._format.unpack(message))


@dataclass
class _PendingSum:
    """Gradients under way, and the sum that they will be added to. `sent` is kept alive until it has left."""

    home: GradientsHome
    transfer: Transfer | None
    sent: Tensor | None
    received: Tensor | None
    keys: slice | None
    total: Tensor
    what: str

    def settle(self) -> None:
        """Wait for them and add them."""
        if self.transfer is None:
            return
        with _explained(self.what), record_function("ring: wait for dK/dV"):
            self.transfer.wait()
        self.transfer = None
        if self.received is not None and self.keys is not None:
            self.home.add_message(self.total, self.keys, self.received)


def _settle(pending: _PendingSum | None) -> None:
    if pending is not None:
        pending.settle()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say which step and which peer it was when communication fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from error
