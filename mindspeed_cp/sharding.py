"""Tensors cut into the shards of context-parallel ranks by any layout, and put together again.

Shapes: B samples, S tokens of a whole sample, s tokens of one rank. Index tensors are [1, s] where all samples are cut
alike, else [B, s]. They are made once for each layout, rank and device; equal layouts share them. They serve training
too where inference mode was on when they were made.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mindspeed_cp.layouts import EqualChunks, StreamLayout, integer, no_rank

CPU = torch.device("cpu")
IGNORE_INDEX = -100
"""The label that torch's cross entropy leaves out by default."""


def shard(tensor: Tensor, layout: StreamLayout, rank: int, dim: int, *, batch_dim: int = 0) -> Tensor:
    """Those tokens of `tensor` that `rank` holds, as a new contiguous tensor; differentiable.

    tensor: any shape, whole samples along `dim`. batch_dim: where the samples are; read only if each has documents of
    its own. Raises ValueError where tensor and layout differ in tokens or samples, and for a rank that is none of it.
    """
    check_layout(layout)
    _check(tensor, layout, dim, batch_dim)
    return _select(tensor, places(layout, _rank_of(rank, layout), tensor.device), dim, batch_dim)


def restore(shards: Tensor | Sequence[Tensor], layout: StreamLayout, dim: int, *, batch_dim: int = 0) -> Tensor:
    """All tokens in order, the inverse of `shard`. shards: of ranks 0 to P-1, or these concatenated along `dim`.

    Raises ValueError where shards have other lengths than the layout gives their ranks, or are not all alike. Shards of
    one length in another order than that of the ranks cannot be told from these.
    """
    check_layout(layout)
    together = shards if isinstance(shards, Tensor) else _concatenated(shards, layout, dim)
    _check(together, layout, dim, batch_dim)
    return _select(together, _inverse_order(layout, together.device), dim, batch_dim)


def positions(layout: StreamLayout, rank: int, device: torch.device | str = CPU) -> Tensor:
    """Position of each of a rank's tokens in its document: [1 or B, s] int64."""
    rank = _rank_of(rank, layout)
    return _runs_spread(layout, rank, [run.position - run.start for run in layout.runs(rank)]).to(device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def places(layout: StreamLayout, rank: int, device: torch.device | str = CPU) -> Tensor:
    """Place of each of a rank's tokens in its sample's stream: [1 or B, s] int64."""
    starts = _document_starts(layout)
    offsets = [starts[run.document] + run.position - run.start for run in layout.runs(rank)]
    return _runs_spread(layout, rank, offsets).to(device)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def order(layout: StreamLayout, device: torch.device | str = CPU) -> Tensor:
    """Place of each token in its sample's stream, rank after rank: [1 or B, S] int64."""
    return torch.cat([places(layout, rank, device) for rank in range(layout.num_ranks)], dim=1)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def has_next(layout: StreamLayout, device: torch.device | str = CPU) -> Tensor:
    """Whether a token of the stream is followed by one of its own document, and is no padding: [1 or B, S] bool."""
    follows = []
    for documents in layout.samples:
        lengths = torch.tensor(documents, dtype=torch.int64)
        last = lengths.cumsum(0)[lengths > 0] - 1
        is_text = torch.arange(len(documents)) % (2 if layout.padded else 1) == 0
        follows.append(is_text.repeat_interleave(lengths).index_fill(0, last, False))
    return torch.stack(follows).to(device)


def shift_labels(tokens: Tensor, layout: StreamLayout, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The label of each token of the stream, which is the next one of its document; `ignore_index` for the last.

    tokens: [B, S] of an integer dtype, whole samples. To be shifted before it is sharded: the next token may be held by
    another rank. Returns [B, S]. Raises ValueError for other tokens, and where their dtype cannot hold `ignore_index`.
    """
    check_tensor(tokens)
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} of {tokens.dtype} have no labels; give token ids [B, S] of an integer dtype."
        )
    held = torch.iinfo(tokens.dtype)
    if (ignored := integer(ignore_index)) is None or not held.min <= ignored <= held.max:
        raise ValueError(
            f"ignore_index={ignore_index!r} is no integer that tokens of {tokens.dtype} hold, {held.min} to "
            f"{held.max}; give one, or tokens.long()."
        )
    _check(tokens, layout, dim=1, batch_dim=0)
    return tokens.roll(-1, dims=1).masked_fill(~has_next(layout, tokens.device), ignored)


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """Assignment of sequence chunks to the `size` ranks of a context-parallel group, for sequences of any length.

    size: number of ranks P.
    kind: "zigzag" (see Note [Zigzag]) or "contiguous" (rank r holds the r-th of P equal parts); one rank holds the
        sequence as it is with either, of any length.
    """

    size: int
    kind: Literal["zigzag", "contiguous"] = "zigzag"

    def __post_init__(self) -> None:
        EqualChunks(self.size, 0, self.kind)

    def of(self, tokens: int) -> EqualChunks:
        """Who holds what, so many tokens each. Raises ValueError where the chunks do not divide them."""
        return EqualChunks(self.size, tokens, self.kind if self.size > 1 else "contiguous")

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks that one rank holds."""
        return self.of(0).chunks_per_rank

    @property
    def num_chunks(self) -> int:
        """Number of equal chunks that the whole sequence is cut into; it must divide the sequence length."""
        return self.size * self.chunks_per_rank

    def shard(self, sequence: Tensor, rank: int, dim: int) -> Tensor:
        """Tokens of `sequence` that `rank` holds, as a new contiguous tensor.

        sequence: any shape, the whole sequence along `dim`. Raises ValueError if its length is not a multiple of
        `num_chunks`.
        """
        return shard(sequence, self._layout(sequence, dim), rank, dim)

    def restore(self, shards: Tensor, dim: int) -> Tensor:
        """The sequence in order, from the shards of ranks 0 to P-1 concatenated along `dim`: the inverse of `shard`."""
        return restore(shards, self._layout(shards, dim), dim)

    def _layout(self, sequence: Tensor, dim: int) -> EqualChunks:
        check_tensor(sequence)
        check_dim(sequence, dim, "tokens")
        length = sequence.size(dim)
        if length % self.num_chunks:
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into the {self.num_chunks} equal chunks that the "
                f"{self.kind} layout of {self.size} ranks needs; pad it to a multiple of {self.num_chunks}."
            )
        return self.of(length // self.size)


def _runs_spread(layout: StreamLayout, rank: int, offsets: list[int]) -> Tensor:
    """For each of a rank's tokens its number plus the offset of its run: [1 or B, s]."""
    lengths = torch.tensor([run.stop - run.start for run in layout.runs(rank)], dtype=torch.int64)
    spread = torch.tensor(offsets, dtype=torch.int64).repeat_interleave(lengths)
    return spread.view(len(layout.samples), -1) + torch.arange(layout.num_tokens(rank))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _inverse_order(layout: StreamLayout, device: torch.device) -> Tensor:
    """Where, rank after rank, each token of the stream is: [1 or B, S]."""
    return order(layout, device).argsort(dim=1)


def _document_starts(layout: StreamLayout) -> list[int]:
    """Where each document begins in its sample's stream, by its number."""
    starts = []
    for documents in layout.samples:
        place = 0
        for length in documents:
            starts.append(place)
            place += length
    return starts


def _select(tensor: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """The tokens at these places of each sample. index: [1 or B, n]."""
    if index.size(0) == 1:
        return tensor.index_select(dim, index[0]).contiguous()
    samples = tensor.movedim((batch_dim, dim), (0, 1))
    begins = torch.arange(index.size(0), device=index.device).unsqueeze(1) * samples.size(1)
    picked = samples.flatten(0, 1).index_select(0, (index + begins).flatten())
    sharded: Tensor = picked.unflatten(0, index.shape)
    return sharded.movedim((0, 1), (batch_dim, dim)).contiguous()


def _concatenated(shards: Sequence[Tensor], layout: StreamLayout, dim: int) -> Tensor:
    if not isinstance(shards, Iterable):
        check_tensor(shards)
    given = tuple(shards)
    if len(given) != layout.num_ranks:
        raise ValueError(
            f"{len(given)} shards are given, and the layout deals to {layout.num_ranks} ranks; give one of each rank."
        )
    for rank, each in enumerate(given):
        check_tensor(each)
        check_dim(each, dim, "tokens")
        if each.size(dim) != layout.num_tokens(rank):
            raise ValueError(
                f"shards[{rank}] {tuple(each.shape)} has {each.size(dim)} tokens along dim {dim}, and the layout gives "
                f"rank {rank} {layout.num_tokens(rank)}; give the shards by this layout, in the order of the ranks."
            )
        if _but_tokens(each, dim) != _but_tokens(given[0], dim):
            raise ValueError(
                f"shards[{rank}] is {tuple(each.shape)} {each.dtype} on {each.device}, and shards[0] "
                f"{tuple(given[0].shape)} {given[0].dtype} on {given[0].device}; give shards that differ in "
                f"tokens alone."
            )
    return torch.cat(given, dim=dim)


def _but_tokens(shard: Tensor, dim: int) -> tuple[object, ...]:
    return shard.movedim(dim, 0).shape[1:], shard.dtype, shard.device


def _rank_of(rank: object, layout: StreamLayout) -> int:
    """The rank as an integer. Raises ValueError where it is none of the layout's."""
    number = integer(rank)
    if number is None or not 0 <= number < layout.num_ranks:
        raise ValueError(no_rank(rank, layout.num_ranks))
    return number


def check_tensor(tensor: object) -> None:
    """Raise ValueError for what is no tensor."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a {type(tensor).__name__} is given in place of a tensor; give torch.as_tensor(...) of it.")


def check_layout(layout: object) -> None:
    """Raise ValueError for what is no layout of whole streams."""
    if hasattr(layout, "samples") and hasattr(layout, "num_ranks"):
        return
    way_out = "one of mindspeed_cp.layouts"
    if isinstance(layout, SequenceLayout):
        way_out = "layout.of(tokens of a rank)"
    elif hasattr(getattr(layout, "layout", None), "samples"):
        way_out = "batch.layout"
    raise ValueError(f"a {type(layout).__name__} is given in place of a layout; give {way_out}.")


def check_dim(tensor: Tensor, dim: int, name: str) -> None:
    """Raise ValueError unless the tensor has this dim. name: what is along it."""
    number = integer(dim)
    if number is None or not -tensor.dim() <= number < tensor.dim():
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} has {tensor.dim()} dims, and none is {dim!r}; give the dim of its "
            f"{name}."
        )


def _check(tensor: Tensor, layout: StreamLayout, dim: int, batch_dim: int) -> None:
    """Raise ValueError unless these are whole samples of the layout."""
    tokens, samples = sum(layout.samples[0]), len(layout.samples)
    check_tensor(tensor)
    check_dim(tensor, dim, "tokens")
    if samples > 1:
        check_dim(tensor, batch_dim, "samples")
    if tensor.size(dim) != tokens:
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} has {tensor.size(dim)} tokens along dim {dim}, and the documents have "
            f"{tokens}; give whole samples, and the dim of their tokens."
        )
    if samples > 1 and (tensor.size(batch_dim) != samples or (batch_dim - dim) % tensor.dim() == 0):
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} has {tensor.size(batch_dim)} samples along dim {batch_dim}, and the "
            f"layout has documents for {samples}; give the batch that it was made for, and the dim of its samples."
        )
