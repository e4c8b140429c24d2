"""From one layout to another: each rank's tokens go to the ranks that hold them there, in one all-to-all.

Layers with a recurrence need contiguous shards beside the balanced ones of attention, for instance.

Shapes: B samples, s and t tokens of a rank in the source and in the target.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm import Communicator, Sizes
from mindspeed_cp.layouts import StreamLayout
from mindspeed_cp.sharding import CPU, order, places, restore


def relayout(
    shard: Tensor,
    source: StreamLayout,
    target: StreamLayout,
    communicator: Communicator,
    dim: int,
    *,
    batch_dim: int = 0,
) -> Tensor:
    """This rank's shard by `target` from its shard by `source`; differentiable, with the way back as its gradient.

    shard: any shape and dtype, s tokens along `dim`. batch_dim: where the samples are; read only if each has documents
    of its own. communicator: of the ranks of both layouts, in their order; all of them call. A token is sent only where
    another rank holds it, and once. Returns t tokens along `dim`.

    Raises ValueError where the layouts are of other streams or ranks, or the shard is none of `source`.
    """
    lengths, samples = {sum(each.samples[0]) for each in (source, target)}, _num_samples(source, target)
    one_each = {len(source.samples), len(target.samples)} <= {1, samples}
    if len(lengths) > 1 or not one_each or {source.num_ranks, target.num_ranks} != {communicator.size}:
        raise ValueError(
            f"{_said(source)} and {_said(target)} over a group of {communicator.size} are no two layouts of one batch; "
            f"give those, and the group that both are over."
        )
    tokens = source.num_tokens(communicator.rank)
    if shard.size(dim) != tokens or (samples > 1 and shard.size(batch_dim) != samples):
        raise ValueError(
            f"rank {communicator.rank} has a shard of {tuple(shard.shape)}, and the source layout gives it {tokens} "
            f"tokens of {samples} samples along dims {dim} and {batch_dim}; give a shard of that layout."
        )
    if source == target:
        return shard
    moved: Tensor = _Relayout.apply(shard, source, target, communicator, dim % shard.dim(), batch_dim % shard.dim())
    return moved


def gather(shard: Tensor, layout: StreamLayout, communicator: Communicator, dim: int, *, batch_dim: int = 0) -> Tensor:
    """All tokens in order, on every rank, from each rank's shard; without a gradient.

    shard, communicator: as for `relayout`. One all-gather, of shards as long as the longest.
    """
    tokens = [layout.num_tokens(rank) for rank in range(layout.num_ranks)]
    first = shard.detach().movedim(dim, 0)
    filled = first.new_zeros((max(tokens), *first.shape[1:]))
    filled[: first.size(0)] = first
    shards = communicator.all_gather(filled)
    whole = torch.cat([part[:length] for part, length in zip(shards, tokens, strict=True)])
    return restore(whole.movedim(0, dim), layout, dim, batch_dim=batch_dim)


def _num_samples(first: StreamLayout, second: StreamLayout) -> int:
    """Samples that are cut each in its own way; 1 where all are cut alike."""
    return max(len(first.samples), len(second.samples))


def _said(layout: StreamLayout) -> str:
    return f"{sum(layout.samples[0])} tokens of {len(layout.samples)} samples on {layout.num_ranks} ranks"


class _Relayout(torch.autograd.Function):
    """`_move`, whose gradient moves back."""

    @staticmethod
    def forward(
        ctx: Any,
        shard: Tensor,
        source: StreamLayout,
        target: StreamLayout,
        communicator: Communicator,
        dim: int,
        batch_dim: int,
    ) -> Tensor:
        ctx.arguments = target, source, communicator, dim, batch_dim
        return _move(shard, source, target, communicator, dim, batch_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _move(grad, *ctx.arguments), None, None, None, None, None


@dataclass(frozen=True)
class _Moves:
    """What a rank sends to each, and receives from each, itself included.

    leaving: its tokens, sample after sample, in the order of the ranks that they go to. arriving: for each token that
    it will hold, sample after sample, its place among those that come, in the order of the ranks. sizes: how many go to
    each, and come from each. Between two ranks tokens go in the order of the stream.
    """

    leaving: Tensor
    arriving: Tensor
    sizes: Sizes


def _move(
    shard: Tensor, source: StreamLayout, target: StreamLayout, communicator: Communicator, dim: int, batch_dim: int
) -> Tensor:
    moves = _moves(source, target, communicator.rank, shard.device)
    by_sample = _num_samples(source, target) > 1
    dims, to = ((batch_dim, dim), (0, 1)) if by_sample else ((dim,), (0,))
    tokens = shard.movedim(dims, to)
    leaving = (tokens.flatten(0, 1) if by_sample else tokens).index_select(0, moves.leaving)
    arrived = communicator.all_to_all(leaving, moves.sizes)
    held = arrived.index_select(0, moves.arriving)
    if by_sample:
        held = held.unflatten(0, (_num_samples(source, target), -1))
    return held.movedim(to, dims).contiguous()


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _moves(source: StreamLayout, target: StreamLayout, rank: int, device: torch.device) -> _Moves:
    leaving, sent = _by_peer(source, target, rank)
    arriving, received = _by_peer(target, source, rank)
    return _Moves(leaving.to(device), arriving.argsort().to(device), Sizes(sent, received))


def _by_peer(layout: StreamLayout, other: StreamLayout, rank: int) -> tuple[Tensor, tuple[int, ...]]:
    """A rank's tokens by `layout` in the order of the ranks that hold them in `other`, and how many each holds."""
    samples = _num_samples(layout, other)
    held = places(layout, rank).expand(samples, -1)
    holders = _holders(other).expand(samples, -1).gather(1, held).flatten()
    counts = torch.bincount(holders, minlength=other.num_ranks)
    return holders.argsort(stable=True), tuple(counts.tolist())


@functools.lru_cache(maxsize=8)
def _holders(layout: StreamLayout) -> Tensor:
    """The rank that holds each token of the stream: [1 or B, S]."""
    in_order = order(layout, CPU)
    tokens = torch.tensor([layout.num_tokens(rank) for rank in range(layout.num_ranks)])
    ranks = torch.arange(layout.num_ranks).repeat_interleave(tokens).expand_as(in_order)
    return torch.empty_like(in_order).scatter_(1, in_order, ranks)
