"""Packed batches in Megatron's terms: from cu_seqlens, or documents in the mask's place, to who sees whom.

Two forms reach a layer:

    PackedSeqParams   one stream of documents (THD): tensors [T, ...] of this rank's tokens, cut by `Packing.layout`
    documents         [1 or B, n] int32 on the CPU where a mask would be: where each sample's documents begin and end,
                      filled up with S. Samples are cut as those without documents are, as a zigzag over the stream.

Shapes: B samples, S tokens of a whole sample, T tokens of a whole stream, n the most ends of a sample's documents.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mindspeed_cp.attention.planned import plan_of
from mindspeed_cp.batch import LayoutName, PackedBatch
from mindspeed_cp.documents import WindowSize, band_of
from mindspeed_cp.layouts import StreamLayout
from mindspeed_cp.plan import FULL, AttentionPlan, Band
from mindspeed_cp.sharding import places, positions, shard

Ends = tuple[int, ...]
"""Where documents begin and end: 0, and the end of each."""

FULL_WINDOW: WindowSize = (-1, -1)
CAUSAL_WINDOW: WindowSize = (-1, 0)

SEQUENCE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
"""What of Megatron's batches lies along the sequence, [B, S]; a mask does too, twice."""

_DIMS = {**dict.fromkeys(SEQUENCE_KEYS, 1), "attention_mask": 2}
"""By which dim samples are cut; a mask by the one of its queries."""


class _Numbers(NamedTuple):
    """What cu_seqlens hold. all: every number. ends: without what fills them up."""

    all: Ends
    ends: Ends

    @classmethod
    def read(cls, cu_seqlens: Tensor) -> "_Numbers":
        numbers = cu_seqlens.flatten().tolist()
        return cls(tuple(numbers), _without_empty(numbers))


@dataclass
class Packing:
    """How this job's packed streams are dealt to the context-parallel ranks, and the plans of those met lately.

    layout: of packed streams. "zigzag_by_document" is the rule of TransformerEngine, so that it fits batches that were
    cut by that; documents may be of any length.
    """

    layout: LayoutName = "zigzag_by_document"
    _last: StreamLayout | None = field(default=None, init=False, repr=False, compare=False)
    _read: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False, compare=False)

    def ends(self, cu_seqlens: Tensor) -> Ends:
        """Where the documents of a stream begin and end, without what fills it up.

        cu_seqlens: [n] or [1, n]. Read once: the host waits for a GPU that holds them. Made in inference mode they are
        read in every layer.
        """
        return self._numbers(cu_seqlens).ends

    def _numbers(self, cu_seqlens: Tensor) -> "_Numbers":
        if cu_seqlens.is_inference():
            # It may have changed since it was read, and does not say so.
            return _Numbers.read(cu_seqlens)
        known = self._read.get(cu_seqlens)
        if known is None or known[0] != cu_seqlens._version:
            known = cu_seqlens._version, _Numbers.read(cu_seqlens)
            self._read[cu_seqlens] = known
        numbers: _Numbers = known[1]
        return numbers

    def stream(self, cu_seqlens: Tensor, num_ranks: int) -> PackedBatch:
        """The stream of these documents over the ranks. cu_seqlens: with what pads documents, where that is."""
        return _stream(self.ends(cu_seqlens), num_ranks, self.layout)

    def stream_of(self, cu_seqlens: Tensor, rank: int, num_ranks: int, num_tokens: int) -> PackedBatch:
        """The same where a rank has so many tokens of it. Raises ValueError where it would have others."""
        stream = self.stream(cu_seqlens, num_ranks)
        if (expected := stream.layout.num_tokens(rank)) != num_tokens:
            raise ValueError(
                f"cu_seqlens ends at {stream.layout.length}, which gives rank {rank} of {num_ranks} {expected} tokens, "
                f"and {num_tokens} came; let the last document, or what pads it, end where the stream does, and cut "
                f"the batch by megatron_adaptor.shard_batch."
            )
        self._last = stream.layout
        return stream

    @property
    def is_unequal(self) -> bool:
        """Whether ranks have unequal numbers of tokens of the stream that was attended to last."""
        return self._last is not None and sum(self._last.samples[0]) % self._last.num_ranks > 0

    def cut(self, batch: dict[str, Any], cu_seqlens: Tensor, rank: int, num_ranks: int) -> None:
        """Replace what lies along the stream by this rank's tokens. batch: tensors [1, T] by name, or None.

        Raises ValueError where the documents end elsewhere than the stream.
        """
        layout = self.stream(cu_seqlens, num_ranks).layout
        whole = {name: batch[name] for name in SEQUENCE_KEYS if batch.get(name) is not None}
        for name, tensor in whole.items():
            if layout.length != tensor.size(1):
                raise ValueError(
                    f"cu_seqlens ends at {layout.length}, and the stream has {tensor.size(1)} tokens; let the last "
                    f"document, or what pads it, end where the stream does."
                )
            batch[name] = shard(tensor, layout, rank, 1)

    def plan(self, packed: Any, num_tokens: int, rank: int, num_ranks: int, window: WindowSize) -> AttentionPlan:
        """Who sees whom in a stream. packed: Megatron's PackedSeqParams. num_tokens: of this rank.

        Raises ValueError for what is no packed stream of self-attention.
        """
        cu_seqlens, lengths = ends_with_padding(packed), packed.cu_seqlens_q
        stream = self.stream_of(cu_seqlens, rank, num_ranks, num_tokens)
        if window[1] == 0 or lengths is cu_seqlens:
            # What pads a document comes after it, and no token of it sees that causally.
            return plan_of_window(stream.layout, window)
        return _plan_of_padded(stream, window, self._numbers(lengths).all, self._numbers(cu_seqlens).all)

    def is_cut_as_sample(self, packed: Any, rank: int, num_ranks: int) -> bool:
        """Whether the rank holds the same tokens of a stream as of a sample of that length: where it is one document.

        packed: Megatron's PackedSeqParams.
        """
        layout = self.stream(ends_with_padding(packed), num_ranks).layout
        held = (places(each, rank) for each in (layout, layout_of_length(layout.length, num_ranks)))
        return torch.equal(*held)

    def longest(self, cu_seqlens: Tensor) -> int:
        """Tokens of the longest document of a stream."""
        return max((stop - start for start, stop in pairwise(self.ends(cu_seqlens))), default=0)

    def num_positions(self, packed: Any) -> int:
        """How many positions there are embeddings for. packed: Megatron's PackedSeqParams of a stream.

        A program's max_seqlen may leave out what pads the documents, or be wrong; the stream's own length is Megatron's
        way to say that positions run on over it.
        """
        said = [int(each) for each in (packed.max_seqlen_q, packed.max_seqlen_kv) if each is not None]
        return max(*said, self.longest(ends_with_padding(packed)), 1)

    def positions(self, cu_seqlens: Tensor, rank: int, num_ranks: int, like: Tensor, num_embeddings: int) -> Tensor:
        """Place of each of a rank's tokens in its document: [t] int64.

        Over the whole stream where there are embeddings for as many: Megatron's way to say that positions run on.
        like: [t, ...], a tensor of these tokens, on the device that is wanted.
        """
        layout = self.stream_of(cu_seqlens, rank, num_ranks, like.size(0)).layout
        return _positions(layout, rank, like.device, layout.length == num_embeddings)


@dataclass
class PaddingCount:
    """Tokens of the packed streams that this rank has been given a part of, since they were last asked for.

    log_interval: iterations between two questions.
    """

    log_interval: int
    _tokens: int = 0
    _padding: int = 0

    def add(self, num_tokens: int, padding: int) -> None:
        """A stream of so many tokens, and how many of them pad its documents."""
        self._tokens += num_tokens
        self._padding += padding

    def take(self) -> str:
        """The number in words; counting starts anew."""
        said = f" padding tokens: {self._padding} of {self._tokens} in the packed streams of this data-parallel rank"
        self._tokens = self._padding = 0
        return said


def is_documents(mask: Tensor) -> bool:
    """Whether what comes where a mask would be is documents of samples."""
    return mask.dtype == torch.int32 and mask.dim() == 2


def plan_of_documents(documents: Tensor, num_ranks: int, window: WindowSize) -> AttentionPlan:
    """Who sees whom in samples that are cut as a zigzag over each. documents: see above."""
    samples = _samples(tuple(map(_without_empty, documents.tolist())), num_ranks)
    return plan_of_window(samples.layout, window)


def plan_of_window(layout: StreamLayout, window: WindowSize) -> AttentionPlan:
    """Who sees whom where all documents have one window."""
    return plan_of(layout, (band_of(window),))


def cut_samples(batch: dict[str, Any], cut: Callable[[Tensor, int], Tensor]) -> None:
    """Replace whole samples by this rank's tokens. batch: Megatron's tensors by name, or None. cut: of a tensor, along
    a dim.
    """
    for name, dim in _DIMS.items():
        if batch.get(name) is not None:
            batch[name] = cut(batch[name], dim)


def layout_of_length(num_tokens: int, num_ranks: int) -> StreamLayout:
    """How a sample of any length is cut as a zigzag over the ranks."""
    return _samples(((0, num_tokens),), num_ranks).layout


@functools.lru_cache(maxsize=32)
def _samples(ends: tuple[Ends, ...], num_ranks: int) -> PackedBatch:
    return PackedBatch.from_cu_seqlens(ends, num_ranks, layout="zigzag")


@functools.lru_cache(maxsize=32)
def _stream(ends: Ends, num_ranks: int, layout: LayoutName) -> PackedBatch:
    return PackedBatch.from_cu_seqlens(ends, num_ranks, layout=layout)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _positions(layout: StreamLayout, rank: int, device: torch.device, over_stream: bool) -> Tensor:
    """Made once for all layers."""
    return (places(layout, rank, device) if over_stream else positions(layout, rank, device))[0]


@functools.lru_cache(maxsize=64)
def _plan_of_padded(batch: PackedBatch, window: WindowSize, cu_seqlens: Ends, padded: Ends) -> AttentionPlan:
    """Under a mask that looks ahead: what pads a document is not seen."""
    band = band_of(window)
    ends = zip(pairwise(cu_seqlens), pairwise(padded), strict=True)
    both = [(stop - start, end - begin) for (start, stop), (begin, end) in ends]
    for number, (length, whole) in enumerate(both):
        if not 0 <= length <= whole:
            raise ValueError(
                f"document {number} has {length} tokens by cu_seqlens and {whole} by cu_seqlens_padded, which counts "
                f"its padding too; give its tokens in the one, and as many or more in the other."
            )
    lengths = [length for length, whole in both if whole]
    seen: dict[int, tuple[Band, ...]] = {
        number: (band._replace(keys=(0, length)),) if length else () for number, length in enumerate(lengths)
    }
    return AttentionPlan(batch.layout, batch.layout, FULL, seen)


def _without_empty(ends: list[int]) -> Ends:
    """Documents of no tokens left out, such as those that fill a row up."""
    return tuple(end for number, end in enumerate(ends) if number == 0 or end != ends[number - 1])


def is_stream(packed: Any) -> bool:
    """Whether Megatron's PackedSeqParams say where the documents of a stream end; those of other formats need not."""
    return packed.qkv_format == "thd" and packed.cu_seqlens_q is not None


def ends_with_padding(packed: Any) -> Tensor:
    """Where the documents of a stream begin and end, with what pads them: the stream is cut by that.

    packed: Megatron's PackedSeqParams. Raises ValueError for what is no packed stream of self-attention.
    """
    if packed.qkv_format != "thd" or getattr(packed, "local_cp_size", None) is not None:
        raise ValueError(
            f"PackedSeqParams with qkv_format={packed.qkv_format!r} and "
            f"local_cp_size={getattr(packed, 'local_cp_size', None)}: packed streams are 'thd', over all "
            f"context-parallel ranks; documents with ranks of their own need --hybrid-context-parallel."
        )
    for name in ("cu_seqlens_q", "cu_seqlens_q_padded"):
        of_queries, of_keys = (getattr(packed, each) for each in (name, name.replace("_q", "_kv")))
        if of_queries is not of_keys and not _equal(of_queries, of_keys):
            raise ValueError(f"PackedSeqParams has other {name} than {name.replace('_q', '_kv')}; give both the same.")
    if packed.cu_seqlens_q is None:
        raise ValueError("PackedSeqParams without cu_seqlens_q: nothing says where documents end; give it.")
    padded: Tensor | None = packed.cu_seqlens_q_padded
    if padded is not None and padded.numel() != packed.cu_seqlens_q.numel():
        raise ValueError(
            f"PackedSeqParams has {packed.cu_seqlens_q.numel()} numbers in cu_seqlens_q and {padded.numel()} in "
            f"cu_seqlens_q_padded; give both where each document begins, and where the last ends."
        )
    cu_seqlens: Tensor = packed.cu_seqlens_q if padded is None else padded
    return cu_seqlens


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)
