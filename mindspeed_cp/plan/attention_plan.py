"""The plan of one attention: one object that says who holds what, and who sees whom."""

import functools
import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

from mindspeed_cp.plan.bands import CAUSAL, FULL, Band, check_bands
from mindspeed_cp.plan.runs import GroupedLayout, Layout, last_position, total_tokens
from mindspeed_cp.plan.seen import Documents, QueryIndex, bounds_between, glance, over_all_keys, triangles
from mindspeed_cp.plan.tiles import Bounds, Tile, tiles_of, union

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class AttentionPlan:
    """Who sees whom between the queries and the keys that ranks hold.

    queries, keys: who holds them; the same object in self-attention. bands: what a query sees of its document.
    bands_of: the documents for which that is something else. handle: what stands for this plan in a graph of
    torch.compile, see handles.py.

    Raises ValueError for a band in which nothing sees anything, or bands of one document about the same keys.
    """

    queries: Layout
    keys: Layout
    bands: tuple[Band, ...] = CAUSAL
    bands_of: Mapping[int, tuple[Band, ...]] = field(default_factory=dict)
    _tiles: dict[tuple[int, int], tuple[Tile, ...]] = field(default_factory=dict, repr=False, compare=False)
    _grouped: "dict[tuple[tuple[int, ...], ...], AttentionPlan]" = field(
        default_factory=dict, repr=False, compare=False
    )
    _held: dict[int, Documents] = field(default_factory=dict, repr=False, compare=False)
    _needed: dict[tuple[int, int], tuple[slice, ...]] = field(default_factory=dict, repr=False, compare=False)
    _readers: dict[int, frozenset[int]] = field(default_factory=dict, repr=False, compare=False)
    _made: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)
    handle: object = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bands in (self.bands, *self.bands_of.values()):
            check_bands(bands)

    def tiles(self, query_rank: int, key_rank: int) -> tuple[Tile, ...]:
        """What the queries of one rank see of the keys of another: the one answer to who sees whom.

        Every pair that sees each other is in one tile, and no other pair is in any. There are never more tiles than
        runs of queries, runs of keys and documents together where a document has one band, or the two of a prefix.
        """
        pair = query_rank, key_rank
        if pair not in self._tiles:
            queries, keys = self._query_documents(query_rank), self._documents(key_rank)
            if queries is keys and self.bands == CAUSAL and not self.bands_of:
                self._tiles[pair] = triangles(queries.runs.values())
            else:
                self._tiles[pair] = tiles_of(self._seen_between(queries, keys))
        return self._tiles[pair]

    def needed(self, query_rank: int, key_rank: int) -> tuple[slice, ...]:
        """Those tokens of `key_rank` that some query of `query_rank` sees, as few slices as possible."""
        pair = query_rank, key_rank
        if pair not in self._needed:
            seen = self.tiles(*pair) if query_rank in self.readers(key_rank) else ()
            self._needed[pair] = union(tile.keys for tile in seen)
        return self._needed[pair]

    def readers(self, key_rank: int) -> frozenset[int]:
        """The ranks with a query that sees a key of `key_rank`, and perhaps some more: found without any tiles."""
        if key_rank not in self._readers:
            self._readers[key_rank] = self._query_index.ranks_that_see(self.keys.runs(key_rank), self.bands_in)
        return self._readers[key_rank]

    @functools.cached_property
    def looks_ahead(self) -> bool:
        """Whether a query may see a later key than itself."""
        bands = (band for each in (self.bands, *self.bands_of.values()) for band in each)
        return any(band.ahead is None or band.ahead > 0 for band in bands)

    @functools.cached_property
    def shows_all(self) -> bool:
        """Whether every query sees every key: one document for all samples, without a bound."""
        return self.bands == FULL and not self.bands_of and self.starts.keys() <= {(None, 0)}

    @functools.cached_property
    def starts(self) -> "dict[tuple[int | None, int], int]":
        """Where in the stream of its sample each document begins, counted in keys."""
        lengths: dict[tuple[int | None, int], int] = {}
        for rank in range(self.keys.num_ranks):
            for run in self.keys.runs(rank):
                of = run.sample, run.document
                lengths[of] = max(lengths.get(of, 0), last_position(run) + 1)
        starts, sample, start = {}, None, 0
        for of in sorted(lengths, key=lambda of: (of[0] or 0, of[1])):
            sample, start = of[0], start if of[0] == sample else 0
            starts[of] = start
            start += lengths[of]
        return starts

    @functools.cached_property
    def _query_index(self) -> QueryIndex:
        return QueryIndex(self.queries)

    def area(self, query_rank: int, key_rank: int) -> int:
        """Pairs of query and key that see each other."""
        return sum(tile.area for tile in self.tiles(query_rank, key_rank))

    def bands_in(self, document: int) -> tuple[Band, ...]:
        """What a query of a document sees of it."""
        return self.bands_of.get(document, self.bands)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What others make of this plan: made once, and kept for as long as the plan is, which may be a batch."""
        if key not in self._made:
            self._made[key] = make()
        return cast("_Made", self._made[key])

    def __hash__(self) -> int:
        """Of what it is made of; plans that say the same are one in a cache."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.queries, self.keys, self.bands, tuple(sorted(self.bands_of.items()))))

    @functools.cached_property
    def words(self) -> str:
        """In short, for messages and for comparing: ranks whose plans differ have different words.

        Layouts say in their repr what they are made of.
        """
        made_of = repr((self.queries, self.keys, self.bands, sorted(self.bands_of.items())))
        digest = hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()
        return f"a plan of {total_tokens(self.queries)} tokens on {self.queries.num_ranks} ranks ({digest})"

    def of_groups(self, groups: tuple[tuple[int, ...], ...]) -> "AttentionPlan":
        """The plan between groups of ranks that put their tokens together, as Ulysses does: group g is its rank g.

        How a group's tokens are put in order is said by `GroupedLayout.parts`, of `queries` and of `keys`.
        """
        if groups not in self._grouped:
            queries = GroupedLayout(self.queries, groups)
            keys = queries if self.keys is self.queries else GroupedLayout(self.keys, groups)
            self._grouped[groups] = AttentionPlan(queries, keys, self.bands, self.bands_of)
        return self._grouped[groups]

    def _query_documents(self, query_rank: int) -> Documents:
        if self.queries is self.keys:
            return self._documents(query_rank)
        return self.once(("queries", query_rank), lambda: Documents(self.queries.runs(query_rank)))

    def _documents(self, key_rank: int) -> Documents:
        if key_rank not in self._held:
            self._held[key_rank] = Documents(self.keys.runs(key_rank))
        return self._held[key_rank]

    def _seen_between(self, queries: Documents, keys: Documents) -> list[Bounds]:
        """Document by document, what its queries see of its keys, as few tiles as possible."""
        shared = queries.runs.keys() & keys.runs.keys()
        if not shared:
            return []  # As mostly, of many ranks.
        result: list[Bounds] = []
        bands, mine, theirs = self.bands, queries.ends_of(shared), keys.ends_of(shared)
        band = over_all_keys(bands)
        for of in sorted(cast("set[int]", shared)):  # Or all of them are pairs.
            if self.bands_of:
                bands = self.bands_in(of if isinstance(of, int) else of[1])
                band = over_all_keys(bands)
            found = None if band is None else glance(mine[of], theirs[of], band)
            if found:
                result.append(found)
            elif found is None:
                result += bounds_between(queries.runs[of], keys.runs[of], bands)
        return result
