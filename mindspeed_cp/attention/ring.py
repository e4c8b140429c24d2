"""Ring attention: K/V travel from rank to rank while each rank's queries stay. Plain, double, and of one rank.

    chunk of the sequence    0  1  2  3  4  5  6  7
    held by rank             0  1  2  3  3  2  1  0         (zigzag of four ranks; others are in layouts.py)

    rank 1, forward          works on rank 1      sends rank 1's K/V on
                             works on rank 0      sends rank 0's K/V on
                             works on rank 3      sends rank 3's K/V on
                             works on rank 2
    backward, likewise       works on rank 1, one half
                             works on rank 0      gives rank 0 its gradients
                             works on rank 3      gives rank 3 its gradients
                             works on rank 2      gives rank 2 its gradients
                             works on rank 1, the other half

Who sees whom is the plan's to say (plan.py), and what travels when the program's (program/). This module computes the
tiles of each step, in the order of the program, and adds up what they give; messages are in exchange.py.

Note [Gradient of lse]
    The gradient of a score is p * (dout . v - dout . out + dlse), and kernels compute the middle term themselves, from
    the out and dout that they are given. With one more column in which v is 0, dout is 1 and out is -dlse, that term
    becomes dout . out - dlse, and nothing else changes but a column of dv that is thrown away.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.exchange import Gradients, KeyValues, Partial, Player, in_profiles
from mindspeed_cp.attention.sums import MergedOutput, TokenSum
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import RingCommunicators
from mindspeed_cp.kernels import (
    KERNELS,
    MERGE_KERNELS,
    BlockCase,
    BlockGradients,
    BlockKernel,
    BlockMask,
    BlockOutput,
    KernelRegistry,
    MaskKind,
    MergeKernel,
)
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.kernels.tiles import cut, is_turned, mask_kind
from mindspeed_cp.kernels.wrapped import turned
from mindspeed_cp.plan import AttentionPlan, Tile, joined
from mindspeed_cp.program import Phase, Program, Step, Transport, cheapest_transport, program
from mindspeed_cp.schedule import RingSchedule


@dataclass(frozen=True)
class RingAttention:
    """Attention whose keys and values are spread over the ranks of a ring.

    schedule: the grid of its ranks, 1 x 1 for a rank that is alone. communicators: None for that one. overlap: whether
    messages travel while a step is computed; the results are the same to the bit. kernels: what to choose from for each
    tile. merge_kernels: what to choose from for merging them, the preferred first. pieces: see Note [Pieces] in
    program/rotation.py; it divides the K/V heads. transport: how K/V travel; None is the cheapest for the plan at hand.
    """

    schedule: RingSchedule = RingSchedule(1, 1)  # noqa: RUF009  (it cannot be changed)
    communicators: RingCommunicators | None = None
    overlap: bool = False
    kernels: KernelRegistry = KERNELS
    merge_kernels: Sequence[MergeKernel] = MERGE_KERNELS
    pieces: int = 1
    transport: Transport | None = None

    @property
    def rank(self) -> int:
        """This rank's place in the ring."""
        return 0 if self.communicators is None else self.communicators.inner.rank

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention. plan: between the ranks of the ring."""
        out: Tensor = _Ring.apply(self, plan, terms, q, k, v, terms.visible)[0]
        return out

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention. plan: between the ranks of the ring."""
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
            out, lse = _Ring.apply(self, plan, terms, q, k, v, terms.visible)
            return out, lse
        # Room for the gradient of lse, see Note [Gradient of lse]; kernels that want one head size still get one.
        one_size = q.size(3) == v.size(3)
        q, k = (F.pad(x, (0, _ROOM)) for x in (q, k)) if one_size else (q, k)
        out, lse = _Ring.apply(self, plan, terms, q, k, F.pad(v, (0, _ROOM)), terms.visible)
        return out[..., : v.size(3)], lse

    def player(self, plan: AttentionPlan, phase: Phase, *, in_two: bool = True) -> Player:
        """How this rank plays the program of a pass. in_two: whether the own block may be done in two parts."""
        transport = self.transport or cheapest_transport(plan, self.schedule)
        steps = _program(plan, self.schedule, self.rank, phase, transport, self.pieces, in_two)
        return Player(steps, phase, self.schedule, self.communicators, self.overlap)


@functools.lru_cache(maxsize=256)
def _program(
    plan: AttentionPlan,
    schedule: RingSchedule,
    rank: int,
    phase: Phase,
    transport: Transport,
    pieces: int,
    in_two: bool,
) -> Program:
    """The program, made once for all layers of a batch, its tiles cut into what kernels take."""
    made = program(plan, schedule, rank, phase, transport=transport, pieces=pieces, in_two=in_two)
    steps = (step._replace(tiles=tuple(part for tile in step.tiles for part in cut(tile))) for step in made.steps)
    return replace(made, steps=tuple(steps))


_ROOM = 8
"""Columns that are added to the values for the gradient of lse: fused kernels read 16 bytes at once."""


class _Computed(NamedTuple):
    """What the forward pass keeps of a tile: the kernel that computed it, and that kernel's own state."""

    tile: Tile
    case: BlockCase
    kernel: BlockKernel
    state: tuple[Tensor, ...]


class _Ring(torch.autograd.Function):
    """Forward and backward pass over the ring; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any,
        ring: RingAttention,
        plan: AttentionPlan,
        terms: Terms,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with autocast_off(q.device.type):
            (out, lse, _), computed = _forward(ring, plan, terms, q, k, v)
        ctx.save_for_backward(q, k, v, visible, out, lse)
        ctx.ring, ctx.plan, ctx.scale, ctx.computed = ring, plan, terms.scale, computed
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out, lse = ctx.saved_tensors
        terms = Terms(ctx.scale, visible)
        dout, dlse = grad_outputs
        dout = torch.zeros_like(out) if dout is None else dout
        if dlse is not None:
            dout, out = _with_gradient_of_lse(dout, out, dlse)
        with autocast_off(q.device.type):
            gradients = _backward(ctx.ring, ctx.plan, terms, ctx.computed, dout, q, k, v, BlockOutput(out, lse))
        return None, None, None, *gradients, None


def _forward(
    ring: RingAttention, plan: AttentionPlan, terms: Terms, q: Tensor, k: Tensor, v: Tensor
) -> tuple[BlockOutput, dict[tuple[int, int | None], list[_Computed]]]:
    """The merged output over all steps and, by owner and piece, what the backward pass needs of each tile."""
    player = ring.player(plan, Phase.FORWARD)
    merged = MergedOutput.of(q, v, ring.merge_kernels)
    computed: dict[tuple[int, int | None], list[_Computed]] = {}
    key_values = KeyValues(player, k, v)

    def compute(step: Step, tile: Tile) -> _Computed:
        samples, heads, rows = _samples(tile), player.heads(step.piece, q.size(1)), tile.queries
        tensors = q[samples, heads, rows], *key_values.at(step, samples, tile.keys)
        mask = _mask(plan, terms, step.owner, tile, heads)
        case = BlockCase.of(*tensors, mask)
        kernel = _kernel(ring, tile, case)
        output = kernel.forward(*tensors, mask, terms.scale)
        merged.merge(output, rows, heads, samples)
        return _Computed(tile, case, kernel, output.state)

    for step in key_values.steps():
        if step.tiles:
            with in_profiles(player.name(step.owner)):
                done = [compute(step, tile) for tile in step.tiles]
            computed.setdefault((step.owner, step.piece), []).extend(done)
    return merged.result(), computed


def _backward(
    ring: RingAttention,
    plan: AttentionPlan,
    terms: Terms,
    computed: dict[tuple[int, int | None], list[_Computed]],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    merged: BlockOutput,
) -> BlockGradients:
    """Gradients of this rank's q, k and v, each rounded once."""
    player = ring.player(plan, Phase.BACKWARD)
    if not all(_takes(own, tile) for own, tile in _own_parts(player, computed)):
        player = ring.player(plan, Phase.BACKWARD, in_two=False)
    dq, gradients, key_values = TokenSum(q), Gradients(player, k, v), KeyValues(player, k, v)

    def compute(step: Step, tile: Tile) -> Partial:
        samples, heads, rows = of = _samples(tile), player.heads(step.piece, q.size(1)), tile.queries
        done = _done(computed[step.owner, step.piece], tile)
        grads = done.kernel.backward(
            *(dout[of], q[of], *key_values.at(step, samples, tile.keys)),
            BlockOutput(merged.out[of], merged.lse[of], done.state),
            _mask(plan, terms, step.owner, tile, heads),
            terms.scale,
        )
        dq.add(grads.dq, rows, heads, samples)
        return Partial(samples, tile.keys, grads.dk, grads.dv)

    for step in key_values.steps():
        partials: list[Partial] = []
        if step.tiles:
            with in_profiles(player.name(step.owner)):
                partials = [compute(step, tile) for tile in step.tiles]
        gradients.take(step, partials)
    return BlockGradients(dq.result(), *gradients.finish())


def _with_gradient_of_lse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """dout and out with which a kernel gives the gradients for `dlse` too, see Note [Gradient of lse]."""
    place = out.size(3) - _ROOM
    dout, out = dout.clone(), out.clone()
    dout[..., place] = 1.0
    out[..., place] = -dlse
    return dout, out


def _samples(tile: Tile) -> slice:
    return slice(None) if tile.sample is None else slice(tile.sample, tile.sample + 1)


def _kernel(ring: RingAttention, tile: Tile, case: BlockCase) -> BlockKernel:
    kernel = ring.kernels.choose(case)
    return turned(kernel) if is_turned(tile) and case.mask is MaskKind.TRIANGLE else kernel


def _done(computed: Sequence[_Computed], tile: Tile) -> _Computed:
    """The tile of the forward pass that this one is, or is a part of; state that kernels keep is good for parts too."""
    if (done := _holding(computed, tile)) is not None:
        return done
    raise AssertionError(f"{tile} was not computed in the forward pass")


def _holding(computed: Sequence[_Computed], tile: Tile) -> _Computed | None:
    for done in computed:
        queries, keys = done.tile.queries, done.tile.keys
        if done.tile.sample == tile.sample and _holds(queries, tile.queries) and _holds(keys, tile.keys):
            return done
    return None


def _own_parts(
    player: Player, computed: dict[tuple[int, int | None], list[_Computed]]
) -> Iterator[tuple[list[_Computed], Tile]]:
    """The tiles of the own block that a program has in parts, with what the forward pass has kept of that block."""
    own = computed.get((player.program.rank, None), [])
    whole = [done.tile for done in own]
    for step in player.program.steps:
        if step.owner == player.program.rank:
            yield from ((own, tile) for tile in step.tiles if tile not in whole)


def _takes(computed: Sequence[_Computed], part: Tile) -> bool:
    """Whether a part lies within one tile of the forward pass, and the kernel that computed that takes it too."""
    done = _holding(computed, part)
    if done is None:
        return False
    mask = done.case.mask if done.case.mask is MaskKind.ARBITRARY else mask_kind(part)
    case = done.case._replace(num_queries=part.num_queries, num_keys=part.num_keys, mask=mask)
    return not done.kernel.unsupported_reasons(case)


def _holds(whole: slice, part: slice) -> bool:
    return bool(whole.start <= part.start and part.stop <= whole.stop)


def _mask(plan: AttentionPlan, terms: Terms, owner: int, tile: Tile, heads: slice) -> BlockMask:
    """What a kernel is told of who sees whom in a tile: its window, or the part of a boolean mask that is about it."""
    if terms.visible is None:
        return BlockMask(mask_kind(tile))
    columns: list[slice] = []
    for run in joined(plan.keys.runs(owner)):
        first, last = max(tile.keys.start, run.start), min(tile.keys.stop, run.stop)
        if first < last:
            columns.append(slice(run.position + first - run.start, run.position + last - run.start))
    rows = terms.visible[..., tile.queries, :]
    if rows.dim() == 4 and rows.size(1) > 1:
        rows = rows[:, heads]
    if rows.dim() == 4 and rows.size(0) > 1:
        rows = rows[_samples(tile)]
    seen = torch.cat([rows[..., each] for each in columns], dim=-1)
    if mask_kind(tile) is MaskKind.TRIANGLE:
        ahead = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device)
        seen = seen & (ahead.triu() if is_turned(tile) else ahead.tril())
    return BlockMask(MaskKind.ARBITRARY, seen)
