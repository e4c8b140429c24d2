"""Ring attention: K/V travel from rank to rank while each rank's queries stay. Plain, double, and of one rank.

    chunk of the sequence    0  1  2  3  4  5  6  7
    held by rank             0  1  2  3  3  2  1  0         (zigzag of four ranks; others are in layouts.py)

    rank 1, forward     key_values.steps()         compute(step)
                        1's leave, 0's come        all x 1's own keys, a triangle
                        0's leave, 3's come        all x the early half of 0's keys
                        3's leave, 2's come        the late half x 3's keys
                        nothing                    the late half x 2's keys

    backward            key_values.steps()         compute(step)                            gradients.take(...)
                        1's leave, 0's come        the late half x the early half of 1's    kept
                        0's leave, 3's come        all x the early half of 0's              leave for 0, 2's come
                        3's leave, 2's come        the late half x 3's                      leave for 3, 3's come
                        nothing                    the late half x 2's                      leave for 2, 0's come
                        nothing                    two triangles of 1's                     kept

Each row is a step, and its calls are made in this order; without overlap K/V travel last. Who sees whom is the plan's
to say (plan/), and what travels when the program's (program/). This module computes the tiles of each step, in the
order of the program, and adds up what they give; messages are in exchange.py.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.attention.blocks import Block
from mindspeed_cp.attention.derivatives import ONCE
from mindspeed_cp.attention.exchange import Gradients, KeyValues, Partial, Player
from mindspeed_cp.attention.interface import OUTPUT, WITH_LARGEST, WITH_LSE, GridAttention, SourceOfPart, Wanted
from mindspeed_cp.attention.latent import Expand, Expansion, Latent
from mindspeed_cp.attention.lse import with_gradient_of_lse, with_room
from mindspeed_cp.attention.passes import RingPass, backward_pass, forward_pass
from mindspeed_cp.attention.recomputation import Recomputation, replay
from mindspeed_cp.attention.repeated_heads import RepeatedHeads, Repetition
from mindspeed_cp.attention.sinks import sinks_gradient, with_sinks
from mindspeed_cp.attention.sums import MergedOutput, TokenSum
from mindspeed_cp.attention.terms import LargestScores, ParameterGradients, Tensors, Terms, TermsOfTiles
from mindspeed_cp.comm import RingCommunicators
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.kernels import (
    KERNELS,
    MERGE_KERNELS,
    KernelRegistry,
    MergeKernel,
    Term,
    TileCase,
    TileOutput,
    TileTerms,
)
from mindspeed_cp.kernels.calls import Call
from mindspeed_cp.kernels.places import Views
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.plan import AttentionPlan
from mindspeed_cp.program import KV, BlockName, Step, Transport, cheapest_transport
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True)
class RingAttention(GridAttention):
    """Attention whose keys and values are spread over the ranks of a ring.

    schedule: the grid of its ranks, 1 x 1 for a rank that is alone. communicators: None for that one. overlap: whether
    messages travel while a step is computed; the results are the same to the bit. kernels: what to choose from for each
    tile. merge_kernels: what to choose from for merging them, the preferred first. pieces: see Note [Pieces] in
    program/rotation.py; it divides the K/V heads. transport: how K/V travel; None is the cheapest for the plan at hand.
    kept: what stays of others' K/V for the backward pass, see Note [Kept K/V] in program/steps.py.
    recomputation: of the checkpoints that it runs in; None where it is computed again there.
    """

    schedule: RingSchedule = RingSchedule(1, 1)  # noqa: RUF009  (it cannot be changed)
    communicators: RingCommunicators | None = None
    overlap: bool = False
    kernels: KernelRegistry = KERNELS
    merge_kernels: Sequence[MergeKernel] = MERGE_KERNELS
    pieces: int = 1
    transport: Transport | None = None
    kept: KV = KV.NEITHER
    recomputation: Recomputation | None = None

    @property
    def rank(self) -> int:
        """This rank's place in the ring."""
        return 0 if self.communicators is None else self.communicators.inner.rank

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless the pieces divide the K/V heads."""
        self.check_heads(k.size(1))

    def check_latent(self) -> None:
        """Raise ValueError where a latent cannot travel here."""
        self.check_heads(1)
        if self.kept is KV.KEYS:
            raise ValueError(
                "a latent, and --context-parallel-kv-cache-policy half: keys and values are made of the one latent, "
                "which is kept or not; use full, or leave it out."
            )

    def check_heads(self, num_kv_heads: int) -> None:
        """Raise ValueError unless the pieces divide so many K/V heads."""
        if self.pieces < 1 or num_kv_heads % self.pieces:
            raise ValueError(
                f"pieces={self.pieces} do not divide the {num_kv_heads} K/V heads that a rank of the ring works on; "
                f"give {or_list(divisors(num_kv_heads))}."
            )

    def attend(
        self, wanted: Wanted, q: Tensor, source: SourceOfPart, plan: AttentionPlan, terms: Terms
    ) -> tuple[Tensor, ...]:
        """See GridAttention. plan: between the ranks of the ring."""
        value_head_size = _given_to_kernels(source)[1].size(3)
        if wanted == WITH_LSE and self._serves_gradients(q, *_given_to_kernels(source), *terms.tensors):
            assert not isinstance(source, Latent), "values that are made have no room for the gradient of lse"
            if isinstance(source, RepeatedHeads):
                q, k, v = with_room(q, source.k, source.v)
                source = replace(source, k=k, v=v)
            else:
                q, *room = with_room(q, *source)
                source = room[0], room[1]
        terms = replace(terms, largest=True) if wanted == WITH_LARGEST else terms
        case = TileCase.of(q, *_given_to_kernels(source), TileTerms(terms.scale))
        case = case._replace(masked=terms.visible is not None, terms=terms.needs(q.dtype, looks_ahead=plan.looks_ahead))
        expand, weights, given = None, tuple[Tensor, ...](), None
        if isinstance(source, Latent):
            expand, weights, (k, v) = source.expand, source.weights, source.travelling
        elif isinstance(source, RepeatedHeads):
            k, v, given = source.k, source.v, source.given
        else:
            k, v = source
        tensors, ring = (*terms.tensors, *weights), self
        if self.kept and not self._serves_gradients(q, k, v, *tensors):
            ring = replace(self, kept=KV.NEITHER)
        out, lse, largest = _Ring.apply(_RingCall(ring, plan, terms, case, expand, given), q, k, v, *tensors)
        if wanted == OUTPUT:
            return (out,)
        return (out, largest) if wanted == WITH_LARGEST else (out[..., :value_head_size], lse)

    def _serves_gradients(self, *tensors: Tensor | None) -> bool:
        """Whether what a pass finds is for a backward pass of these."""
        # A reentrant checkpoint runs its function without gradients first, and what is found there serves with them.
        # Both runs answer alike, also of what has none in either, so that the second one asks for what was found.
        if self.recomputation is not None and self.recomputation.is_within:
            return True
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def forward_pass(self, plan: AttentionPlan, case: TileCase) -> RingPass:
        """How this rank plays the forward pass. case: of q, k and v, masked where a tensor says who sees whom."""
        deterministic = torch.are_deterministic_algorithms_enabled()  # Some kernels refuse where that is asked for.
        transport = self.transport or cheapest_transport(plan, self.schedule, ahead=self.overlap, pieces=self.pieces)
        made_for = self.schedule, self.rank, transport, self.pieces, self.kept, self.overlap, self.kernels, case
        return plan.once((*made_for, deterministic), lambda: forward_pass(plan, *made_for))

    def player(self, made: RingPass) -> Player:
        """What plays a pass."""
        return Player(made.program, made.phase, self.schedule, self.communicators, self.overlap)


class _RingCall(NamedTuple):
    """One call of a ring, beside its tensors.

    expand: how keys and values are made; None where they travel. given: see RepeatedHeads; None where all are, once.
    """

    ring: RingAttention
    plan: AttentionPlan
    terms: Terms
    case: TileCase
    expand: Expand | None
    given: tuple[int, ...] | None

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> "_RingCall":
        """The same call. tensors: those of the terms, and weights after them, which autograd saves between passes."""
        return self._replace(terms=self.terms.with_tensors(tensors[: len(self.terms.tensors)]))

    def expansion(self, tensors: Sequence[Tensor | None], *, backward: bool) -> Expansion | Repetition | None:
        """How keys and values are made in a pass. tensors: see `with_tensors`."""
        if self.given is not None:
            return Repetition(self.given)
        if self.expand is None:
            return None
        weights = [weight for weight in tensors[len(self.terms.tensors) :] if weight is not None]
        return Expansion(self.expand, weights, backward=backward)


class _Played(NamedTuple):
    """What the backward pass needs of the forward one. states: what kernels keep. kept: others' K/V."""

    forward_pass: RingPass
    states: dict[Call, tuple[Tensor, ...]]
    kept: dict[BlockName, Tensor]

    def state(self, call: Call) -> tuple[Tensor, ...]:
        """What the kernel has kept of this call; of another of its calls where parts of that one are computed again.

        As long as the kernel draws nothing at random it is the same of all.
        """
        if call in self.states:
            return self.states[call]
        assert Term.KERNEL_DROPOUT not in call.case.terms, "another call's dropout is not this one's"
        name = call.kernel.name
        return next(state for done, state in self.states.items() if done.kernel.name == name)


class _Found(NamedTuple):
    """What a forward pass gives. output: merged over all steps. largest: scores, where they are asked for."""

    output: TileOutput
    largest: Tensor | None
    played: _Played


class _Ring(torch.autograd.Function):
    """Forward and backward pass over the ring; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any, ring_call: _RingCall, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ring, expansion = ring_call.ring, ring_call.expansion(tensors, backward=False)
        with autocast_off(q.device.type):
            find = functools.partial(_forward, ring_call, expansion, q, k, v)
            (out, lse, _), largest, played = replay(ring.recomputation, ring_call.case, find)
        ctx.save_for_backward(q, k, v, out, lse, *tensors, *played.kept.values())
        ctx.num_tensors, ctx.kept = len(tensors), tuple(played.kept)
        ctx.ring_call = ring_call.with_tensors([None] * len(tensors))
        ctx.forward_pass, ctx.states = played.forward_pass, played.states
        ctx.set_materialize_grads(False)
        if largest is not None:
            ctx.mark_non_differentiable(largest)
        return out, lse, largest

    @staticmethod
    @ONCE.only
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.num_tensors], rest[ctx.num_tensors :]
        ring_call: _RingCall = ctx.ring_call.with_tensors(tensors)
        played = _Played(ctx.forward_pass, ctx.states, dict(zip(ctx.kept, kept, strict=True)))
        expansion = ring_call.expansion(tensors, backward=True)
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:
            dout, out = with_gradient_of_lse(dout, out, dlse)
        with autocast_off(q.device.type):
            found = _backward(ring_call, played, expansion, dout, q, k, v, TileOutput(out, lse))
        return None, *found, *(() if expansion is None else expansion.gradients())


def _given_to_kernels(source: SourceOfPart) -> tuple[Tensor, Tensor]:
    """Keys and values as kernels are given them, or what they would be like."""
    return source.stand_ins if isinstance(source, Latent | RepeatedHeads) else source


def _at_hand(key_values: KeyValues, expansion: Expansion | Repetition | None, step: Step) -> Block:
    """K/V of a step. Not to be held: the block is gone after it."""
    block = key_values.block(step)
    return block if expansion is None else expansion.block(block, step.tiles)


def _forward(ring_call: _RingCall, expansion: Expansion | Repetition | None, q: Tensor, k: Tensor, v: Tensor) -> _Found:
    """What a rank finds for its q [B, N, S, D]; k and v are its own, or the payloads that travel in their place."""
    ring, plan, terms, case, *_ = ring_call
    made = ring.forward_pass(plan, case)
    player = ring.player(made)
    merged, states = MergedOutput.of(q, case.value_head_size, ring.merge_kernels), dict[Call, tuple[Tensor, ...]]()
    told, largest = TermsOfTiles(plan, ring.rank, terms, case.terms, q), LargestScores(terms, q)
    key_values, of_queries = KeyValues(player, k, v), Views(q)

    def compute(step: Step, calls: Sequence[Call]) -> None:
        block = _at_hand(key_values, expansion, step)
        for call in calls:
            compute_call(step, call, block)

    def compute_call(step: Step, call: Call, block: Block) -> None:
        heads = player.heads(step.piece, q.size(1))
        queries, keys = call.queries(q), call.keys(k, block.tokens)
        (q_,) = of_queries.take(queries.given, heads)
        k_, v_ = keys.given.take(block.k), keys.given.take(block.v)
        tile_terms = told.of(step.owner, call, heads)
        output = call.kernel.forward(q_, k_, v_, tile_terms)
        states[call] = output.state
        result = TileOutput(queries.result(output.out), queries.result(output.lse))
        merged.merge(result, queries.back, heads)
        largest.add(q_, k_, tile_terms, heads)

    for number, step in enumerate(key_values.steps()):
        if step.tiles:
            with player.step(step.owner):
                compute(step, made.calls[number])
    played = _Played(made, states, key_values.kept)
    if terms.sinks is None:
        return _Found(merged.result(), largest.result, played)
    output = with_sinks(merged.result(accumulation_dtype(q.dtype)), terms.sinks)
    return _Found(output._replace(out=output.out.to(q.dtype)), largest.result, played)


def _backward(
    ring_call: _RingCall,
    played: _Played,
    expansion: Expansion | Repetition | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: TileOutput,
) -> Tensors:
    """Gradients of this rank's q, k and v, each rounded once, and its part of those of the terms' tensors.

    output: of the forward pass, merged over all keys.
    """
    ring, plan, terms, case, *_ = ring_call
    again = functools.partial(backward_pass, plan, ring.schedule, played.forward_pass, case, ring.kernels)
    made = plan.once(played.forward_pass, again)
    player = ring.player(made)
    dq, gradients, key_values = TokenSum(q), Gradients(player, k, v), KeyValues(player, k, v, played.kept)
    parameters = ParameterGradients(terms, case.terms)
    told = TermsOfTiles(plan, ring.rank, terms, case.terms, q, parameters)
    of_queries = Views(dout, q, output.out, output.lse)

    def compute(step: Step, calls: Sequence[Call]) -> list[Partial]:
        block = _at_hand(key_values, expansion, step)
        found = [compute_call(step, call, block) for call in calls]
        return found if expansion is None else expansion.of_payload(block, found)

    def compute_call(step: Step, call: Call, block: Block) -> Partial:
        heads = player.heads(step.piece, q.size(1))
        queries, keys = call.queries(q), call.keys(k, block.tokens)
        d_out, q_, out, lse = of_queries.take(queries.given, heads)
        grads = call.kernel.backward(
            *(d_out, q_, keys.given.take(block.k), keys.given.take(block.v)),
            TileOutput(out, lse, played.state(call)),
            told.of(step.owner, call, heads),
        )
        dq.add(queries.result(grads.dq), queries.back, heads)
        tile = call.tiles[0]
        tokens = tile.keys if len(call.tiles) == 1 and tile.sample is None else None
        return Partial(tokens, lambda held: call.keys(k, held).back, keys.result(grads.dk), keys.result(grads.dv))

    for number, step in enumerate(key_values.steps()):
        partials: list[Partial] = []
        if step.tiles:
            with player.step(step.owner):
                partials = compute(step, made.calls[number])
        gradients.take(number, partials)
    sinks = sinks_gradient(terms.sinks, dout, output.out, output.lse)
    return (dq.result(), *gradients.finish(), *parameters.result(terms, sinks))
