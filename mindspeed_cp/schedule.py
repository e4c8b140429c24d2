"""The ring, written once as data: which K/V block a rank works on at each step, and what travels meanwhile.

Note [One schedule]
    Ranks stand on a grid of `outer` windows of `inner` ranks; (o, i) is the i-th rank of window o, and all arithmetic
    is modulo the grid. At step (j, s) rank (o, i) works on the block of (o - j, i - s): for each distance j between
    windows, once around the inner ring. A plain ring is one window.

    K/V: a block comes from the rank that had it before. Within a window that is the inner neighbour, one step earlier.
    The first block of a window comes from the neighbouring window, where it was the first block too, and so it may
    travel during that whole window, over the slow links, while the fast ones turn the inner ring.

    dK/dV go straight home, so that each partial gradient is rounded once, however many ranks there are. At step (j, s)
    rank (o, i) has a partial gradient of the block of (o - j, i - s), and gives it to (o, i - s) in its own window,
    which adds them up in fp32. When the window ends, that sum crosses to its owner (o - j, i): one block for each
    window but the own one leaves over the slow links.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Hop(NamedTuple):
    """A distance on the grid of ring ranks."""

    outer: int
    inner: int


class Step(NamedTuple):
    """A step of the ring: distance, in windows and within them, to the owner of the block worked on."""

    window: int
    offset: int

    @property
    def to_owner(self) -> Hop:
        """The hop from the rank that works to the owner of the block."""
        return Hop(-self.window, -self.offset)


@dataclass(frozen=True)
class RingSchedule:
    """The steps of `outer * inner` ring ranks, see Note [One schedule]."""

    outer: int
    inner: int

    @property
    def size(self) -> int:
        """Number of ring ranks, and of steps."""
        return self.outer * self.inner

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in their order; the first is the rank's own block."""
        return tuple(Step(window, offset) for window in range(self.outer) for offset in range(self.inner))

    def peer(self, rank: int, hop: Hop) -> int:
        """The rank that is `hop` away from `rank`."""
        outer, inner = divmod(rank, self.inner)
        return (outer + hop.outer) % self.outer * self.inner + (inner + hop.inner) % self.inner

    def owner(self, rank: int, step: Step) -> int:
        """Owner of the block that `rank` works on at `step`."""
        return self.peer(rank, step.to_owner)

    def departures(self, step: Step) -> dict[Step, Hop]:
        """Where the block of `step` travels next, by the step at which it is needed there."""
        departures = {}
        if step.offset == 0 and step.window + 1 < self.outer:
            departures[Step(step.window + 1, 0)] = Hop(1, 0)
        if step.offset + 1 < self.inner:
            departures[Step(step.window, step.offset + 1)] = Hop(0, 1)
        return departures

    def ends_window(self, step: Step) -> bool:
        """Whether `step` is the last one of its window."""
        return step.offset + 1 == self.inner
