"""What each algorithm should send, by formula, and how long it should take, from bytes, link rates and the kernel.

Note [Prediction]
    Each rank is a program: compute for so long, start sending to one peer and receiving from another, wait for what was
    started. The programs follow the library's own schedule. All ranks are played together: a message flows from when
    both of its ends have been posted, at the rate of its slowest link, and the messages on a link share it equally.
    A step of a ring thus takes max(kernel, transfer) with overlap and their sum without, and a rank waits for a late
    one. Left out is whatever has no rate: packing, merging and adding, latencies, headers (under 1 %).
"""

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from benchmark.cases import Algorithm, Case
from emulated_cluster import Network
from mindspeed_cp.comm.communicator import ROUNDS_UNDER_WAY, rounds
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import Axis, Message, Phase, program
from mindspeed_cp.program import Program as RingProgram
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology

Pass = Literal["forward", "backward"]


def formula_bytes(algorithm: Algorithm, case: Case, pass_: Pass) -> int:
    """What all ranks together send to each other, causal masks and zigzag given.

    With P ranks, K the bytes of one rank's keys and values, Q those of its queries, u the Ulysses degree, r = P / u:
    all-gather K/V P(P-1)K, either pass; Ulysses P(u-1)/u (2Q + 2K), either pass (keys and values there, their gradients
    back; queries and outputs likewise); a ring what its program says: of r ranks P(r-1)K forward, but that rank 0 of
    a causal zigzag is only needed in half, and backward as much again for the gradients, less a quarter, since half of
    them are of blocks of which the mask leaves half.
    """
    size, ulysses, ring = algorithm.topology.size, algorithm.topology.ulysses, algorithm.topology.ring_size
    tokens = case.num_tokens // size
    if algorithm.kind == "single device":
        return 0
    if algorithm.kind == "all-gather":
        return size * (size - 1) * case.kv_bytes(tokens)
    exchanged = (2 * case.q_bytes(tokens) + case.kv_bytes(tokens)) * (ulysses - 1) * size // ulysses
    programs = (ring_program(algorithm.topology, case.num_tokens, rank, _PHASES[pass_]) for rank in range(ring))
    # Each of the Ulysses ranks has such a ring, of its part of the heads.
    return exchanged + sum(each.sent().total() for each in programs) * case.kv_bytes(1)


class Compute(NamedTuple):
    """Do nothing else for so long."""

    seconds: float


class Post(NamedTuple):
    """Start messages: bytes by the rank they go to, and the ranks that one comes from. Named by `handle`."""

    handle: object
    sends: dict[int, int]
    sources: tuple[int, ...]


class Wait(NamedTuple):
    """Go on when everything of `handle` has been sent and received."""

    handle: object


Program = Iterator[Compute | Post | Wait]


@dataclass(frozen=True)
class Plan:
    """One pass of an algorithm, with a kernel of so many floating-point operations a second."""

    algorithm: Algorithm
    case: Case
    pass_: Pass
    flops_per_s: float

    def program(self, rank: int) -> Program:
        """What `rank` does."""
        topology, kind = self.algorithm.topology, self.algorithm.kind
        if kind == "single device":
            if rank == 0:
                yield Compute(self._seconds(self.case.num_tokens**2 / 2))
            return
        if kind == "all-gather":
            yield from self._all_gather(rank)
            return
        peers = topology.ulysses_ranks(rank)
        tokens = self.case.num_tokens // topology.size
        qkv = self.case.q_bytes(tokens) + self.case.kv_bytes(tokens)
        first, last = (qkv, self.case.q_bytes(tokens)) if self.pass_ == "forward" else (self.case.q_bytes(tokens), qkv)
        yield from all_to_all("scatter", rank, peers, first // topology.ulysses)
        if topology.ring_size == 1:
            yield Compute(self._seconds(self.case.num_tokens**2 / 2) / topology.size)
        else:
            yield from self._ring(rank)
        yield from all_to_all("gather", rank, peers, last // topology.ulysses)

    def _seconds(self, scores: float) -> float:
        """Time for so many scores of all heads: two matrix products, five in the backward pass."""
        products = 2 if self.pass_ == "forward" else 5
        return products * 2 * scores * self.case.num_heads * self.case.head_size / self.flops_per_s

    def _all_gather(self, rank: int) -> Program:
        size = self.algorithm.topology.size
        block, compute = self.case.kv_bytes(self.case.num_tokens // size), self._seconds(self.case.num_tokens**2 / 2)
        if self.pass_ == "forward":
            # gloo's is a ring.
            for step in range(size - 1):
                yield Post(step, {(rank + 1) % size: block}, ((rank - 1) % size,))
                yield Wait(step)
            yield Compute(compute / size)
        else:
            yield Compute(compute / size)
            yield from all_to_all("gradients", rank, tuple(range(size)), block)

    def _ring(self, rank: int) -> Program:
        """The rank's program in the library, played as attention plays it."""
        topology, overlap = self.algorithm.topology, self.algorithm.overlap
        ranks = topology.ring_ranks(rank)
        steps = ring_program(topology, self.case.num_tokens, ranks.index(rank), _PHASES[self.pass_]).steps
        token_bytes = self.case.kv_bytes(1) / topology.ulysses

        def post(sends: list[Message], receives: list[Message], axis: Axis) -> Program:
            to = {ranks[message.peer]: round(message.num_tokens * token_bytes) for message in sends}
            yield from _post(axis, to, tuple(ranks[message.peer] for message in receives), overlap)

        coming: dict[Axis, list[int]] = {}

        def arrived(owner: int) -> Program:
            for axis in [axis for axis, owners in coming.items() if owner in owners]:
                yield Wait(axis)
                del coming[axis]

        for step in steps:
            for axis in (Axis.OUTER, Axis.INNER):
                sends = [message for message in step.sends if message.axis is axis]
                receives = [message for message in step.receives if message.axis is axis]
                for message in sends:
                    yield from arrived(message.owner)
                if sends or receives:
                    yield Wait(axis)
                    yield from post(sends, receives, axis)
                    coming[axis] = [message.owner for message in receives]
            if step.tiles:
                yield from arrived(step.owner)
                yield Compute(self._seconds(sum(tile.area for tile in step.tiles)) / topology.ulysses)
            if self.pass_ == "backward":
                yield Wait(Axis.HOME)
                if step.gives or step.gets:
                    gives, gets = ([each] if each else [] for each in (step.gives, step.gets))
                    axis = (gives + gets)[0].axis
                    yield Wait(axis)
                    yield from post(gives, gets, axis)
        yield Wait(Axis.ACROSS)


_PHASES = {"forward": Phase.FORWARD, "backward": Phase.BACKWARD}


@functools.lru_cache(maxsize=1024)
def ring_program(topology: CPTopology, num_tokens: int, ring_rank: int, phase: Phase) -> RingProgram:
    """What a rank of the ring does, under a causal mask on zigzag shards of a sequence of so many tokens."""
    shards = EqualChunks(topology.ring_size, num_tokens // topology.ring_size)
    schedule = RingSchedule(outer=topology.outer, inner=topology.inner)
    return program(AttentionPlan(shards, shards), schedule, ring_rank, phase)


def _post(handle: object, sends: dict[int, int], sources: tuple[int, ...], overlap: bool) -> Program:
    yield Post(handle, sends, sources)
    if not overlap:
        yield Wait(handle)


def all_to_all(handle: str, rank: int, peers: Sequence[int], num_bytes: int) -> Program:
    """The rounds of an all-to-all among `peers`, one of which is `rank`, of messages of so many bytes."""
    under_way: deque[object] = deque()
    for number, (to, source) in enumerate(rounds(peers.index(rank), len(peers))):
        if len(under_way) == ROUNDS_UNDER_WAY:
            yield Wait(under_way.popleft())
        under_way.append((handle, number))
        yield Post(under_way[-1], {peers[to]: num_bytes}, (peers[source],))
    for each in under_way:
        yield Wait(each)


class Sent(NamedTuple):
    """Bytes that a rank sends to ranks of its own node, and to those of others."""

    inside: int
    between: int


def predicted_bytes(network: Network, program: Program, rank: int) -> Sent:
    """What the program of `rank` sends."""
    sent = [0, 0]
    for each in program:
        for to, num_bytes in each.sends.items() if isinstance(each, Post) else ():
            sent[network.node(to) != network.node(rank)] += num_bytes
    return Sent(*sent)


def predicted_seconds(network: Network, program: Callable[[int], Program]) -> float:
    """When the last rank is done, see Note [Prediction]."""
    return _Play(network, [program(rank) for rank in range(network.num_ranks)]).seconds()


@dataclass(eq=False)
class _Message:
    left: float
    links: tuple[tuple[str, int], ...]
    ends: tuple[tuple[int, object], tuple[int, object]]


@dataclass
class _Play:
    """The programs of all ranks, played against a clock."""

    network: Network
    programs: list[Program]
    now: float = 0.0
    busy_until: dict[int, float] = field(default_factory=dict)
    waits_for: dict[int, object] = field(default_factory=dict)
    unfinished: defaultdict[tuple[int, object], int] = field(default_factory=lambda: defaultdict(int))
    posted: defaultdict[tuple[object, ...], deque[int]] = field(default_factory=lambda: defaultdict(deque))
    flowing: list[_Message] = field(default_factory=list)

    def seconds(self) -> float:
        """How long it takes."""
        for rank in range(len(self.programs)):
            self._advance(rank)
        while self.busy_until or self.flowing:
            rates = self._rates()
            ends = [message.left / rate for message, rate in zip(self.flowing, rates, strict=True)]
            elapsed = min([*ends, *(moment - self.now for moment in self.busy_until.values())])
            self.now += elapsed
            for message, rate, end in zip(list(self.flowing), rates, ends, strict=True):
                message.left -= rate * elapsed
                if end <= elapsed:
                    self._finish(message)
            for rank in [rank for rank, moment in self.busy_until.items() if moment <= self.now]:
                del self.busy_until[rank]
                self._advance(rank)
        assert not self.waits_for, f"ranks wait for each other for ever: {self.waits_for}"
        return self.now

    def _advance(self, rank: int) -> None:
        """Run a rank's program until it computes or has to wait."""
        for each in self.programs[rank]:
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
                self._match("receive", source, rank, each.handle, 0)
            for to, num_bytes in each.sends.items():
                self.unfinished[rank, each.handle] += 1
                self._match("send", rank, to, each.handle, num_bytes)

    def _match(self, end: str, source: int, to: int, handle: object, num_bytes: int) -> None:
        """Let a message flow if its other end has been posted."""
        other = "send" if end == "receive" else "receive"
        if not (waiting := self.posted[other, source, to, handle]):
            self.posted[end, source, to, handle].append(num_bytes)
            return
        ends = ((source, handle), (to, handle))
        self.flowing.append(_Message(max(num_bytes, waiting.popleft()), self._links(source, to), ends))

    def _finish(self, message: _Message) -> None:
        self.flowing.remove(message)
        for rank, handle in message.ends:
            self.unfinished[rank, handle] -= 1
            if not self.unfinished[rank, handle] and self.waits_for.get(rank) == handle:
                del self.waits_for[rank]
                self._advance(rank)

    def _links(self, source: int, to: int) -> tuple[tuple[str, int], ...]:
        network = self.network
        if network.node(source) == network.node(to):
            return ("fast out", source), ("fast in", to)
        if network.slow_link == "rank":
            return ("slow out", source), ("slow in", to)
        return ("slow out", network.node(source)), ("slow in", network.node(to))

    def _rates(self) -> list[float]:
        """Bytes a second of each message under way."""
        load: defaultdict[tuple[str, int], int] = defaultdict(int)
        for message in self.flowing:
            for link in message.links:
                load[link] += 1
        mbit = {"fast": self.network.fast_mbit, "slow": self.network.slow_mbit}
        return [min(mbit[link[0][:4]] * 1e6 / 8 / load[link] for link in message.links) for message in self.flowing]
