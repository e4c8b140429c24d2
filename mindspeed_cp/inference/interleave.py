"""Which rank keeps which token of a sequence that grows: stripes of it, dealt to the ranks in turn. No torch.

    position         0  1  2  3  4  5  6  7  8  9 10 11 ..      interleave 2, three ranks
    owner            0  0  1  1  2  2  0  0  1  1  2  2 ..
    slot             0  1  0  1  0  1  2  3  2  3  2  3 ..      its place among the owner's tokens

Owner and slot depend on the position alone, so a sequence grows without anything being moved, and every rank knows
what the others hold. With `first`, the rank of position 0, sequences of a batch grow on different ranks.

The queries of a prompt are dealt by the same rule: a rank computes the tokens whose keys it keeps. Under a causal mask
that is balanced to within a stripe.

Sources: interleaved caches of vLLM and vllm-ascend; for prompts, Striped Attention arXiv:2311.09431.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mindspeed_cp.plan import Run, joined


class Span(NamedTuple):
    """Positions start..stop of a sequence, the last excluded."""

    start: int
    stop: int


def owner(position: int, size: int, interleave: int = 1, first: int = 0) -> int:
    """The rank that keeps a position. first: the one that keeps position 0."""
    return (position // interleave + first) % size


def slot(position: int, size: int, interleave: int = 1) -> int:
    """The place of a position among the tokens of its owner."""
    return position // (interleave * size) * interleave + position % interleave


def local_length(length: int, rank: int, size: int, interleave: int = 1, first: int = 0) -> int:
    """How many of the first `length` positions a rank keeps."""
    rounds, rest = divmod(length, interleave * size)
    place = (rank - first) % size
    return rounds * interleave + min(max(rest - place * interleave, 0), interleave)


@dataclass(frozen=True)
class Interleaved:
    """Positions of each sample of a batch as ranks keep them, see the head of this file: a plan's Layout, see there.

    num_ranks: among which they are dealt. spans: of each sample. interleave: tokens of a stripe. firsts: the rank of
    each sample's position 0. aligned: whether a tensor of them has what is in one slot side by side, as a cache has;
    else each sample's tokens begin at 0. Samples whose tokens are at the same places are alike, and share a tile.
    """

    num_ranks: int
    spans: tuple[Span, ...]
    interleave: int = 1
    firsts: tuple[int, ...] = (0,)
    aligned: bool = False

    @property
    def alike(self) -> bool:
        """Whether all samples have the same positions on the same ranks."""
        return len(set(self.spans)) == 1 and len(set(self.firsts)) == 1

    def first(self, sample: int) -> int:
        """The rank of position 0."""
        return self.firsts[sample % len(self.firsts)]

    def slots(self, rank: int, sample: int) -> Span:
        """The slots of a rank's tokens of a sample."""
        count = functools.partial(
            local_length, rank=rank, size=self.num_ranks, interleave=self.interleave, first=self.first(sample)
        )
        return Span(count(self.spans[sample].start), count(self.spans[sample].stop))

    def base(self, rank: int, sample: int) -> int:
        """The slot that is at place 0 of a tensor."""
        if not self.aligned:
            return self.slots(rank, sample).start
        held = [self.slots(rank, each) for each in range(len(self.spans))]
        return min((slots.start for slots in held if slots.stop > slots.start), default=0)

    def num_tokens(self, rank: int) -> int:
        """See Layout: of the sample that has most; others are padded."""
        held = [(sample, self.slots(rank, sample)) for sample in range(1 if self.alike else len(self.spans))]
        # A sample that has nothing here has no place either: its slots may have been given back.
        return max((slots.stop - self.base(rank, each) for each, slots in held if slots.stop > slots.start), default=0)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout. Each sample is a document."""
        return _runs(self, rank)

    def positions(self, rank: int, sample: int) -> Iterator[int]:
        """Those that a rank has of a sample, in its order."""
        slots = self.slots(rank, sample)
        return (self.position(rank, sample, slot) for slot in range(slots.start, slots.stop))

    def position(self, rank: int, sample: int, slot: int) -> int:
        """The inverse of `slot` on a rank."""
        stripe, within = divmod(slot, self.interleave)
        place = (rank - self.first(sample)) % self.num_ranks
        return (stripe * self.num_ranks + place) * self.interleave + within

    def _runs(self, rank: int) -> Iterator[Run]:
        for sample in range(1 if self.alike else len(self.spans)):
            slots, base, named = self.slots(rank, sample), self.base(rank, sample), None if self.alike else sample
            start = slots.start
            while start < slots.stop:
                stop = min(slots.stop, (start // self.interleave + 1) * self.interleave)
                yield Run(start - base, stop - base, self.position(rank, sample, start), sample, named)
                start = stop


@functools.lru_cache(maxsize=1024)
def _runs(layout: Interleaved, rank: int) -> tuple[Run, ...]:
    return joined(layout._runs(rank))
