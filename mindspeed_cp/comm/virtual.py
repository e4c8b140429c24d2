"""Virtual ranks: many ranks in one process, each a thread, for tests and for measurements on a single device."""

import functools
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from mindspeed_cp.comm.communicator import Addressed, Sizes, Transfer, one_each_way
from mindspeed_cp.comm.traffic import Traffic

Result = TypeVar("Result")

_LOOK_UP_S = 0.05
"""How often a rank that waits looks whether another one has raised."""


class VirtualWorld:
    """`size` virtual ranks. timeout_s: how long a rank waits for another before it gives up."""

    def __init__(self, size: int, timeout_s: float = 60.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._lock = Lock()
        self._gone = Event()
        self._mail: defaultdict[tuple[str, int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)

    def run(self, function: Callable[[int], Result]) -> list[Result]:
        """What `function(rank)` returns on each rank, all of them run at once. Raises what the first one raised."""
        raised: list[BaseException] = []

        def run_rank(rank: int) -> Result:
            try:
                return function(rank)
            except BaseException as error:
                raised.append(error)
                self._gone.set()
                raise

        self._gone.clear()
        with ThreadPoolExecutor(self.size) as threads:
            futures = [threads.submit(run_rank, rank) for rank in range(self.size)]
        if raised:
            raise raised[0]
        return [future.result() for future in futures]

    def send(self, channel: str, source: int, to: int, message: Tensor) -> None:
        """Deliver a copy of `message`."""
        self._box(channel, source, to).put(message.detach().clone())

    def receive(self, channel: str, source: int, to: int) -> Tensor:
        """The next message from `source` to `to`. Raises RuntimeError when none comes in time, or a rank has raised."""
        box, deadline = self._box(channel, source, to), time.monotonic() + self.timeout_s
        while True:
            try:
                return box.get(timeout=min(_LOOK_UP_S, self.timeout_s))
            except queue.Empty:
                if self._gone.is_set():
                    raise RuntimeError(f"virtual rank {to} waits for rank {source}, and a rank has raised") from None
                if time.monotonic() >= deadline:
                    message = f"virtual rank {to} waited {self.timeout_s} s for rank {source} in {channel}"
                    raise RuntimeError(message) from None

    def _box(self, channel: str, source: int, to: int) -> "queue.Queue[Tensor]":
        with self._lock:
            return self._mail[channel, source, to]


class VirtualCommunicator:
    """A Communicator among some ranks of a VirtualWorld, see there.

    ranks: the group, in its order. world_rank: this rank. channel: messages of one channel keep their order; those of
    different channels have nothing to do with each other.
    """

    def __init__(
        self,
        world: VirtualWorld,
        ranks: Sequence[int],
        world_rank: int,
        channel: str,
        traffic: Traffic | None = None,
    ) -> None:
        self.world = world
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(world_rank)
        self.size = len(self.ranks)
        self.channel = channel
        self.traffic = traffic if traffic is not None else Traffic()

    @functools.cached_property
    def apart(self) -> "VirtualCommunicator":
        """See AgreeingCommunicator.apart."""
        return VirtualCommunicator(self.world, self.ranks, self.ranks[self.rank], f"{self.channel}, apart")

    on_host: ClassVar[bool] = True

    def all_to_all(self, send: Tensor, sizes: Sizes | None = None) -> Tensor:
        """See Communicator.all_to_all."""
        sizes = sizes or Sizes([1] * self.size, [1] * self.size)
        leaving = send.split(list(sizes.sent))
        for rank in self._others():
            self._send(leaving[rank], rank)
        self.traffic.record("all_to_all", send.nbytes - leaving[self.rank].nbytes)
        return torch.cat(self._from_all(leaving[self.rank]))

    def all_to_all_of_parts(self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]) -> None:
        """See Communicator.all_to_all_of_parts."""
        for rank in self._others():
            for x in sends[rank]:
                self._send(x, rank)
        self.traffic.record("all_to_all", sum(x.nbytes for each in sends for x in each))
        for rank in self._others():
            for x in receives[rank]:
                x.copy_(self._receive(rank))

    def all_gather(self, send: Tensor) -> Tensor:
        """See Communicator.all_gather."""
        for rank in self._others():
            self._send(send, rank)
        self.traffic.record("all_gather", send.nbytes * (self.size - 1))
        return torch.stack(self._from_all(send))

    def exchange(self, send: Tensor | None, to: int, receive: Tensor | None, source: int) -> Transfer:
        """See Communicator.exchange."""
        return self.exchange_all(*one_each_way(send, to, receive, source))

    def exchange_all(self, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> Transfer:
        """See Communicator.exchange_all."""
        for each in sends:
            self._send(each.content, each.rank)
            self.traffic.record("exchange", each.content.nbytes)
        return _VirtualTransfer(self, receives)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _from_all(self, own: Tensor) -> list[Tensor]:
        """What has come from each rank, by rank; `own` from this one."""
        return [own if rank == self.rank else self._receive(rank) for rank in range(self.size)]

    def _send(self, message: Tensor, to: int) -> None:
        self.world.send(self.channel, self.ranks[self.rank], self.ranks[to], message)

    def _receive(self, source: int) -> Tensor:
        return self.world.receive(self.channel, self.ranks[source], self.ranks[self.rank])


class _VirtualTransfer:
    def __init__(self, communicator: VirtualCommunicator, receives: Sequence[Addressed]) -> None:
        self._communicator, self._receives = communicator, receives

    def wait(self) -> None:
        for each in self._receives:
            each.content.copy_(self._communicator._receive(each.rank))
