"""Which query and K/V heads each rank of a Ulysses group has. Integers and slices; no torch.

Note [Heads]
    Query heads are dealt in order, as many to each rank as to any other, or one more. A rank is sent the K/V heads that
    its query heads read, and no others: below the degree several ranks are sent one head, each once. Query head n reads
    K/V head n // (N / G). Kernels want as many query heads for each K/V head. Where a rank's share starts or ends
    within the readers of one, its K/V heads are repeated where they are read, as often as that takes (Note [Repeated
    heads] in attention/repeated_heads.py):

        12 query heads, 3 K/V heads, 2 ranks    0 0 0 0 1 1 | 1 1 2 2 2 2    read
                                                0 0 1       | 1 2 2          given to kernels

    The gradients of a head that was repeated, or sent to several ranks, are added once, in fp32.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Dealt(NamedTuple):
    """Heads of a tensor over the members of a group.

    parts: which heads each member is sent. given: which of these, counted from its first, it gives to kernels.
    """

    parts: tuple[slice, ...]
    given: tuple[tuple[int, ...], ...]

    @property
    def is_even(self) -> bool:
        """Whether each head is sent to one member, as many to each."""
        size = self.parts[0].stop
        return all(part == slice(number * size, (number + 1) * size) for number, part in enumerate(self.parts))


@dataclass(frozen=True)
class HeadLayout:
    """See Note [Heads]. num_kv_heads divides num_heads; degree: ranks of a Ulysses group.

    Raises ValueError where there are fewer query heads than ranks.
    """

    num_heads: int
    num_kv_heads: int
    degree: int

    def __post_init__(self) -> None:
        if self.num_heads < self.degree:
            raise ValueError(
                f"q has {self.num_heads} heads, and the Ulysses degree is {self.degree}: each rank wants one at least; "
                f"use a degree of {self.num_heads} or less, or a ring."
            )

    @property
    def queries(self) -> Dealt:
        """Query heads."""
        share, more = divmod(self.num_heads, self.degree)
        edges = [member * share + min(member, more) for member in range(self.degree + 1)]
        parts = tuple(slice(start, stop) for start, stop in pairwise(edges))
        return Dealt(parts, tuple(tuple(range(part.stop - part.start)) for part in parts))

    @property
    def keys(self) -> Dealt:
        """K/V heads."""
        group = self.num_heads // self.num_kv_heads
        parts, given = [], []
        for queries in self.queries.parts:
            read = slice(queries.start // group, (queries.stop - 1) // group + 1)
            readers = [
                min(queries.stop, (head + 1) * group) - max(queries.start, head * group)
                for head in range(read.start, read.stop)
            ]
            step = math.gcd(*readers)
            parts.append(read)
            given.append(tuple(place for place, count in enumerate(readers) for _ in range(count // step)))
        return Dealt(tuple(parts), tuple(given))
