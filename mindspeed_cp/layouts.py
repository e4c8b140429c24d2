"""Who holds what: makers of a rank's runs, for plans. Integers and slices; no torch.

Every layout takes any number of tokens, from fewer than ranks up, in documents of any length, which may differ from
sample to sample; a rank holds as many tokens of each sample. Four rules:

    Contiguous      a rank holds one stretch of the stream
    Zigzag          an early and a late stretch of the stream, see Note [Zigzag]
    DocumentZigzag  an early and a late stretch of each document
    Balanced        documents, whole or in stretches, so that all compute as much: Note [Balance] in balance.py

EqualChunks, Megatron's own sharding, is the one for streams that chunks of one length divide.

Note [Zigzag]
    Under a causal mask the last tokens see the most keys. A sequence is therefore cut into 2P chunks for P ranks, and
    rank r holds chunks r and 2P-1-r; every rank then has the same work. For P = 4:

        chunk   0  1  2  3  4  5  6  7
        rank    0  1  2  3  3  2  1  0

    This is Megatron's own sharding (PyTorch calls it head-tail, TransformerEngine DualChunkSwap), and every algorithm
    here works on it, so that neither the data loader nor the rotary embedding has to know which algorithm runs. Over
    packed documents the work is the same only where each document is cut so.
    Source: Llama 3, arXiv:2407.21783, section 3.3.2; zhuzilin/ring-flash-attention.
"""

import functools
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, Protocol

from mindspeed_cp.balance import Area, Stretch, deal
from mindspeed_cp.plan import CAUSAL, Band, Layout, Run, causal_pairs, pairs_seen


class StreamLayout(Layout, Protocol):
    """A layout of whole streams: what tensors are sharded by."""

    @property
    def samples(self) -> tuple[tuple[int, ...], ...]:
        """Lengths of the documents that make up each sample's stream; one entry where all samples are alike."""
        ...

    @property
    def padded(self) -> bool:
        """Whether documents and what pads them alternate."""
        ...

    def __hash__(self) -> int:
        """Equal layouts share what is made of them."""
        ...


@dataclass(frozen=True)
class PackedLayout(ABC):
    """Samples of packed documents over ranks.

    num_ranks: P. samples: the lengths of each sample's documents; one entry serves all samples of a batch, else each
    has its own and all are of one length. Documents are numbered through all samples (Run.document). tokens: of a
    sample on each rank; by default as many on each, the first ranks having one more where P does not divide them.
    padded: whether documents and what pads them alternate. Padding is a document of its own, which may be empty.

    Raises ValueError where samples differ in length, documents have none, or tokens do not make up a sample.
    """

    num_ranks: int
    samples: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...] | None = None
    padded: bool = False

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or not self.samples:
            raise ValueError(
                f"{len(self.samples)} samples over {self.num_ranks} ranks are no layout; give 1 of each or more."
            )
        for sample, documents in enumerate(self.samples):
            _check_documents(sample, documents, self.padded)
            if sum(documents) != self.length:
                raise ValueError(
                    f"sample {sample} has {sum(documents)} tokens and sample 0 {self.length}; pad them to one length."
                )
        if self.tokens is not None and (
            len(self.tokens) != self.num_ranks or min(self.tokens) < 0 or sum(self.tokens) != self.length
        ):
            raise ValueError(
                f"tokens {self.tokens} on {self.num_ranks} ranks do not make up a sample of {self.length}; give "
                f"{self.num_ranks} numbers from 0 on whose sum is {self.length}."
            )

    @functools.cached_property
    def length(self) -> int:
        """Tokens of a whole sample."""
        return sum(self.samples[0])

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        if self.tokens is not None:
            return self.tokens[rank]
        return self.length // self.num_ranks + (rank < self.length % self.num_ranks)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        if rank not in self._made:
            if not 0 <= rank < self.num_ranks:
                raise ValueError(no_rank(rank, self.num_ranks))
            self._made[rank] = tuple(self._runs(rank))
        return self._made[rank]

    @functools.cached_property
    def _made(self) -> dict[int, tuple[Run, ...]]:
        """The runs of ranks that were asked for. They go with the layout: another batch has other documents."""
        return {}

    def _runs(self, rank: int) -> Iterator[Run]:
        first = 0
        for number, documents in enumerate(self.samples):
            sample = number if len(self.samples) > 1 else None
            yield from _runs_of(self.stretches(number, rank), first, sample)
            first += len(documents)

    @functools.cached_property
    def _starts(self) -> tuple[tuple[int, ...], ...]:
        """Where each sample's documents begin, and where the last one ends."""
        return tuple((0, *accumulate(documents)) for documents in self.samples)

    @abstractmethod
    def stretches(self, sample: int, rank: int) -> Iterable[tuple[int, int, int]]:
        """What `rank` holds of a sample, in its order: document of the sample, start and stop; some may be empty."""
        ...


@dataclass(frozen=True)
class Contiguous(PackedLayout):
    """Each rank holds one stretch of the stream, in the order of ranks."""

    def stretches(self, sample: int, rank: int) -> Iterable[tuple[int, int, int]]:
        """See PackedLayout."""
        return _cut_stream(self._starts[sample], self._edges[rank], self._edges[rank + 1])

    @functools.cached_property
    def _edges(self) -> tuple[int, ...]:
        return (0, *accumulate(map(self.num_tokens, range(self.num_ranks))))


@dataclass(frozen=True)
class Zigzag(PackedLayout):
    """Each rank holds an early and a late stretch of the stream, see Note [Zigzag]; the late one is not shorter."""

    def stretches(self, sample: int, rank: int) -> Iterator[tuple[int, int, int]]:
        """See PackedLayout."""
        early, late = self._edges
        yield from _cut_stream(self._starts[sample], early[rank], early[rank + 1])
        yield from _cut_stream(self._starts[sample], self.length - late[rank + 1], self.length - late[rank])

    @functools.cached_property
    def _edges(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the early stretches from the beginning on, and of the late ones from the end back."""
        tokens = [self.num_tokens(rank) for rank in range(self.num_ranks)]
        return (0, *accumulate(each // 2 for each in tokens)), (0, *accumulate(each - each // 2 for each in tokens))


@dataclass(frozen=True)
class DocumentZigzag(PackedLayout):
    """Each rank holds an early and a late stretch of every document, see Note [Zigzag].

    That is the rule of TransformerEngine and Megatron for packed documents (THD), which they pad to multiples of 2P;
    what pads a document is cut with it. Here documents may be of any length: what P does not divide goes to the ranks
    in turn, from document to document. Who holds each token of 7 and of 5, of 3 ranks:

        0 1 2 2 1 0 0 | 1 2 2 1 0
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None:
            raise ValueError(
                f"tokens {self.tokens} a rank: a zigzag by document gives each rank its share of every document; leave "
                f"tokens out, or take another layout."
            )

    def stretches(self, sample: int, rank: int) -> Iterator[tuple[int, int, int]]:
        """See PackedLayout."""
        num_ranks, turn = self.num_ranks, 0
        documents = self.samples[sample]
        paddings = documents[1::2] if self.padded else ()
        for number, length in enumerate(documents[::2] if self.padded else documents):
            whole = length + paddings[number] if paddings else length
            # Ranks from `turn` on, and around, get one token more, as many as there are: some of them before this one.
            share, more = divmod(whole, num_ranks)
            mine = (rank - turn) % num_ranks < more
            around = turn + more - num_ranks
            if around < 0:
                before = 0 if rank <= turn else min(rank - turn, more)
                turn += more
            else:
                before = min(rank, around) + (0 if rank <= turn else rank - turn)
                turn = around
            half = share // 2
            early, late = rank * half, whole - rank * (share - half)
            if share % 2:
                early += before
                early_stop, late_start = early + half + mine, late - half - 1
            else:
                late -= before
                early_stop, late_start = early + half, late - half - mine
            if not paddings:
                yield number, early, early_stop
                yield number, late_start, late
                continue
            for start, stop in (early, early_stop), (late_start, late):
                yield 2 * number, start, min(stop, length)
                yield 2 * number + 1, max(start - length, 0), stop - length


@dataclass(frozen=True)
class Balanced(PackedLayout):
    """Documents, whole or in stretches, so that each rank computes as much, see Note [Balance] in balance.py.

    prefer: "balance" cuts all documents that are long; "locality" only those that must be. chunks: a stretch of one
    that is cut is at most this part of a rank's tokens, and of its area. bands, bands_of: what a query sees, as in
    AttentionPlan; the latter in pairs.
    """

    prefer: Literal["locality", "balance"] = "locality"
    chunks: int = 8
    bands: tuple[Band, ...] = CAUSAL
    bands_of: tuple[tuple[int, tuple[Band, ...]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefer not in ("locality", "balance") or self.chunks < 1:
            raise ValueError(
                f"prefer={self.prefer!r}, chunks={self.chunks}: give 'locality' or 'balance', and 1 chunk or more."
            )

    def stretches(self, sample: int, rank: int) -> Iterable[tuple[int, int, int]]:
        """See PackedLayout."""
        return self._dealt[sample][rank]

    @functools.cached_property
    def _dealt(self) -> tuple[list[list[Stretch]], ...]:
        """By sample and rank. What a sample leaves uneven, the next ones make up for."""
        bands_of, first, dealt = dict(self.bands_of), 0, []
        room = [self.num_tokens(rank) for rank in range(self.num_ranks)]
        owed = [0.0] * self.num_ranks
        for lengths in self.samples:
            area = _area_of([bands_of.get(first + number, self.bands) for number in range(len(lengths))], lengths)
            held, owed = deal(lengths, area, room, owed, chunks=self.chunks, keep_whole=self.prefer == "locality")
            dealt.append(held)
            first += len(lengths)
        return tuple(dealt)


@dataclass(frozen=True)
class EqualChunks:
    """One document in equal chunks, one (contiguous) or two (zigzag, see Note [Zigzag]) for each rank.

    num_ranks: P. tokens: of one rank. kind: which chunks a rank holds. Raises ValueError where the chunks do not divide
    the tokens.
    """

    num_ranks: int
    tokens: int
    kind: Literal["zigzag", "contiguous"] = "zigzag"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.kind not in ("zigzag", "contiguous") or self.tokens < 0:
            raise ValueError(
                f"{self}: a layout is zigzag or contiguous, over 1 rank or more; give kind= and num_ranks= so."
            )
        if self.kind == "zigzag" and self.tokens % 2:
            raise ValueError(f"{self.tokens} tokens a rank are no two equal chunks; give {self.tokens + 1}.")

    padded: ClassVar[bool] = False

    @property
    def samples(self) -> tuple[tuple[int, ...], ...]:
        """See StreamLayout."""
        return ((self.num_ranks * self.tokens,),)

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        return self.tokens

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        return _runs_of_chunks(self, rank)

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks that one rank holds."""
        return 2 if self.kind == "zigzag" else 1

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Chunks that `rank` holds, in its order."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(no_rank(rank, self.num_ranks))
        return (rank,) if self.kind == "contiguous" else (rank, 2 * self.num_ranks - 1 - rank)


@functools.lru_cache(maxsize=4096)
def _runs_of_chunks(layout: EqualChunks, rank: int) -> tuple[Run, ...]:
    chunk = layout.tokens // layout.chunks_per_rank
    stretches = ((0, number * chunk, (number + 1) * chunk) for number in layout.chunks(rank))
    return tuple(_runs_of(stretches, first=0, sample=None))


PROVEN: tuple[type[Layout], ...] = (Contiguous, Zigzag, DocumentZigzag, Balanced, EqualChunks)
"""Layouts whose runs need no check: tests hold that they are right."""


def _area_of(bands: Sequence[tuple[Band, ...]], lengths: Sequence[int]) -> Area:
    """What tokens of documents see, each of which has bands of its own."""
    if all(each == CAUSAL for each in bands):
        return lambda document, start, stop: causal_pairs(start, stop)
    return lambda document, start, stop: pairs_seen(bands[document], lengths[document], start, stop)


def _cut_stream(starts: Sequence[int], begin: int, end: int) -> Iterator[Stretch]:
    """The documents between two places of the stream. starts: where they begin, and where the last one ends."""
    number = bisect_right(starts, begin) - 1
    while begin < end:
        stop = min(end, starts[number + 1])
        yield number, begin - starts[number], stop - starts[number]
        begin, number = stop, number + 1


def _runs_of(stretches: Iterable[tuple[int, int, int]], first: int, sample: int | None) -> list[Run]:
    """The stretches as runs, as few as possible, where a sample's first document has the number `first`."""
    runs: list[Run] = []
    place, document, start, stop = 0, -1, 0, 0
    for number, begin, end in stretches:
        if begin >= end:
            continue
        if number == document and begin == stop:
            stop = end
            continue
        if stop:
            runs.append(Run(place, place + stop - start, start, first + document, sample))
            place += stop - start
        document, start, stop = number, begin, end
    if stop:
        runs.append(Run(place, place + stop - start, start, first + document, sample))
    return runs


def _check_documents(sample: int, lengths: tuple[int, ...], padded: bool) -> None:
    if padded and len(lengths) % 2:
        raise ValueError(
            f"sample {sample} has {len(lengths)} lengths; with padding give two for each document, its own and that of "
            f"what pads it, 0 where nothing does."
        )
    documents, paddings = (lengths[::2], lengths[1::2]) if padded else (lengths, ())
    for name, counted, least in ("document", documents, 1), ("padding of document", paddings, 0):
        if min(counted, default=least) < least:
            number = next(number for number, length in enumerate(counted) if length < least)
            raise ValueError(f"sample {sample}: {name} {number} has {counted[number]} tokens; give {least} or more.")


def no_rank(rank: object, num_ranks: int) -> str:
    """What is wrong with a rank that is none of so many."""
    return f"there is no rank {rank!r} among {num_ranks}; give an integer from 0 to {num_ranks - 1}."


def integer(value: object) -> int | None:
    """The integer that this is, one of NumPy's or of a tensor too; None for what is none, True and 2.0 included."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None
