"""Gloo ranks that stay alive for the whole test session; see rank_pool for how a function gets to them.

torch wants all ranks of the world to take part in every `new_group`: a function that makes groups of its own runs on
all `WORLD_SIZE` ranks, or finds them with `group_of` once `make_group` has made them.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mindspeed_cp.testing.rank_pool import LIMIT_S, RankPool
from preload import PRELOAD

WORLD_SIZE = 8
COLLECTIVE_TIMEOUT = timedelta(seconds=LIMIT_S)
"""Ends a rank that hangs in gloo after pytest itself was killed and can no longer end it."""


class GlooPool:
    """`WORLD_SIZE` ranks of one gloo world, and groups of them that are made once."""

    def __init__(self) -> None:
        self._pool = RankPool(WORLD_SIZE, PRELOAD, _join_world)
        self._groups: set[tuple[int, ...]] = set()

    def run(
        self, ranks: int | Sequence[int], function: Callable[..., Any], *args: Any, timeout_s: float = LIMIT_S
    ) -> list[Any]:
        """What `function(group, *args)` returns on each rank of a group, by rank within the group.

        ranks: the world's ranks that form the group, ascending; a number P stands for the first P.

        Raises RankFailure when a rank raises, dies or does not answer within `timeout_s`.
        """
        __tracebackhide__ = True
        members = _members(ranks)
        self.make_group(members)
        return self._pool.call(members, timeout_s, _run_in_group, function, members, args)

    def run_on_all(
        self, ranks: int | Sequence[int], function: Callable[..., Any], *args: Any, timeout_s: float = LIMIT_S
    ) -> list[Any]:
        """Like `run`, but on all ranks of the world; those outside the group are given None for it.

        Returns the results of the group's ranks alone.
        """
        __tracebackhide__ = True
        members = _members(ranks)
        self.make_group(members)
        results = self._pool.call(range(WORLD_SIZE), timeout_s, _run_in_group, function, members, args)
        return [results[rank] for rank in members]

    def make_group(self, ranks: int | Sequence[int]) -> None:
        """Make the group of these ranks, unless it is there: on its ranks, `group_of` then gives it."""
        members = _members(ranks)
        if not self._pool.started:
            self._groups.clear()
        if members not in self._groups:
            self._pool.call(range(WORLD_SIZE), LIMIT_S, _make_group, members)
            self._groups.add(members)

    def close(self) -> None:
        """End the ranks."""
        self._pool.close()


_GROUPS: dict[tuple[int, ...], dist.ProcessGroup] = {}
"""In a rank's process: the groups that have been made."""


def group_of(ranks: Sequence[int]) -> dist.ProcessGroup:
    """In a rank's process: the group of these ranks of the world, which the pool has made."""
    return _GROUPS[tuple(ranks)]


def _make_group(members: tuple[int, ...]) -> None:
    _GROUPS[members] = dist.new_group(list(members), timeout=COLLECTIVE_TIMEOUT)


def _run_in_group(function: Callable[..., Any], members: tuple[int, ...], args: tuple[Any, ...]) -> Any:
    return function(group_of(members) if dist.get_rank() in members else None, *args)


def _members(ranks: int | Sequence[int]) -> tuple[int, ...]:
    members = tuple(range(ranks)) if isinstance(ranks, int) else tuple(ranks)
    assert members and list(members) == sorted(set(members)) and members[-1] < WORLD_SIZE, members
    return members


def _join_world(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", COLLECTIVE_TIMEOUT, WORLD_SIZE, rank)
