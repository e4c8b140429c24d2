"""A grid of ranks with named axes: integers only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Axes = tuple[str, ...]
"""Names of axes. Where several shard one dim of a tensor, the first cuts it in the largest parts."""


@dataclass(frozen=True)
class Grid:
    """Ranks 0 to size - 1 on a grid. axes: their names; the last one varies fastest, as in torch's DeviceMesh."""

    axes: Axes
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.axes) == len(self.sizes) == len(set(self.axes)), self
        assert min(self.sizes) >= 1, self

    def __str__(self) -> str:
        """The sizes in words, those of one rank left out: "i=2 x j=2"."""
        named = zip(self.axes, self.sizes, strict=True)
        return " x ".join(f"{axis}={size}" for axis, size in named if size > 1) or "one rank"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def size_of(self, axes: Sequence[str]) -> int:
        """Number of ranks along these axes together."""
        return math.prod(self.sizes[self.axes.index(axis)] for axis in axes)

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands along an axis."""
        place = self.axes.index(axis)
        return rank // math.prod(self.sizes[place + 1 :]) % self.sizes[place]

    def index(self, rank: int, axes: Sequence[str]) -> int:
        """Where `rank` stands along several axes joined, the last of which varies fastest; 0 along none."""
        index = 0
        for axis in axes:
            index = index * self.size_of((axis,)) + self.coordinate(rank, axis)
        return index

    def ranks_along(self, rank: int, axes: Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` along these axes alone, itself among them, in the order of `index`."""
        others = [axis for axis in self.axes if axis not in axes]
        place = self.index(rank, others)
        group = (other for other in range(self.size) if self.index(other, others) == place)
        return tuple(sorted(group, key=lambda other: self.index(other, axes)))


class Part(NamedTuple):
    """Things start to start + size - 1 of several."""

    start: int
    size: int


def part(total: int, parts: int, index: int) -> Part:
    """Which of `total` things lie in one of so many parts: ceil(total / parts) in each, while there are any.

    As torch.chunk and DTensor cut; the last parts may be smaller, or empty.
    """
    largest = -(-total // parts)
    start = min(index * largest, total)
    return Part(start, min(largest, total - start))
