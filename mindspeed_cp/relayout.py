"""From one layout to another: each rank's tokens go to the ranks that hold them there, in one all-to-all.

Layers with a recurrence need contiguous shards beside the balanced ones of attention, for instance. All ranks agree on
what they have come with before shards are sent, see Note [Agreement] in comm/agreement.py: `communicator.apart` counts
these bytes, 8 to each rank.

Shapes: B samples, s and t tokens of a rank in the source and in the target.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm import AgreeingCommunicator, Agreement, Communicator, Sizes, Subject
from mindspeed_cp.layouts import StreamLayout
from mindspeed_cp.sharding import CPU, check_dim, check_layout, check_tensor, order, places, restore

_SUBJECT = Subject(
    "relayout or gather",
    "give shards of one dtype and shape, but for the tokens, by the same layouts, and gradients on all or none",
)


def relayout(
    shard: Tensor,
    source: StreamLayout,
    target: StreamLayout,
    communicator: AgreeingCommunicator,
    dim: int,
    *,
    batch_dim: int = 0,
) -> Tensor:
    """This rank's shard by `target` from its shard by `source`; differentiable, with the way back as its gradient.

    shard: any shape and dtype, s tokens along `dim`. batch_dim: where the samples are; read only if each has documents
    of its own. communicator: of the ranks of both layouts, in their order; all of them call. A token is sent only where
    another rank holds it, and once. Returns t tokens along `dim`.

    Raises ValueError, on every rank and before any shard is sent, where on one of them the layouts are of other streams
    or ranks, or the shard is none of `source`; and where ranks have come with other layouts, dtypes or shapes.
    """
    _agree("relayout", shard, (source, target), communicator, dim, batch_dim)
    if source == target:
        return shard
    moved: Tensor = _Relayout.apply(shard, source, target, communicator, dim % shard.dim(), batch_dim % shard.dim())
    return moved


def gather(
    shard: Tensor, layout: StreamLayout, communicator: AgreeingCommunicator, dim: int, *, batch_dim: int = 0
) -> Tensor:
    """All tokens in order, on every rank, from each rank's shard; without a gradient.

    shard, communicator: as for `relayout`. One all-gather, of shards as long as the longest.

    Raises ValueError as `relayout` does.
    """
    _agree("gather", shard, (layout,), communicator, dim, batch_dim)
    tokens = [layout.num_tokens(rank) for rank in range(layout.num_ranks)]
    first = shard.detach().movedim(dim, 0)
    filled = first.new_zeros((max(tokens), *first.shape[1:]))
    filled[: first.size(0)] = first
    shards = communicator.all_gather(filled)
    whole = torch.cat([part[:length] for part, length in zip(shards, tokens, strict=True)])
    return restore(whole.movedim(0, dim), layout, dim, batch_dim=batch_dim)


def _agree(
    call: str,
    shard: Tensor,
    layouts: tuple[StreamLayout, ...],
    communicator: AgreeingCommunicator,
    dim: int,
    batch_dim: int,
) -> None:
    """Return when all ranks have come to the same call, each with its shard by the first of these layouts."""
    if not hasattr(communicator, "apart"):
        raise ValueError(f"communicator is a {type(communicator).__name__}; give ProcessGroupCommunicator(group).")
    words, refusal = "", None
    try:
        _check_layouts(layouts, communicator.size)
        _check_shard(shard, layouts, communicator.rank, dim, batch_dim)
        words = f"{call} of {_words(shard, layouts, dim, batch_dim)}"
        words += " with gradients" * (call == "relayout" and torch.is_grad_enabled() and shard.requires_grad)
    except Exception as error:
        # Whatever it is, the other ranks would wait for this one.
        refusal = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    agreement = Agreement(communicator.apart, on_host=communicator.on_host, subject=_SUBJECT)
    agreement.reach(words, refusal=refusal, device=getattr(shard, "device", None))


def _check_layouts(layouts: tuple[StreamLayout, ...], num_ranks: int) -> None:
    """Raise ValueError unless these are layouts of one batch over so many ranks."""
    for layout in layouts:
        check_layout(layout)
    samples, lengths = _num_samples(*layouts), {sum(each.samples[0]) for each in layouts}
    if (
        len(lengths) == 1
        and {len(each.samples) for each in layouts} <= {1, samples}
        and {each.num_ranks for each in layouts} == {num_ranks}
    ):
        return
    given = " and ".join(map(_said, layouts))
    are_no = "is no layout of a batch" if len(layouts) == 1 else "are no two layouts of one batch"
    those = "one that is, or its own group" if len(layouts) == 1 else "those, and the group that both are over"
    raise ValueError(f"{given} over a group of {num_ranks} {are_no} on it; give {those}.")


def _check_shard(shard: Tensor, layouts: tuple[StreamLayout, ...], rank: int, dim: int, batch_dim: int) -> None:
    """Raise ValueError unless this is the rank's shard by the first of these layouts."""
    check_tensor(shard)
    check_dim(shard, dim, "tokens")
    tokens, samples = layouts[0].num_tokens(rank), _num_samples(*layouts)
    if samples > 1:
        check_dim(shard, batch_dim, "samples")
    wrong_batch = samples > 1 and (shard.size(batch_dim) != samples or (batch_dim - dim) % shard.dim() == 0)
    if shard.size(dim) != tokens or wrong_batch:
        raise ValueError(
            f"rank {rank} has a shard of {tuple(shard.shape)}, and the source layout gives it {tokens} tokens of "
            f"{samples} samples along dims {dim} and {batch_dim}; give a shard of that layout."
        )


def _words(shard: Tensor, layouts: tuple[StreamLayout, ...], dim: int, batch_dim: int) -> str:
    """What has to be the same on all ranks of a call, for messages and for comparing."""
    shape: list[object] = list(shard.shape)
    shape[dim] = "tokens"
    if _num_samples(*layouts) > 1:
        shape[batch_dim] = f"{shape[batch_dim]} samples"
    dtype = str(shard.dtype).removeprefix("torch.")
    ways = " to ".join(f"{_said(each)} ({_digest(each)})" for each in layouts)
    return f"({', '.join(map(str, shape))}) {dtype} on {shard.device.type}, by {ways}"


@functools.lru_cache(maxsize=8)
def _digest(layout: StreamLayout) -> str:
    """In short what a layout is made of, which its repr says."""
    return hashlib.blake2b(repr(layout).encode(), digest_size=8).hexdigest()


def _num_samples(*layouts: StreamLayout) -> int:
    """Samples that are cut each in its own way; 1 where all are cut alike."""
    return max(len(each.samples) for each in layouts)


def _said(layout: StreamLayout) -> str:
    return (
        f"{type(layout).__name__} of {sum(layout.samples[0])} tokens of {len(layout.samples)} samples on "
        f"{layout.num_ranks} ranks"
    )


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
