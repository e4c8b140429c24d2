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
to say (plan.py), and what travels when the program's (program/). This module computes the tiles of each step, in the
order of the program, and adds up what they give; messages are in exchange.py.

Note [Gradient of lse]
    The gradient of a score is p * (dout . v - dout . out + dlse), and kernels compute the middle term themselves, from
    the out and dout that they are given. With one more column in which v is 0, dout is 1 and out is -dlse, that term
    becomes dout . out - dlse, and nothing else changes but a column of dv that is thrown away.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.blocks import Block
from mindspeed_cp.attention.exchange import Gradients, KeyValues, Partial, Player
from mindspeed_cp.attention.latent import Expand, Expansion, Latent
from mindspeed_cp.attention.recomputation import Recomputation, replay
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
    TileKernel,
    TileOutput,
    TileTerms,
)
from mindspeed_cp.kernels.calls import Call, Views, calls
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.kernels.wrapped import Turned
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.plan import AttentionPlan, Tile, within
from mindspeed_cp.program import KV, BlockName, Phase, Program, Step, Transport, cheapest_transport, program
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True)
class RingAttention:
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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention. plan: between the ranks of the ring."""
        return self._apply(q, k, v, plan, terms)[0]

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention. plan: between the ranks of the ring."""
        if not self._serves_gradients(q, k, v, *terms.tensors):
            out, lse, _ = self._apply(q, k, v, plan, terms)
            return out, lse
        # Room for the gradient of lse, see Note [Gradient of lse]; kernels that want one head size still get one.
        one_size = q.size(3) == v.size(3)
        q, k = (F.pad(x, (0, _ROOM)) for x in (q, k)) if one_size else (q, k)
        out, lse, _ = self._apply(q, k, F.pad(v, (0, _ROOM)), plan, terms)
        return out[..., : v.size(3)], lse

    def with_largest(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention. plan: between the ranks of the ring."""
        out, _, largest = self._apply(q, k, v, plan, replace(terms, largest=True))
        return out, largest

    def _apply(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms, latent: Latent | None = None
    ) -> tuple[Tensor, ...]:
        """Output, log-sum-exp and, where it is asked for, the largest score of each head.

        latent: what travels in place of k and v, which then only say what they would be like.
        """
        case = TileCase.of(q, k, v, TileTerms(terms.scale))
        case = case._replace(masked=terms.visible is not None, terms=terms.needs(q.dtype, looks_ahead=plan.looks_ahead))
        expand, weights = None, tuple[Tensor, ...]()
        if latent is not None:
            expand, weights, (k, v) = latent.expand, latent.weights, latent.travelling
        tensors, ring = (*terms.tensors, *weights), self
        if self.kept and not self._serves_gradients(q, k, v, *tensors):
            ring = replace(self, kept=KV.NEITHER)
        result: tuple[Tensor, ...] = _Ring.apply(ring, plan, terms, case, expand, q, k, v, *tensors)
        return result

    def _serves_gradients(self, *tensors: Tensor | None) -> bool:
        """Whether what a pass finds is for a backward pass of these."""
        # A reentrant checkpoint runs its function without gradients first, and what is found there serves with them.
        # Both runs answer alike, also of what has none in either, so that the second one asks for what was found.
        if self.recomputation is not None and self.recomputation.is_within:
            return True
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def of_latent(self, q: Tensor, latent: Latent, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention. plan: between the ranks of the ring."""
        return self._apply(q, *latent.stand_ins, plan, terms, latent)[0]

    def forward_pass(self, plan: AttentionPlan, case: TileCase) -> "RingPass":
        """How this rank plays the forward pass. case: of q, k and v, masked where a tensor says who sees whom."""
        deterministic = torch.are_deterministic_algorithms_enabled()  # Some kernels refuse where that is asked for.
        transport = self.transport or cheapest_transport(plan, self.schedule, ahead=self.overlap, pieces=self.pieces)
        made_for = self.schedule, self.rank, transport, self.pieces, self.kept, self.overlap, self.kernels, case
        return plan.once((*made_for, deterministic), lambda: _forward_pass(plan, *made_for))

    def player(self, made: "RingPass") -> Player:
        """What plays a pass."""
        return Player(made.program, made.phase, self.schedule, self.communicators, self.overlap)


@dataclass(frozen=True, eq=False)
class RingPass:
    """A rank's program, and the calls of kernels for the tiles of each step."""

    transport: Transport
    ahead: bool
    program: Program
    phase: Phase
    calls: tuple[tuple[Call, ...], ...]

    def steps(self) -> Iterator[tuple[Step, tuple[Call, ...]]]:
        """Each step with its calls."""
        return zip(self.program.steps, self.calls, strict=True)


def _forward_pass(
    plan: AttentionPlan,
    schedule: RingSchedule,
    rank: int,
    transport: Transport,
    pieces: int,
    kept: KV,
    ahead: bool,
    kernels: KernelRegistry,
    case: TileCase,
) -> RingPass:
    made = program(plan, schedule, rank, Phase.FORWARD, transport=transport, pieces=pieces, kept=kept, ahead=ahead)
    share = case.of_piece(pieces)
    return RingPass(
        transport,
        ahead,
        made,
        Phase.FORWARD,
        tuple(tuple(calls(step.tiles, case if step.piece is None else share, kernels)) for step in made.steps),
    )


def _backward_pass(
    plan: AttentionPlan, schedule: RingSchedule, forward: RingPass, case: TileCase, kernels: KernelRegistry
) -> RingPass:
    """The pass in which every tile is computed by the kernel that computed it in the forward pass.

    Only the own block is in other tiles there, two parts of it; as a whole where a kernel does not take its parts, or
    has drawn dropout for the whole by its own coordinates.
    """
    rank, pieces = forward.program.rank, forward.program.pieces
    again = functools.partial(
        program, transport=forward.transport, pieces=pieces, kept=forward.program.kept, ahead=forward.ahead
    )
    of_block = {(step.owner, step.piece): (step, done) for step, done in forward.steps() if step.tiles}

    def share(step: Step) -> TileCase:
        return case if step.piece is None else case.of_piece(pieces)

    for in_two in (False,) if Term.KERNEL_DROPOUT in case.terms else (True, False):
        made = again(plan, schedule, rank, Phase.BACKWARD, in_two=in_two)
        try:
            each = tuple(
                _again(step, *of_block.get((step.owner, step.piece), (step, ())), share(step), kernels)
                for step in made.steps
            )
        except NotImplementedError:
            continue
        return RingPass(forward.transport, forward.ahead, made, Phase.BACKWARD, each)
    raise AssertionError("the tiles of the forward pass were computed, and are not to be had again")


def _again(step: Step, before: Step, done: Sequence[Call], case: TileCase, kernels: KernelRegistry) -> tuple[Call, ...]:
    """The calls for a step's tiles by the kernels of the forward pass. Raises NotImplementedError where one refuses."""
    if not step.tiles or step.tiles == before.tiles:
        return tuple(done) if step.tiles else ()
    parts: dict[str, tuple[TileKernel, list[Tile]]] = {}
    for call in done:
        kernel = call.kernel.kernel if isinstance(call.kernel, Turned) else call.kernel
        parts.setdefault(kernel.name, (kernel, []))[1].extend(_common(call.tiles, step.tiles))
    return tuple(call for kernel, tiles in parts.values() for call in calls(tiles, case, kernels.alone(kernel)))


def _corners(tile: Tile) -> tuple[object, ...]:
    return tile.queries.start, tile.queries.stop, tile.keys.start, tile.keys.stop, tile.left, tile.right, tile.sample


def _common(tiles: Sequence[Tile], others: Sequence[Tile]) -> Iterator[Tile]:
    """What is in a tile of both. Most of many tiles are the same in both."""
    known = {_corners(tile) for tile in tiles} & {_corners(other) for other in others}
    yield from (tile for tile in tiles if _corners(tile) in known)
    others = [other for other in others if _corners(other) not in known]
    for tile in (tile for tile in tiles if _corners(tile) not in known):
        for other in others:
            common = within(tile, other.queries, other.keys) if tile.sample == other.sample else None
            if common is not None:
                yield common


_ROOM = 8
"""Columns that are added to the values for the gradient of lse: fused kernels read 16 bytes at once."""


_States = dict[Call, tuple[Tensor, ...]]
"""What kernels keep of the calls of the forward pass."""


def _never_twice(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that refuses to be part of a graph: once_differentiable alone drops a second derivative where the
    gradient that comes does not require one.
    """
    once = once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_second_derivatives()
        return once(ctx, *grads)

    return run


def refuse_second_derivatives() -> None:
    """Raise RuntimeError in a backward pass that is to be part of a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention's gradient has none of its own; leave out create_graph=True, or take second derivatives of "
            "torch.nn.functional.scaled_dot_product_attention with its math backend."
        )


class _Ring(torch.autograd.Function):
    """Forward and backward pass over the ring; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any,
        ring: RingAttention,
        plan: AttentionPlan,
        terms: Terms,
        case: TileCase,
        expand: Expand | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        expansion = _expansion(expand, terms, tensors, backward=False)
        with autocast_off(q.device.type):
            (out, lse, _), largest, made, states, kept = replay(
                ring.recomputation, case, lambda: _forward(ring, plan, terms, case, expansion, q, k, v)
            )
        ctx.save_for_backward(q, k, v, out, lse, *tensors, *kept.values())
        ctx.num_tensors, ctx.kept = len(tensors), tuple(kept)
        ctx.ring, ctx.plan, ctx.case, ctx.forward_pass, ctx.states = ring, plan, case, made, states
        ctx.terms, ctx.expand = terms.with_tensors([None] * len(terms.tensors)), expand
        ctx.set_materialize_grads(False)
        if largest is not None:
            ctx.mark_non_differentiable(largest)
        return out, lse, largest

    @staticmethod
    @_never_twice
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        kept = dict(zip(ctx.kept, tensors[ctx.num_tensors :], strict=True))
        terms = ctx.terms.with_tensors(tensors[: len(ctx.terms.tensors)])
        expansion = _expansion(ctx.expand, terms, tensors[: ctx.num_tensors], backward=True)
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:
            dout, out = _with_gradient_of_lse(dout, out, dlse)
        with autocast_off(q.device.type):
            gradients, parameters = _backward(ctx, terms, expansion, dout, q, k, v, out, lse, kept)
        weights = () if expansion is None else expansion.gradients()
        return None, None, None, None, None, *gradients, *parameters, *weights


def _expansion(
    expand: Expand | None, terms: Terms, tensors: Sequence[Tensor | None], *, backward: bool
) -> Expansion | None:
    """How keys and values are made; None where they travel. tensors: those of the terms, and weights after them."""
    if expand is None:
        return None
    weights = [weight for weight in tensors[len(terms.tensors) :] if weight is not None]
    return Expansion(expand, weights, backward=backward)


def _at_hand(key_values: KeyValues, expansion: Expansion | None, step: Step) -> Block:
    """K/V of a step. Not to be held: the block is gone after it."""
    block = key_values.block(step)
    return block if expansion is None else expansion.block(block, step.tiles)


def _forward(
    ring: RingAttention,
    plan: AttentionPlan,
    terms: Terms,
    case: TileCase,
    expansion: Expansion | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[TileOutput, Tensor | None, RingPass, _States, dict[BlockName, Tensor]]:
    """The merged output over all steps, the largest scores, and what the backward pass needs of calls and blocks."""
    made = ring.forward_pass(plan, case)
    player = ring.player(made)
    merged, states = MergedOutput.of(q, case.value_head_size, ring.merge_kernels), _States()
    told, largest = TermsOfTiles(plan, ring.rank, terms, case.terms, q), LargestScores(terms, q)
    key_values, of_queries = KeyValues(player, k, v), Views(q)

    def compute(step: Step, made: Sequence[Call]) -> None:
        block = _at_hand(key_values, expansion, step)
        for call in made:
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
    if terms.sinks is None:
        return merged.result(), largest.result, made, states, key_values.kept
    result = with_sinks(merged.result(accumulation_dtype(q.dtype)), terms.sinks)
    return result._replace(out=result.out.to(q.dtype)), largest.result, made, states, key_values.kept


def _backward(
    ctx: Any,
    terms: Terms,
    expansion: Expansion | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merged_out: Tensor,
    merged_lse: Tensor,
    kept: dict[BlockName, Tensor],
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensors]:
    """Gradients of this rank's q, k and v, each rounded once, and its part of those of parameters."""
    ring, plan, case, states = ctx.ring, ctx.plan, ctx.case, ctx.states
    forward_pass: RingPass = ctx.forward_pass
    made = plan.once(forward_pass, lambda: _backward_pass(plan, ring.schedule, forward_pass, case, ring.kernels))
    player = ring.player(made)
    dq, gradients, key_values = TokenSum(q), Gradients(player, k, v), KeyValues(player, k, v, kept)
    parameters = ParameterGradients(terms, case.terms)
    told = TermsOfTiles(plan, ring.rank, terms, case.terms, q, parameters)
    of_queries = Views(dout, q, merged_out, merged_lse)

    def compute(step: Step, made: Sequence[Call]) -> list[Partial]:
        block = _at_hand(key_values, expansion, step)
        found = [compute_call(step, call, block) for call in made]
        return found if expansion is None else expansion.of_payload(block, found)

    def compute_call(step: Step, call: Call, block: Block) -> Partial:
        heads = player.heads(step.piece, q.size(1))
        queries, keys = call.queries(q), call.keys(k, block.tokens)
        d_out, q_, out, lse = of_queries.take(queries.given, heads)
        grads = call.kernel.backward(
            *(d_out, q_, keys.given.take(block.k), keys.given.take(block.v)),
            TileOutput(out, lse, _state(states, call)),
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
    sinks = sinks_gradient(terms.sinks, dout, merged_out, merged_lse)
    return (dq.result(), *gradients.finish()), parameters.result(terms, sinks)


def _with_gradient_of_lse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """dout and out with which a kernel gives the gradients for `dlse` too, see Note [Gradient of lse]."""
    place = out.size(3) - _ROOM
    dout, out = dout.clone(), out.clone()
    dout[..., place] = 1.0
    out[..., place] = -dlse
    return dout, out


def _state(states: _States, call: Call) -> tuple[Tensor, ...]:
    """What the kernel has kept of this call; of another of its calls where only parts of that one are computed again.

    As long as the kernel draws nothing at random it is the same of all.
    """
    if call in states:
        return states[call]
    assert Term.KERNEL_DROPOUT not in call.case.terms, "another call's dropout is not this one's"
    name = call.kernel.name
    return next(state for done, state in states.items() if done.kernel.name == name)
