"""In which order a rank of a ring meets the owners of keys and values. Integers; no torch.

Note [Order of owners]
    Ring ranks stand on a grid of `outer` inner rings of `inner` ranks; (o, i) is the i-th rank of inner ring o, and all
    arithmetic is modulo the grid. At step (j, s) rank (o, i) works on the block of (o - j, i - s): for each distance j
    between inner rings, once around the inner ring. A plain ring is one inner ring.

    A block then comes from the rank that had it before: within an inner ring from the neighbour, one step earlier. The
    first block of an inner ring comes from the rank of the inner ring before it, where it was the first block too, and
    so it may travel for as long as that whole inner ring takes, over the slow links, while the fast ones turn.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Hop(NamedTuple):
    """A distance on the grid of ring ranks."""

    outer: int
    inner: int


@dataclass(frozen=True)
class RingSchedule:
    """The grid of `outer * inner` ring ranks, see Note [Order of owners]."""

    outer: int
    inner: int

    @property
    def size(self) -> int:
        """Number of ring ranks, and of owners that each of them meets."""
        return self.outer * self.inner

    def peer(self, rank: int, hop: Hop) -> int:
        """The rank that is `hop` away from `rank`."""
        outer, inner = divmod(rank, self.inner)
        return (outer + hop.outer) % self.outer * self.inner + (inner + hop.inner) % self.inner

    def number(self, rank: int, owner: int) -> int:
        """How many owners `rank` meets before this one."""
        mine, theirs = divmod(rank, self.inner), divmod(owner, self.inner)
        return (mine[0] - theirs[0]) % self.outer * self.inner + (mine[1] - theirs[1]) % self.inner
