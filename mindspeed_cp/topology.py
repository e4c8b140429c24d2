"""The grid of context-parallel ranks: outer ring x inner ring x Ulysses."""

from dataclasses import dataclass
from typing import NamedTuple


class Coordinates(NamedTuple):
    """Where a rank stands on the grid, one index per axis."""

    outer: int
    inner: int
    ulysses: int


@dataclass(frozen=True, kw_only=True)
class CPTopology:
    """A grid of `outer * inner * ulysses` context-parallel ranks.

    The Ulysses axis varies fastest, so that the ranks of one Ulysses group are neighbours: they exchange the most bytes
    and should share a node. Every algorithm is a point of this grid: Ulysses alone is a ring of one rank, a plain ring
    has `outer == 1`, a double ring has both ring axes above one, and a hybrid has `ulysses` above one beside a ring.

    Sources: Ulysses arXiv:2309.14509, USP (hybrid) arXiv:2405.07719, LoongTrain (double ring) arXiv:2406.18485.
    """

    outer: int = 1
    inner: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        for axis in ("outer", "inner", "ulysses"):
            if getattr(self, axis) < 1:
                raise ValueError(
                    f"CPTopology {axis}={getattr(self, axis)}: each axis has at least one rank; give 1 or more."
                )
        if self.outer > 1 and self.inner == 1:
            raise ValueError(
                f"CPTopology outer={self.outer}, inner=1: inner rings of one rank make a plain ring; "
                f"use inner={self.outer}."
            )

    @property
    def size(self) -> int:
        """Number of context-parallel ranks."""
        return self.outer * self.inner * self.ulysses

    @property
    def ring_size(self) -> int:
        """Number of ranks that K/V blocks visit, inner and outer ring together."""
        return self.outer * self.inner

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank`, which counts from 0 within the context-parallel group."""
        ring_rank, ulysses = divmod(rank, self.ulysses)
        outer, inner = divmod(ring_rank, self.inner)
        return Coordinates(outer, inner, ulysses)

    def ulysses_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks of the Ulysses group that `rank` belongs to, ascending."""
        first = rank - self.coordinates(rank).ulysses
        return tuple(range(first, first + self.ulysses))

    @property
    def ulysses_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every Ulysses group, in order; each group is one rank of the ring across."""
        return tuple(self.ulysses_ranks(first) for first in range(0, self.size, self.ulysses))

    def ring_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks of the ring that `rank` belongs to, in the ring's order: one inner ring after another."""
        return tuple(range(self.coordinates(rank).ulysses, self.size, self.ulysses))
