"""What ranks do, played against a clock: how long it takes, from link rates and the times of kernels.

Note [Prediction]
    Each rank is a sequence of events: compute for so long, start sending to one peer and receiving from another, wait
    for what was started. All ranks are played together: a message flows from when both of its ends have been posted, at
    the rate of its slowest link, and the messages on a link share it equally, but for those of one channel between two
    ranks, of which the first goes first. A step of a ring thus takes
    max(kernel, transfer) with overlap and their sum without, and a rank waits for a late one. Left out is whatever has
    no rate: packing, merging and adding, latencies, headers (under 1 %). So keys and values that are sent by themselves
    are one message here: they go one after the other, and take as long as both in one.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mindspeed_cp.planner.network import Network


class Compute(NamedTuple):
    """Do nothing else for so long."""

    seconds: float


class Post(NamedTuple):
    """Start messages: bytes by the rank they go to, and the ranks that one comes from. Named by `handle`.

    channel: messages of one channel between two ranks travel one after another; None is one of its own.
    """

    handle: object
    sends: dict[int, int]
    sources: tuple[int, ...]
    channel: object = None


class Wait(NamedTuple):
    """Go on when everything of `handle` has been sent and received."""

    handle: object


Event = Compute | Post | Wait


class Sent(NamedTuple):
    """Bytes that a rank sends to ranks of its own node, and to those of others."""

    inside: int
    between: int


def predicted_bytes(network: Network, events: Iterable[Event], rank: int) -> Sent:
    """What `rank` sends in the course of its events."""
    sent = [0, 0]
    for each in events:
        for to, num_bytes in each.sends.items() if isinstance(each, Post) else ():
            sent[network.node(to) != network.node(rank)] += num_bytes
    return Sent(*sent)


def busiest_link_seconds(network: Network, events_of: Callable[[int], Iterable[Event]]) -> float:
    """How long the busiest link takes for all that goes over it: no pass is sooner done, whatever hides what."""
    bytes_over: defaultdict[tuple[str, int], int] = defaultdict(int)
    for rank in range(network.num_ranks):
        for each in events_of(rank):
            for to, num_bytes in each.sends.items() if isinstance(each, Post) else ():
                for link in network.links(rank, to):
                    bytes_over[link] += num_bytes
    return max((num_bytes / network.rate(link) for link, num_bytes in bytes_over.items()), default=0.0)


def predicted_seconds(network: Network, events_of: Callable[[int], Iterable[Event]]) -> float:
    """When the last rank is done, see Note [Prediction].

    Raises ValueError where ranks wait for each other for ever.
    """
    return _Play(network, [iter(events_of(rank)) for rank in range(network.num_ranks)]).seconds()


@dataclass(eq=False)
class _Message:
    left: float
    channel: object
    links: tuple[tuple[str, int], ...]
    ends: tuple[tuple[int, object], tuple[int, object]]


@dataclass
class _Play:
    """The events of all ranks, played against a clock."""

    network: Network
    events: list[Iterator[Event]]
    now: float = 0.0
    busy_until: dict[int, float] = field(default_factory=dict)
    waits_for: dict[int, object] = field(default_factory=dict)
    unfinished: defaultdict[tuple[int, object], int] = field(default_factory=lambda: defaultdict(int))
    posted: defaultdict[tuple[object, ...], deque[int]] = field(default_factory=lambda: defaultdict(deque))
    flowing: list[_Message] = field(default_factory=list)

    def seconds(self) -> float:
        """How long it takes."""
        for rank in range(len(self.events)):
            self._advance(rank)
        while self.busy_until or self.flowing:
            rates = self._rates()
            flowing = zip(self.flowing, rates, strict=True)
            ends = [message.left / rate if rate else math.inf for message, rate in flowing]
            elapsed = min([*ends, *(moment - self.now for moment in self.busy_until.values())])
            self.now += elapsed
            for message, rate, end in zip(list(self.flowing), rates, ends, strict=True):
                message.left -= rate * elapsed
                if end <= elapsed:
                    self._finish(message)
            for rank in [rank for rank, moment in self.busy_until.items() if moment <= self.now]:
                del self.busy_until[rank]
                self._advance(rank)
        if self.waits_for:
            raise ValueError(f"ranks wait for each other for ever, each for: {self.waits_for}.")
        return self.now

    def _advance(self, rank: int) -> None:
        """Go through a rank's events until it computes or has to wait."""
        for each in self.events[rank]:
            if isinstance(each, Compute):
                self.busy_until[rank] = self.now + each.seconds
                return
            if isinstance(each, Wait):
                if self.unfinished[rank, each.handle]:
                    self.waits_for[rank] = each.handle
                    return
                continue
            for source in each.sources:
                self.unfinished[rank, each.handle] += 1
                self._match("receive", source, rank, each, 0)
            for to, num_bytes in each.sends.items():
                self.unfinished[rank, each.handle] += 1
                self._match("send", rank, to, each, num_bytes)

    def _match(self, end: str, source: int, to: int, post: Post, num_bytes: int) -> None:
        """Let a message flow if its other end has been posted."""
        other, handle = "send" if end == "receive" else "receive", post.handle
        channel = (source, to, handle if post.channel is None else post.channel)
        if not (waiting := self.posted[other, source, to, handle]):
            self.posted[end, source, to, handle].append(num_bytes)
            return
        ends = ((source, handle), (to, handle))
        self.flowing.append(_Message(max(num_bytes, waiting.popleft()), channel, self.network.links(source, to), ends))

    def _finish(self, message: _Message) -> None:
        self.flowing.remove(message)
        for rank, handle in message.ends:
            self.unfinished[rank, handle] -= 1
            if not self.unfinished[rank, handle] and self.waits_for.get(rank) == handle:
                del self.waits_for[rank]
                self._advance(rank)

    def _rates(self) -> list[float]:
        """Bytes a second of each message under way."""
        load: defaultdict[tuple[str, int], int] = defaultdict(int)
        first = {id(message) for message in {each.channel: each for each in reversed(self.flowing)}.values()}
        for message in self.flowing:
            for link in message.links if id(message) in first else ():
                load[link] += 1
        return [
            min(self.network.rate(link) / load[link] for link in message.links) if id(message) in first else 0.0
            for message in self.flowing
        ]
