"""Which of a rank's keys and values others need, and from when on."""

from bisect import bisect_left

from mindspeed_cp.plan import union
from mindspeed_cp.program.transposed import Carried
from mindspeed_cp.schedule import RingSchedule

Tokens = tuple[slice, ...]


class Needs:
    """What the ranks of a ring need of each other's K/V.

    plan: who sees whom between them. schedule: in which order each works on the owners' blocks. `number` is that of a
    place in this order, which is a distance on the grid: the same for a block and all ranks that pass it on.
    """

    def __init__(self, plan: Carried, schedule: RingSchedule) -> None:
        self.plan, self.schedule = plan, schedule
        self._onwards: dict[tuple[int, int], tuple[list[int], list[Tokens]]] = {}

    def onwards(self, owner: int, number: int) -> Tokens:
        """Those of the owner's tokens that the rank that works on them at `number` needs, or one that gets them later.

        Within an inner ring they go on to its other ranks; at its first place to all later inner rings too.
        """
        inner = self.schedule.inner
        stop = number - number % inner + inner if number % inner else self.schedule.size
        return self._needed_until(owner, number, stop)

    def in_inner_ring(self, owner: int, outer: int) -> Tokens:
        """Those of the owner's tokens that some rank needs in the inner ring that is so many after the owner's."""
        return self._needed_until(owner, outer * self.schedule.inner, (outer + 1) * self.schedule.inner)

    def _needed_until(self, owner: int, number: int, stop: int) -> Tokens:
        """What the ranks need that work on the owner's block at number..stop."""
        case = owner, stop
        if case not in self._onwards:
            self._onwards[case] = self._from_the_far_end(owner, stop)
        numbers, needed = self._onwards[case]
        place = bisect_left(numbers, number)
        return needed[place] if place < len(numbers) else ()

    def _from_the_far_end(self, owner: int, stop: int) -> tuple[list[int], list[Tokens]]:
        """Numbers below `stop` of others that need some of the block; and what is needed from each of them on."""
        whole = self.plan.keys.num_tokens(owner)
        readers = ((self.schedule.number(rank, owner), rank) for rank in self.plan.readers(owner))
        numbers: list[int] = []
        needed: list[Tokens] = []
        from_here: Tokens = ()
        for number, rank in sorted(reader for reader in readers if 0 < reader[0] < stop)[::-1]:
            if from_here != (slice(0, whole),):  # More than all is not to be had.
                from_here = union((*from_here, *self.plan.needed(rank, owner)))
            numbers.append(number)
            needed.append(from_here)
        return numbers[::-1], needed[::-1]
