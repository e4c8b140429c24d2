"""Layouts for tests: any cut of a stream, dealt out in any way, with documents that may differ between samples."""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mindspeed_cp.plan import Run, joined


@dataclass(frozen=True)
class Dealt:
    """Parts from..to of a stream that each rank holds, ascending.

    documents: lengths that make up the stream; of each sample its own where there are several.
    """

    parts: tuple[tuple[tuple[int, int], ...], ...]
    documents: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.parts)

    def num_tokens(self, rank: int) -> int:
        return len(self.tokens(rank))

    def tokens(self, rank: int) -> list[int]:
        """The places in the stream of what the rank holds."""
        return [token for begin, end in self.parts[rank] for token in range(begin, end)]

    def runs(self, rank: int) -> tuple[Run, ...]:
        return _runs(self, rank)


@functools.cache
def _runs(layout: Dealt, rank: int) -> tuple[Run, ...]:
    alike = len(layout.documents) == 1

    def cut(sample: int, documents: Sequence[int]) -> Iterator[Run]:
        start = 0
        for begin, end in layout.parts[rank]:
            for document, (first, last) in enumerate(pairwise((0, *accumulate(documents)))):
                low, high = max(begin, first), min(end, last)
                if low < high:
                    place = start + low - begin
                    yield Run(place, place + high - low, low - first, document, None if alike else sample)
            start += end - begin

    return joined(run for sample, documents in enumerate(layout.documents) for run in cut(sample, documents))


def contiguous(lengths: Sequence[int], documents: Sequence[Sequence[int]] | None = None) -> Dealt:
    """The stream in as many parts as ranks, of these lengths."""
    edges = pairwise((0, *accumulate(lengths)))
    return _dealt([[edge] for edge in edges], documents)


def zigzag(lengths: Sequence[int], documents: Sequence[Sequence[int]] | None = None) -> Dealt:
    """The stream in two chunks for each rank, of these lengths, the first and the last to rank 0."""
    edges, size = list(pairwise((0, *accumulate(lengths)))), len(lengths) // 2
    return _dealt([[edges[rank], edges[-1 - rank]] for rank in range(size)], documents)


def at_random(rng: random.Random, num_ranks: int, length: int, documents: Sequence[Sequence[int]]) -> Dealt:
    """Chunks of one to four tokens, each to any rank."""
    parts: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    begin = 0
    while begin < length:
        end = min(length, begin + rng.randrange(1, 5))
        parts[rng.randrange(num_ranks)].append((begin, end))
        begin = end
    return _dealt(parts, documents)


def _dealt(parts: Sequence[Sequence[tuple[int, int]]], documents: Sequence[Sequence[int]] | None) -> Dealt:
    length = max(end for held in parts for _, end in held)
    documents = [[length]] if documents is None else documents
    kept = (tuple(part for part in held if part[0] < part[1]) for held in parts)
    return Dealt(tuple(kept), tuple(map(tuple, documents)))
