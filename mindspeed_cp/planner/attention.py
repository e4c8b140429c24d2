"""Attention on a grid of ranks, as the events of each: read off the program that the ranks themselves play."""

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import AttentionPlan, total_tokens, union
from mindspeed_cp.planner.clock import Compute, Event, Post, Wait
from mindspeed_cp.program import KV, Axis, Exchange, Phase, Program, Step, Transport, cheapest_transport, program
from mindspeed_cp.rounds import rounds, rounds_under_way
from mindspeed_cp.schedule import RingSchedule
from mindspeed_cp.topology import CPTopology


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Attention of one sequence. num_tokens: of the whole sequence. element_size: bytes of a number."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    element_size: int = 2

    def kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of so many tokens, all heads."""
        return 2 * num_tokens * self.num_kv_heads * self.head_size * self.element_size

    def q_bytes(self, num_tokens: int) -> int:
        """Queries of so many tokens, all heads."""
        return num_tokens * self.num_heads * self.head_size * self.element_size

    def out_bytes(self, num_tokens: int) -> int:
        """Outputs of so many tokens, all heads."""
        return self.q_bytes(num_tokens)

    def flops(self, area: float, phase: Phase) -> float:
        """Of so many pairs of query and key, in all heads: two matrix products, five in the backward pass."""
        products = 2 if phase is Phase.FORWARD else 5
        return products * 2 * area * self.num_heads * self.head_size

    def making_flops(self, num_keys: int, phase: Phase) -> float:
        """Of making keys and values of so many tokens in a step, all heads: none where they travel."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class AttentionPass:
    """One pass of attention over a grid of ranks.

    plan: who sees whom, between the ranks of the ring; None is causal attention on zigzag shards.
    flops_per_s: floating-point operations a second of the kernel. launch_s: what each tile takes beside them.
    overlap, pieces, transport, kept: as the ring is set, see RingAttention.
    """

    topology: CPTopology
    shape: AttentionShape
    phase: Phase
    flops_per_s: float
    launch_s: float = 0.0
    overlap: bool = False
    pieces: int = 1
    transport: Transport | None = None
    kept: KV = KV.NEITHER
    plan: AttentionPlan | None = None

    def events(self, rank: int) -> Iterator[Event]:
        """What `rank` does; the numbers of ranks are those of the whole grid."""
        peers = self.topology.ulysses_ranks(rank)
        ring_rank, ulysses = rank // self.topology.ulysses, self.topology.ulysses
        plan = self._plan
        tokens = plan.queries.num_tokens(ring_rank)
        sent_queries, out = (each(tokens) // ulysses for each in (self.shape.q_bytes, self.shape.out_bytes))
        qkv = sent_queries + self.shape.kv_bytes(plan.keys.num_tokens(ring_rank)) // ulysses
        there, back = (qkv, out) if self.phase is Phase.FORWARD else (out, qkv)
        yield from all_to_all("scatter", rank, peers, there // ulysses)
        yield from self._ring(rank)
        yield from all_to_all("gather", rank, peers, back // ulysses)

    def num_bytes(self) -> int:
        """What all ranks together send, by formula.

        With P ranks, K the bytes of one rank's keys and values, Q those of its queries, u the Ulysses degree and r the
        ring's size: Ulysses' exchanges P(u-1)/u (2Q + K), either pass (keys and values there, their gradients back;
        queries and outputs likewise); the ring what its program says: under a causal zigzag P(r-1)K forward, but that
        rank 0 is only needed in half, and backward as much again for the gradients, less a quarter, since half of them
        are of blocks of which the mask leaves half.
        """
        plan, ulysses = self._plan, self.topology.ulysses
        held = range(self.topology.ring_size)
        tokens, keys = total_tokens(plan.queries), self.shape.kv_bytes(total_tokens(plan.keys))
        of_each = self.shape.kv_bytes(1) // 2
        travelling = sum(self.program(rank).sent_bytes(of_each, of_each).total() for rank in held)
        # Each of the Ulysses ranks has such a ring, of its part of the heads.
        there_and_back = self.shape.q_bytes(tokens) + self.shape.out_bytes(tokens) + keys
        return there_and_back * (ulysses - 1) // ulysses + travelling

    def held_bytes(self) -> int:
        """K/V of others that the fullest rank has at hand or kept at most: none where a ring has one rank."""
        of_each = self.shape.kv_bytes(1) // 2 // self.topology.ulysses
        programs = map(self.program, range(self.topology.ring_size))
        return max(each.held_bytes(of_each, of_each) + each.kept_bytes(of_each, of_each) for each in programs)

    def program(self, ring_rank: int) -> Program:
        """The program of a rank of the ring."""
        schedule = RingSchedule(outer=self.topology.outer, inner=self.topology.inner)
        return ring_program(
            self._plan, schedule, ring_rank, self.phase, self.pieces, self.transport, self.kept, self.overlap
        )

    @property
    def _plan(self) -> AttentionPlan:
        return self.plan or causal_zigzag(self.topology.ring_size, self.shape.num_tokens)

    def _ring(self, rank: int) -> Iterator[Event]:
        """The rank's program, played as attention plays it."""
        ranks = self.topology.ring_ranks(rank)
        program = self.program(ranks.index(rank))
        return _RingEvents(self, program, ranks, self.shape.kv_bytes(1) / self.topology.ulysses).all()

    def seconds(self, step: Step) -> float:
        """What the tiles of a step take, for this rank's share of the heads or, where the step is of one, a piece."""
        share = self.topology.ulysses * (1 if step.piece is None else self.pieces)
        keys = sum(span.stop - span.start for span in union(tile.keys for tile in step.tiles))
        flops = self.shape.flops(sum(tile.area for tile in step.tiles), self.phase)
        flops += self.shape.making_flops(keys, self.phase)
        return flops / share / self.flops_per_s + len(step.tiles) * self.launch_s


class _RingEvents:
    """What a rank does in the course of a program.

    ranks: of the ring, in the numbers of the whole grid. token_bytes: of the K/V of a token in a rank's heads.
    """

    def __init__(self, settings: AttentionPass, program: Program, ranks: Sequence[int], token_bytes: float) -> None:
        self._settings, self._program, self._ranks, self._token_bytes = settings, program, ranks, token_bytes
        self._coming: list[Exchange] = []

    def all(self) -> Iterator[Event]:
        """In the order in which they happen: that of `KeyValues` and `Gradients` in attention/exchange.py."""
        program, overlap = self._program, self._settings.overlap
        gradients = [step.gradients for step in program.steps]
        for step, exchanges, added, leaving in zip(
            program.steps, program.exchanges, program.added, gradients, strict=True
        ):
            if overlap:
                yield from self._key_values(step, exchanges)
            if step.tiles:
                yield from self._arrived(self._bringing(step.owner, step.piece))
                yield Compute(self._settings.seconds(step))
            for earlier in (gradients[number] for number in added):
                assert earlier is not None
                yield Wait(_handle(earlier))
            if leaving is not None:
                yield from self._post(leaving)
            if not overlap:
                yield from self._key_values(step, exchanges)
        under_way = (*self._coming, *(each for each in gradients if each is not None))
        yield from (Wait(handle) for handle in dict.fromkeys(map(_handle, under_way)))

    def _key_values(self, step: Step, exchanges: tuple[Exchange, ...]) -> Iterator[Event]:
        """The K/V that leave and come at a step."""
        for exchange in exchanges:
            for message in exchange.sends:
                yield from self._arrived(self._bringing(message.owner, message.piece))
            yield from self._arrived([each for each in self._coming if each.is_before(exchange, step)])
            yield from self._post(exchange)
            self._coming.append(exchange)

    def _bringing(self, owner: int, piece: int | None) -> list[Exchange]:
        return [exchange for exchange in self._coming if exchange.brings(owner, piece)]

    def _arrived(self, exchanges: list[Exchange]) -> Iterator[Event]:
        for exchange in exchanges:
            yield Wait(_handle(exchange))
            self._coming.remove(exchange)

    def _post(self, exchange: Exchange) -> Iterator[Event]:
        """An exchange, which is waited for at once without overlap."""
        to: dict[int, int] = {}
        for message in exchange.sends:
            share = (1 if message.piece is None else self._settings.pieces) * (1 if message.carries is KV.BOTH else 2)
            peer = self._ranks[message.peer]
            to[peer] = to.get(peer, 0) + round(message.num_tokens * self._token_bytes / share)
        sources = tuple(dict.fromkeys(self._ranks[message.peer] for message in exchange.receives))
        yield Post(_handle(exchange), to, sources, exchange.axis)
        if not self._settings.overlap:
            yield Wait(_handle(exchange))


def _handle(exchange: Exchange) -> tuple[Axis, int | None, int]:
    """The same for an exchange at both of its ends."""
    return exchange.axis, exchange.piece, exchange.number


def causal_zigzag(ring_size: int, num_tokens: int) -> AttentionPlan:
    """Causal attention of so many tokens in zigzag shards of a ring."""
    shards = EqualChunks(ring_size, num_tokens // ring_size)
    return AttentionPlan(shards, shards)


@functools.lru_cache(maxsize=1024)
def ring_program(
    plan: AttentionPlan,
    schedule: RingSchedule,
    rank: int,
    phase: Phase,
    pieces: int,
    transport: Transport | None,
    kept: KV,
    ahead: bool = False,
) -> Program:
    """`program`, made once for all predictions that read it. transport: None is the cheapest for the plan."""
    transport = transport or cheapest_transport(plan, schedule, ahead=ahead, pieces=pieces)
    return program(plan, schedule, rank, phase, transport=transport, pieces=pieces, kept=kept, ahead=ahead)


def all_to_all(handle: str, rank: int, peers: Sequence[int], num_bytes: int) -> Iterator[Event]:
    """The rounds of an exchange of so many bytes from each of the peers to each other, this rank among them."""
    return unequal_all_to_all(handle, rank, peers, [num_bytes] * len(peers))


def unequal_all_to_all(handle: str, rank: int, peers: Sequence[int], num_bytes: Sequence[int]) -> Iterator[Event]:
    """The same with so many bytes to each of the peers."""
    under_way: deque[object] = deque()
    for number, (to, source) in enumerate(rounds(peers.index(rank), len(peers))):
        if len(under_way) == rounds_under_way(len(peers)):
            yield Wait(under_way.popleft())
        under_way.append((handle, number))
        yield Post(under_way[-1], {peers[to]: num_bytes[to]}, (peers[source],))
    for each in under_way:
        yield Wait(each)
