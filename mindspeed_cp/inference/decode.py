"""Decode over ranks: K/V stay where they are, and queries, which are few, go to them.

    method        queries on a rank          what travels                                     its output
    tree          all                        states, reduced over the ranks                   of all queries
    allgather_q   its heads, or sequences    queries gathered, states scattered               of its own queries
    ring_q        its heads, or sequences    queries hop by hop, states in one all-to-all     of its own queries

No cached key or value moves. What is sent is a function, `decode_sent` in costs.py, in which the length of the context
does not occur.

Shapes: B sequences, N query heads, G key/value heads, S queries of a sequence (1 but for speculation), T keys of this
rank, D key head size, V value head size.

Sources: tree attention arXiv:2408.04093; Helix arXiv:2507.07120; arXiv:2411.01783, algorithm 4 (ring_q).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, RingCommunicators
from mindspeed_cp.attention.exchange import QUERIES, KeyValues, Player
from mindspeed_cp.attention.sinks import with_sinks
from mindspeed_cp.attention.terms import terms_words
from mindspeed_cp.comm import Agreement, Communicator, Sizes
from mindspeed_cp.inference.local import agreed, attention_state
from mindspeed_cp.inference.over_ranks import OverRanks
from mindspeed_cp.inference.sequences import Spans
from mindspeed_cp.inference.states import (
    AllReduceBackend,
    ReduceScatterBackend,
    State,
    all_reduce_state,
    merge_states,
    reduce_scatter_state,
)
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileOutput
from mindspeed_cp.plan import FULL, AttentionPlan
from mindspeed_cp.program import Phase, Program, program
from mindspeed_cp.schedule import RingSchedule

Method = Literal["tree", "allgather_q", "ring_q"]
QueryLayout = Literal["replicated", "heads", "batch"]
Backend = Literal["a2a", "all_reduce", "ag_rs"]

WAYS: dict[Method, tuple[tuple[QueryLayout, ...], tuple[Backend, ...]]] = {
    "tree": (("replicated",), ("a2a", "all_reduce")),
    "allgather_q": (("heads", "batch"), ("a2a", "ag_rs")),
    "ring_q": (("heads", "batch"), ("a2a",)),
}
"""The layouts of queries, and the backends, that each method has."""


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    communicator: Communicator | None,
    plan: AttentionPlan | None = None,
    method: Method = "tree",
    q_layout: QueryLayout = "replicated",
    backend: Backend = "a2a",
    scale: float | None = None,
    terms: AttentionTerms | None = None,
    kernels: KernelRegistry = KERNELS,
    agreement: Agreement | None = None,
) -> State:
    """Attention of few queries over the keys of all ranks, which stay where they are.

    q: [B, N, S, D], of all queries; with q_layout "heads" this rank's N / ranks of the heads (those from rank * N /
        ranks on, as tensor parallelism has them), with "batch" its sequences: the first ranks have one more where the
        ranks do not divide them. k: [B, G, T, D]; v: [B, G, T, V], this rank's tokens of all heads and sequences; one
        floating dtype.
    communicator: of the ranks; None for one that is alone. plan: of decode_plan, over all queries, where padding, a
        window or several queries at once make a mask; without it every query sees every key that ranks give.
    method, backend: see the table above and `WAYS`. scale: 1 / sqrt(D) by default. terms: softcap, sinks (of the heads
        of q), and ALiBi where a rank has all heads. agreement: where given, ranks that come differently all raise.

    Returns out, like q with V in place of D and in its dtype, and lse in fp32 (fp64 for fp64). No gradients. Raises
    ValueError for a method that has no such layout or backend, and tensors that do not fit.
    """

    def come() -> tuple[_Step, str]:
        step = _Step(q, k, v, communicator, plan, q_layout, backend, scale, terms, kernels)
        step.check(method)
        return step, f"{step.words}, {method} by {backend}, queries {q_layout}{terms_words(terms)}, scale {scale}"

    step = agreed(agreement, come, q)
    with torch.no_grad():
        state = {"tree": step.tree, "allgather_q": step.allgather_q, "ring_q": step.ring_q}[method]()
        out, lse, _ = with_sinks(TileOutput(*state), None if terms is None else terms.sinks)
    return State(out.to(q.dtype), lse)


@dataclass(frozen=True)
class _Step(OverRanks):
    """One call; its arguments are in order once it is checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    communicator: Communicator | None
    plan: AttentionPlan | None
    q_layout: QueryLayout
    backend: Backend
    scale: float | None
    terms: AttentionTerms | None
    kernels: KernelRegistry

    @property
    def words(self) -> str:
        """What has to be the same on all ranks."""
        sizes = f"{self.k.size(0)} sequences, {self.q.size(2)} queries, heads of {self.q.size(3)} ({self.v.size(3)})"
        plan = "no plan" if self.plan is None else self.plan.words
        return f"{sizes}, {self.k.size(1)} key heads, {self.q.dtype}, {plan}"

    @property
    def num_heads(self) -> int:
        """Of the query heads of all ranks."""
        return self.q.size(1) * (self.size if self.q_layout == "heads" else 1)

    @property
    def sequences(self) -> list[int]:
        """How many each rank has the queries of, where they are sharded so."""
        return shares(self.k.size(0), self.size)

    def tree(self) -> State:
        """All ranks have all queries."""
        backend: AllReduceBackend = "all_reduce" if self.backend == "all_reduce" else "a2a"
        return all_reduce_state(*self._state(self.q, self.k, self.v), self.communicator, backend=backend)

    def allgather_q(self) -> State:
        """Queries of all ranks, in one all-gather; states scattered."""
        if self.communicator is None:
            return self._state(self.q, self.k, self.v)
        dim = 1 if self.q_layout == "heads" else 0
        backend: ReduceScatterBackend = "ag_rs" if self.backend == "ag_rs" else "a2a"
        return gather_queries(
            self.q, self.communicator, lambda q: self._state(q, self.k, self.v), dim=dim, backend=backend
        )

    def ring_q(self) -> State:
        """Queries of one owner after another come by while those of the one before are computed."""
        shapes = [self._shape(rank) for rank in range(self.size)]
        if self.communicator is None or not any(shape.numel() for shape in shapes):
            return self._state(self.q, self.k[: self.q.size(0)], self.v[: self.q.size(0)])
        return pass_queries(self.q, shapes, self.communicator, self._state_of)

    def _shape(self, owner: int) -> torch.Size:
        """Of an owner's queries."""
        batch = self.sequences[owner] if self.q_layout == "batch" else self.q.size(0)
        return torch.Size((batch, *self.q.shape[1:]))

    def _state_of(self, owner: int, q: Tensor) -> State:
        """Of an owner's queries over this rank's keys of the same sequences, and of the key heads that they read."""
        if self.q_layout == "batch":
            first = sum(self.sequences[:owner])
            samples = slice(first, first + self.sequences[owner])
            if self.plan is None:
                return self._state(q, self.k[samples], self.v[samples])
            plan = _of_samples(self.plan, samples, self.k.size(0))
            longest = slice(plan.keys.num_tokens(self.rank))  # Of these: others may be longer.
            return self._state(q, self.k[samples, :, longest], self.v[samples, :, longest], plan)
        reads, first = self.num_heads // self.k.size(1), owner * q.size(1)
        last = first + q.size(1)
        # One call where its heads read whole groups, or part of a single one; else one for each group.
        whole = first % reads == 0 and last % reads == 0
        edges = [first, last] if whole else [first, *range(first - first % reads + reads, last, reads), last]
        states = []
        for begin, end in pairwise(edges):
            groups = slice(begin // reads, (end - 1) // reads + 1)
            heads = slice(begin - first, end - first)
            states.append(self._state(q[:, heads], self.k[:, groups], self.v[:, groups], self.plan))
        return State(*(torch.cat(each, dim=1) for each in zip(*states, strict=True)))

    def _state(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> State:
        plan = self.plan if plan is None else plan
        return attention_state(
            q, k, v, plan=plan, key_rank=self.rank, scale=self.scale, terms=self.terms, kernels=self.kernels
        )

    def check(self, method: Method) -> None:
        """Raise ValueError for a method that has no such layout or backend, and where something does not fit."""
        if method not in WAYS:
            raise ValueError(f"method={method!r} is none; give one of {', '.join(map(repr, WAYS))}.")
        layouts, backends = WAYS[method]
        if self.q_layout not in layouts or self.backend not in backends:
            able = " or ".join(each for each, way in WAYS.items() if self.q_layout in way[0]) or "another layout"
            raise ValueError(
                f"method={method!r} with q_layout={self.q_layout!r} and backend={self.backend!r}: it takes queries "
                f"{' or '.join(layouts)} by {' or '.join(backends)}; for {self.q_layout} use {able}."
            )
        self._check_tensors(method)

    def _check_tensors(self, method: Method) -> None:
        q, k, size = self.q, self.k, self.size
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(self.v.shape)}"
        if not q.dim() == k.dim() == self.v.dim() == 4 or not k.size(1):
            raise ValueError(f"{shapes}: give q [B, N, S, D], k [B, G, T, D] and v [B, G, T, V].")
        sequences = self.sequences[self.rank] if self.q_layout == "batch" else k.size(0)
        if q.size(0) != sequences or self.num_heads % k.size(1):
            raise ValueError(
                f"{shapes}: rank {self.rank} of {size} has {sequences} of {k.size(0)} sequences with queries "
                f"{self.q_layout}, and {k.size(1)} key heads divide the {self.num_heads} query heads; shard q so."
            )
        if method == "allgather_q" and self.q_layout == "batch" and k.size(0) % size:
            raise ValueError(
                f"{k.size(0)} sequences are no equal shares of {size} ranks, which method='allgather_q' takes; use "
                f"method='ring_q', or pad the batch."
            )
        if self.plan is not None and (self.plan.queries.num_ranks, self.plan.keys.num_ranks) != (1, size):
            raise ValueError(
                f"the plan is of {self.plan.queries.num_ranks} ranks of queries and {self.plan.keys.num_ranks} of "
                f"keys, and decode takes all queries as one rank's, over keys of {size}; make it by decode_plan."
            )
        if self.terms is not None and self.terms.bias is not None:
            raise ValueError("a bias has rows of its own for each step; add it in a prefill of one token, pass_kv.")
        if self.terms is not None and self.terms.alibi_slopes is not None and self.q_layout == "heads":
            raise ValueError(
                "ALiBi's slopes are of this rank's heads, and it computes others' too; gather q, use tree."
            )


def shares(batch: int, size: int) -> list[int]:
    """How many sequences of a batch each rank has the queries of: the first ranks one more where it does not divide."""
    each, more = divmod(batch, size)
    return [each + (rank < more) for rank in range(size)]


def gather_queries(
    q: Tensor,
    communicator: Communicator,
    state_of: Callable[[Tensor], State],
    *,
    dim: int,
    backend: ReduceScatterBackend = "a2a",
) -> State:
    """The states of this rank's queries over all ranks' keys: queries in an all-gather, states scattered.

    q: [B, N, S, D], an equal share along `dim` on every rank. state_of: all ranks' queries over this rank's keys.
    """
    gathered = communicator.all_gather(q.contiguous()).movedim(0, dim).flatten(dim, dim + 1)
    return reduce_scatter_state(*state_of(gathered), communicator, dim=dim, backend=backend)


def pass_queries(
    q: Tensor, shapes: Sequence[torch.Size], communicator: Communicator, state_of: Callable[[int, Tensor], State]
) -> State:
    """The states of this rank's queries over all ranks' keys: queries hop by hop, states in one all-to-all.

    q: [B, N, S, D]. shapes: of each rank's queries, which may differ. state_of: some rank's queries over this rank's
    keys; computed while the next ones are under way.
    """
    size, rank, head_size = communicator.size, communicator.rank, q.size(3)
    rows = tuple(shape.numel() // head_size for shape in shapes)
    communicators = RingCommunicators(*[communicator] * 3)
    player = Player(_around(rows, rank), Phase.FORWARD, RingSchedule(1, size), communicators, overlap=True)
    flat = q.reshape(1, 1, -1, head_size)
    carried = KeyValues(player, flat, flat[..., :0], kind=QUERIES)
    states: dict[int, Tensor] = {}
    for step in carried.steps():
        if step.tiles and rows[step.owner]:
            out, lse = state_of(step.owner, carried.block(step).k.reshape(shapes[step.owner]))
            states[step.owner] = torch.cat([out, lse.unsqueeze(-1)], dim=-1).flatten(0, 2)
    sent = [0 if other == rank else rows[other] for other in range(size)]
    coming = [0 if other == rank else rows[rank] for other in range(size)]
    like = next(iter(states.values()))
    message = torch.cat([like[:0], *(states[other] for other in range(size) if sent[other])])
    received = communicator.all_to_all(message, Sizes(sent, coming))
    parts = torch.cat([states.get(rank, like[:0]), received]).view(size, rows[rank], like.size(1))
    out, lse = merge_states(parts[..., :-1], parts[..., -1])
    return State(out.view(*q.shape[:3], like.size(1) - 1), lse.view(q.shape[:3]))


@functools.lru_cache(maxsize=256)
def _around(rows: tuple[int, ...], rank: int) -> Program:
    """The program in which each rank's rows come to all ranks, one rank's after another's."""
    carried = Spans(tuple((((0, each),) if each else (),) for each in rows))
    everyone = Spans(((((0, 1),),),) * len(rows))
    return program(AttentionPlan(everyone, carried, FULL), RingSchedule(1, len(rows)), rank, Phase.FORWARD)


def _of_samples(plan: AttentionPlan, samples: slice, batch: int) -> AttentionPlan:
    """The plan of some of the sequences."""

    def part(spans: Spans) -> Spans:
        return Spans(tuple(held[samples] for held in spans.held))

    def make() -> AttentionPlan:
        queries, keys = (part(Spans.of(layout, batch)) for layout in (plan.queries, plan.keys))
        return AttentionPlan(queries, keys, plan.bands)

    return plan.once(("samples", samples.start, samples.stop, batch), make)
