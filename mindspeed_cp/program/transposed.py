"""Plans in which queries and keys have changed places: what travels in their programs are queries.

Keys stay with their ranks, and each rank works on the queries of one owner after another. Everything else (rotation,
direct transport, needs, bytes) is the same, and told by the same programs.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mindspeed_cp.plan import AttentionPlan, Layout, Tile, union

_Made = TypeVar("_Made")


class Carried(Protocol):
    """What programs ask of a plan. Tokens of an owner are carried to ranks that work on them: keys, or queries.

    `queries` of its tiles are of the rank that works, `keys` the tokens that are carried.
    """

    @property
    def keys(self) -> Layout:
        """Who owns what is carried."""
        ...

    def tiles(self, query_rank: int, key_rank: int) -> tuple[Tile, ...]:
        """What a rank computes with an owner's tokens."""
        ...

    def needed(self, query_rank: int, key_rank: int) -> tuple[slice, ...]:
        """Those of an owner's tokens that a rank needs."""
        ...

    def readers(self, key_rank: int) -> frozenset[int]:
        """The ranks that need some of an owner's tokens, and perhaps some more."""
        ...

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """See AttentionPlan.once."""
        ...


@dataclass(frozen=True)
class TransposedPlan:
    """The plan whose queries are carried. `plan`: the one of the attention."""

    plan: AttentionPlan

    @property
    def keys(self) -> Layout:
        """See Carried."""
        return self.plan.queries

    def tiles(self, query_rank: int, key_rank: int) -> tuple[Tile, ...]:
        """See Carried."""
        return tuple(map(transposed, self.plan.tiles(key_rank, query_rank)))

    def needed(self, query_rank: int, key_rank: int) -> tuple[slice, ...]:
        """See Carried."""
        tiles = self.plan.tiles(key_rank, query_rank) if query_rank in self.readers(key_rank) else ()
        return self.once(("needed", query_rank, key_rank), lambda: union(tile.queries for tile in tiles))

    def readers(self, key_rank: int) -> frozenset[int]:
        """See Carried."""
        holders = range(self.plan.keys.num_ranks)
        return self.once(
            ("readers", key_rank), lambda: frozenset(rank for rank in holders if key_rank in self.plan.readers(rank))
        )

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """See Carried: kept by the plan itself."""
        return self.plan.once(("transposed", key), make)


def transposed(tile: Tile) -> Tile:
    """The tile with queries and keys in each other's place; its own inverse."""
    return tile._replace(queries=tile.keys, keys=tile.queries, left=tile.right, right=tile.left)
