r"""Who sees whom: which tokens of one rank attend to which of another, as rectangles that kernels know.

Everything that depends on it reads `AttentionPlan.tiles`: attention, what travels, bytes, predictions, drawings and
checks. Integers and slices; no torch.

Note [Tiles]
    Tokens lie in a rank's memory in runs: stretches of one document whose positions count up with them. Within two
    runs the rule "query i sees key j where -ahead <= i - j <= behind" is a band along the diagonal of a rectangle of
    local tokens. Such a band is what FlashAttention calls a window, aligned bottom right: row a of n sees, of m keys,

        a + (m - n) - left  <=  b  <=  a + (m - n) + right

    and causal attention is left = None, right = 0 on a square. A tile is cropped until its first and last row, and its
    first and last key, take part; then no row is dead and neither bound is negative.

    Two tiles are one where their union is again a band on a rectangle. That is so if the band which spans both has the
    area of both, since it holds them and they do not overlap. Causal attention on a zigzag is one tile for each pair of
    ranks by this rule, three tiles on the diagonal:

        keys        early  late                    early  late
        early       \                         the triangle on all local tokens
        late        full   \

    It makes one tile of keys that lie side by side and are seen by all rows, whatever their positions. What depends on
    positions (ALiBi, dropout by position) is told them beside the tile.

Source of the window's convention: FlashAttention 2, arXiv:2307.08691, and its `window_size`.
"""

import functools
import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, compress, count, pairwise
from operator import eq, itemgetter
from typing import NamedTuple, Protocol, TypeVar, cast

_Made = TypeVar("_Made")


class Run(NamedTuple):
    """Tokens start..stop of one rank, the last excluded: the positions `position`.. of one document of one sample.

    document: numbered in the order of the stream. sample: its index in the batch; None where all samples are alike.
    """

    start: int
    stop: int
    position: int
    document: int = 0
    sample: int | None = None


class Band(NamedTuple):
    """Query i of a document sees its key j where -ahead <= i - j <= behind; None is without bound.

    keys: the positions of the keys that it is about, from..to, the last excluded; the bands of one
    document are about different keys.
    """

    behind: int | None
    ahead: int | None
    keys: tuple[int, int | None] = (0, None)


FULL = (Band(None, None),)
CAUSAL = (Band(None, 0),)


class Tile(NamedTuple):
    """These queries attend to these keys under this window, see Note [Tiles].

    queries, keys: tokens of the two ranks. left, right: the window, None where it does not cut the rectangle.
    area: pairs of query and key that see each other, one head's share of the work.
    sample: the one it is of; None for all.
    """

    queries: slice
    keys: slice
    left: int | None
    right: int | None
    area: int
    sample: int | None = None

    @property
    def num_queries(self) -> int:
        """Rows of the rectangle."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """Columns of the rectangle."""
        return int(self.keys.stop - self.keys.start)


class Layout(Protocol):
    """Who holds what. A rank's tokens are in the order of the stream: by sample, document and position."""

    @property
    def num_ranks(self) -> int:
        """Ranks that hold something, or could."""
        ...

    def num_tokens(self, rank: int) -> int:
        """Tokens of a sample that `rank` holds."""
        ...

    def runs(self, rank: int) -> tuple[Run, ...]:
        """What `rank` holds, in its order."""
        ...


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
    _held: "dict[int, _Documents]" = field(default_factory=dict, repr=False, compare=False)
    _needed: dict[tuple[int, int], tuple[slice, ...]] = field(default_factory=dict, repr=False, compare=False)
    _readers: dict[int, frozenset[int]] = field(default_factory=dict, repr=False, compare=False)
    _made: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)
    handle: object = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for bands in (self.bands, *self.bands_of.values()):
            _check_bands(bands)

    def tiles(self, query_rank: int, key_rank: int) -> tuple[Tile, ...]:
        """What the queries of one rank see of the keys of another: the one answer to who sees whom.

        Every pair that sees each other is in one tile, and no other pair is in any. There are never more tiles than
        runs of queries, runs of keys and documents together where a document has one band, or the two of a prefix.
        """
        pair = query_rank, key_rank
        if pair not in self._tiles:
            queries, keys = self._query_documents(query_rank), self._documents(key_rank)
            apart = queries.keys().isdisjoint(keys)  # As most pairs of many ranks are.
            self._tiles[pair] = () if apart else _tiles(_merged_along(self._seen_between(queries, keys)))
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
            self._readers[key_rank] = self._query_index.ranks_that_see(self.keys.runs(key_rank), self)
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
                lengths[of] = max(lengths.get(of, 0), _last(run) + 1)
        starts, sample, start = {}, None, 0
        for of in sorted(lengths, key=lambda of: (of[0] or 0, of[1])):
            sample, start = of[0], start if of[0] == sample else 0
            starts[of] = start
            start += lengths[of]
        return starts

    @functools.cached_property
    def _query_index(self) -> "_QueryIndex":
        return _QueryIndex(self.queries)

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
        tokens = sum(map(self.queries.num_tokens, range(self.queries.num_ranks)))
        return f"a plan of {tokens} tokens on {self.queries.num_ranks} ranks ({digest})"

    def of_groups(self, groups: tuple[tuple[int, ...], ...]) -> "AttentionPlan":
        """The plan between groups of ranks that put their tokens together, as Ulysses does: group g is its rank g.

        How a group's tokens are put in order is said by `GroupedLayout.parts`, of `queries` and of `keys`.
        """
        if groups not in self._grouped:
            queries = GroupedLayout(self.queries, groups)
            keys = queries if self.keys is self.queries else GroupedLayout(self.keys, groups)
            self._grouped[groups] = AttentionPlan(queries, keys, self.bands, self.bands_of)
        return self._grouped[groups]

    def _query_documents(self, query_rank: int) -> "_Documents":
        if self.queries is self.keys:
            return self._documents(query_rank)
        return self.once(("queries", query_rank), lambda: _by_document(self.queries.runs(query_rank)))

    def _documents(self, key_rank: int) -> "_Documents":
        if key_rank not in self._held:
            self._held[key_rank] = _by_document(self.keys.runs(key_rank))
        return self._held[key_rank]

    def _seen_between(self, queries: "_Documents", keys: "_Documents") -> "list[_Bounds]":
        """Document by document, what its queries see of its keys, as few tiles as possible."""
        if queries is keys and self.bands == CAUSAL and not self.bands_of:
            return list(map(_triangle, queries.values()))
        result: list[_Bounds] = []
        bands = self.bands
        for of in sorted(cast("set[int]", queries.keys() & keys.keys())):  # Or all of them are pairs.
            if self.bands_of:
                bands = self.bands_in(of if isinstance(of, int) else of[1])
            result += _seen(queries[of], keys[of], bands)
        return result


class Part(NamedTuple):
    """Tokens start..stop of the shard of a group's member."""

    member: int
    start: int
    stop: int


@dataclass(frozen=True)
class GroupedLayout:
    """What groups of ranks hold together, each group's tokens in the order of the stream.

    groups: the ranks of `layout` in each, by their place in the group.
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    _placed: dict[int, tuple[tuple[Run, Part], ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_ranks(self) -> int:
        """See Layout: the groups."""
        return len(self.groups)

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        return sum(self.layout.num_tokens(member) for member in self.groups[rank])

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        return joined(run for run, _ in self._in_order(rank))

    def parts(self, rank: int) -> dict[int | None, tuple[Part, ...]]:
        """For each sample the parts of its members' shards that give the group's tokens when put one after another."""
        parts: dict[int | None, list[Part]] = {}
        for run, part in self._in_order(rank):
            before = parts.setdefault(run.sample, [])
            if before and before[-1].member == part.member and before[-1].stop == part.start:
                part = before.pop()._replace(stop=part.stop)
            before.append(part)
        return {sample: tuple(each) for sample, each in parts.items()}

    def _in_order(self, rank: int) -> tuple[tuple[Run, Part], ...]:
        """A group's runs in the order of the stream, by the tokens that they will be, and where each comes from."""
        if rank not in self._placed:
            held = [
                (run, Part(place, run.start, run.stop))
                for place, member in enumerate(self.groups[rank])
                for run in self.layout.runs(member)
            ]
            held.sort(key=lambda item: (item[0].sample or 0, item[0].document, item[0].position))
            placed, sample, start = [], None, 0
            for run, part in held:
                if run.sample != sample:
                    sample, start = run.sample, 0
                stop = start + run.stop - run.start
                placed.append((run._replace(start=start, stop=stop), part))
                start = stop
            self._placed[rank] = tuple(placed)
        return self._placed[rank]


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same tokens in as few runs as possible."""
    result: list[Run] = []
    end: tuple[int, int, int, int | None] | None = None
    for run in runs:
        start, stop, position, document, sample = run
        if stop <= start:
            continue
        if (start, position, document, sample) == end:
            start, _, position, _, _ = result.pop()
            run = Run(start, stop, position, document, sample)
        result.append(run)
        end = stop, position + stop - start, document, sample
    return tuple(result)


def union(slices: Iterable[slice]) -> tuple[slice, ...]:
    """The tokens that any of them has, as few slices as possible, ascending."""
    result: list[slice] = []
    for each in sorted(slices, key=lambda each: each.start):
        if result and each.start <= result[-1].stop:
            result[-1] = slice(result[-1].start, max(result[-1].stop, each.stop))
        else:
            result.append(each)
    return tuple(result)


def within(tile: Tile, queries: slice, keys: slice) -> Tile | None:
    """The part of a tile between these queries and these keys; None where they see nothing of each other."""
    q0, q1, k0, k1, low, high, _, sample = _bounds(tile)
    q0, q1 = max(q0, queries.start), min(q1, queries.stop - 1)
    k0, k1 = max(k0, keys.start), min(k1, keys.stop - 1)
    if q0 > q1 or k0 > k1:
        return None
    part = _cropped(q0, q1, k0, k1, low, high, sample)
    return None if part is None else _tiles([part])[0]


_MANY_TILES = 8


def halves(tiles: tuple[Tile, ...]) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """The tiles in two parts of about the same area.

    A causal block's late queries see its early keys as a rectangle, which is half of it: kernels know that, and the two
    triangles that are left, better than what a cut across all keys would leave. Where that is no fair half (within a
    quarter of the area), the queries are cut. Many tiles, of documents, need not be cut: some are the one half.
    """
    if not tiles:
        return (), ()
    area = sum(tile.area for tile in tiles)
    queries = slice(min(t.queries.start for t in tiles), max(t.queries.stop for t in tiles))
    keys = slice(min(t.keys.start for t in tiles), max(t.keys.stop for t in tiles))
    for number, before in enumerate(accumulate((tile.area for tile in tiles), initial=0)):
        if abs(2 * before - area) * 4 <= area and len(tiles) >= _MANY_TILES:
            return tiles[:number], tiles[number:]
    early, late = _cut(queries, (queries.start + queries.stop) // 2)
    early_keys, late_keys = _cut(keys, (keys.start + keys.stop) // 2)
    first = _parts(tiles, [(late, early_keys)])
    if abs(2 * sum(tile.area for tile in first) - area) * 4 <= area:
        return first, _parts(tiles, [(early, early_keys), (early, late_keys), (late, late_keys)])

    def area_before(row: int) -> int:
        return sum(tile.area for tile in _parts(tiles, [(slice(queries.start, row), keys)]))

    row = bisect_left(range(queries.start, queries.stop), area, key=lambda row: 2 * area_before(row)) + queries.start
    early, late = _cut(queries, row)
    return _parts(tiles, [(early, keys)]), _parts(tiles, [(late, keys)])


def _cut(tokens: slice, at: int) -> tuple[slice, slice]:
    return slice(tokens.start, at), slice(at, tokens.stop)


def _parts(tiles: tuple[Tile, ...], rectangles: Sequence[tuple[slice, slice]]) -> tuple[Tile, ...]:
    parts = (within(tile, *rectangle) for rectangle in rectangles for tile in tiles)
    return tuple(part for part in parts if part is not None)


def check_runs(layout: Layout, *, whole: bool = True) -> None:
    """Raise ValueError unless every token of every rank is in one run, and every position of a document in one rank.

    whole: whether the latter is asked; queries may be those of some positions alone.
    """
    held: dict[tuple[int | None, int], list[tuple[int, int, int]]] = {}
    for rank in range(layout.num_ranks):
        runs, num_tokens = layout.runs(rank), layout.num_tokens(rank)
        place: dict[int | None, Run] = {}
        for run in runs:
            before = place.get(run.sample)
            expected = before.stop if before else 0
            if run.start != expected or run.stop <= run.start:
                raise ValueError(
                    f"rank {rank}: {run} does not begin at token {expected}, where the run before it ends, or is "
                    f"empty; runs hold each token once, in order."
                )
            if before and (before.document, before.position) >= (run.document, run.position):
                raise ValueError(f"rank {rank}: {run} comes after {before}; runs go by document and position.")
            place[run.sample] = run
            last = run.position + run.stop - run.start
            held.setdefault((run.sample, run.document), []).append((run.position, last, rank))
        if None in place and len(place) > 1:
            raise ValueError(f"rank {rank}: some runs are of all samples and some of one; give each a sample, or none.")
        for sample, run in place.items():
            if run.stop != num_tokens:
                raise ValueError(
                    f"rank {rank}: runs of sample {sample} end at {run.stop}, of {num_tokens} tokens; give runs of all."
                )
    for (sample, document), parts in held.items() if whole else ():
        parts.sort()
        ends = [0, *(last for _, last, _ in parts)]
        for expected, (first, _, rank) in zip(ends, parts, strict=False):
            if first != expected:
                what = "is held twice" if first < expected else "is held by no rank"
                raise ValueError(
                    f"position {min(first, expected)} of document {document}, sample {sample}, {what}: see rank "
                    f"{rank}; give each position to one rank."
                )


def _check_bands(bands: tuple[Band, ...]) -> None:
    for band in bands:
        first, last = band.keys
        if (None not in (band.behind, band.ahead) and band.behind + band.ahead < 0) or (  # type: ignore[operator]
            first < 0 or (last is not None and last < first)
        ):
            raise ValueError(f"{band}: nothing sees anything in it; it wants -ahead <= behind, and keys from 0 on.")
    for earlier, later in pairwise(sorted(bands, key=lambda band: band.keys[0])):
        if earlier.keys[1] is None or earlier.keys[1] > later.keys[0]:
            raise ValueError(f"{earlier} and {later} are about the same keys, which a query would see twice.")


def pairs_seen(bands: Iterable[Band], length: int, start: int, stop: int) -> int:
    """Pairs of the queries start..stop of a document of so many tokens and the keys that they see."""
    if bands == CAUSAL:
        return causal_pairs(start, stop)
    pairs = 0
    for behind, ahead, (first, last) in bands:
        last = length if last is None else min(last, length)
        if start < stop and first < last:
            low = first - stop if behind is None else -behind
            high = last - start if ahead is None else ahead
            pairs += band_area(start, stop - 1, first, last - 1, low, high)
    return pairs


def causal_pairs(start: int, stop: int) -> int:
    """`pairs_seen` of CAUSAL, as most documents are, of which there may be thousands."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


_Bounds = tuple[int, int, int, int, int, int, int, int | None]
"""Queries and keys from..to in local tokens, the last included; low and high; area; sample.

a sees b where low <= b - a <= high, and both bounds are reached. Thousands of these are made for a batch: they are
plain, and compared one by one where min and max would say it shorter.
"""


def _tiles(bounds: Iterable[_Bounds]) -> tuple[Tile, ...]:
    """As kernels know them."""
    make = tuple.__new__  # Tile itself would take twice as long, and there are thousands.
    return tuple(
        [
            make(
                Tile,
                (
                    slice(q0, q1 + 1),
                    slice(k0, k1 + 1),
                    k1 - q1 - low if low > k0 - q1 else None,
                    high + q1 - k1 if high < k1 - q0 else None,
                    area,
                    sample,
                ),
            )
            for q0, q1, k0, k1, low, high, area, sample in bounds
        ]
    )


def _bounds(tile: Tile) -> _Bounds:
    """The inverse of `_tiles`, of one."""
    q0, q1, k0, k1 = tile.queries.start, tile.queries.stop - 1, tile.keys.start, tile.keys.stop - 1
    low = k0 - q1 if tile.left is None else k1 - q1 - tile.left
    high = k1 - q0 if tile.right is None else tile.right + k1 - q1
    return q0, q1, k0, k1, low, high, tile.area, tile.sample


def _cropped(q0: int, q1: int, k0: int, k1: int, low: int, high: int, sample: int | None) -> _Bounds | None:
    """The band in a rectangle, both ends of which are included, cropped; None where nothing sees anything."""
    if k0 - high > q0:
        q0 = k0 - high
    if k1 - low < q1:
        q1 = k1 - low
    if q0 + low > k0:
        k0 = q0 + low
    if q1 + high < k1:
        k1 = q1 + high
    rows, keys = q1 - q0 + 1, k1 - k0 + 1
    if rows < 1 or keys < 1:
        return None
    # Two corners of the rectangle are cut off: since it is cropped, triangles that lie within it.
    area = rows * keys
    early, late = low - k0 + q1, k1 - q0 - high
    if early > 0:
        area -= early * (early + 1) // 2
    else:
        low = k0 - q1
    if late > 0:
        area -= late * (late + 1) // 2
    else:
        high = k1 - q0
    return q0, q1, k0, k1, low, high, area, sample


def band_area(q0: int, q1: int, k0: int, k1: int, low: int, high: int) -> int:
    """Pairs a in q0..q1, b in k0..k1, the last included, with low <= b - a <= high: all but those in two corners."""
    rows, keys = q1 - q0 + 1, k1 - k0 + 1
    area, early, late = rows * keys, low - k0 + q1, k1 - q0 - high
    if early > 0:
        area -= _corner(early, rows, keys)
    return area - _corner(late, rows, keys) if late > 0 else area


def _corner(side: int, rows: int, keys: int) -> int:
    """Pairs of a rectangle within a triangle on one of its corners, with so many on its legs."""
    if side <= rows and side <= keys:
        return side * (side + 1) // 2
    beyond = (max(0, side - each) for each in (rows, keys))
    twice = max(0, side - rows - keys)
    return (side * (side + 1) - sum(each * (each + 1) for each in beyond) + twice * (twice + 1)) // 2


def _merged(tiles: Iterable[_Bounds]) -> _Bounds | None:
    """All as one; None where they are none, or their union is no band on a rectangle. They are of one sample."""
    each = iter(tiles)
    first = next(each, None)
    if first is None:
        return None
    q0, q1, k0, k1, low, high, area, sample = first
    for first_query, last_query, first_key, last_key, lower, higher, more, _ in each:
        if first_query < q0:
            q0 = first_query
        if last_query > q1:
            q1 = last_query
        if first_key < k0:
            k0 = first_key
        if last_key > k1:
            k1 = last_key
        if lower < low:
            low = lower
        if higher > high:
            high = higher
        area += more
    return (q0, q1, k0, k1, low, high, area, sample) if band_area(q0, q1, k0, k1, low, high) == area else None


def _merged_keys(rows: list[list[_Bounds]]) -> Iterator[list[_Bounds]]:
    """The tiles of each row; one that continues the one before it is merged with that."""
    for row in rows:
        result: list[_Bounds] = []
        for bounds in row:
            merged = _merged((result[-1], bounds)) if result else None
            if merged is None:
                result.append(bounds)
            else:
                result[-1] = merged
        yield result


def _merged_rows(rows: Iterable[list[_Bounds]]) -> list[_Bounds]:
    """The tiles of all rows; one that continues a tile of the row before it is merged with that one."""
    result: list[_Bounds] = []
    above: dict[tuple[str, int], int] = {}  # Places in `result` by first and by last key: others cannot continue.
    for row in rows:
        edges: dict[tuple[str, int], int] = {}
        for bounds in row:
            _, _, first_key, last_key, *_ = bounds
            place = len(result)
            for edge in (("first", first_key), ("last", last_key), ("only", 0)):
                if edge in above and (merged := _merged((result[above[edge]], bounds))) is not None:
                    place = above[edge]
                    result[place] = merged
                    break
            else:
                result.append(bounds)
            edges["first", first_key] = edges["last", last_key] = place
        if len(row) == 1:
            edges["only", 0] = place
        above = edges
    return result


def _merged_along(tiles: Iterable[_Bounds]) -> list[_Bounds]:
    """The tiles of all documents: those of a token or two may go on where the one before them ends."""
    result: list[_Bounds] = []
    last_key, lowest, merged = 0, 0, None
    for bounds in tiles:
        first_query, _, _, key, low, _, _, sample = bounds
        # A band of both would let the later queries see the last of the earlier keys, mostly: seen at a glance.
        if lowest > last_key - first_query < low and result and sample == result[-1][7]:
            merged = _merged((result[-1], bounds))
        if merged is None:
            result.append(bounds)
            last_key, lowest = key, low
        else:
            result[-1] = merged
            _, _, _, last_key, lowest, _, _, _ = merged
            merged = None
    return result


_Document = int | tuple[int, int]
"""A document, after its sample where it has one."""

_Documents = dict[_Document, tuple[Run, ...]]
"""A rank's runs by document, as few as possible, in order.

A document's runs lie side by side: they are one part of the rank's tokens, in the order of positions.
"""


def _by_document(runs: Sequence[Run]) -> _Documents:
    # Thousands of documents have mostly a run each: those are left to loops in C.
    whole_batch = not runs or runs[0].sample is None
    if not whole_batch:
        runs = sorted(runs, key=itemgetter(4))
    documents: list[_Document] = list(map(itemgetter(3) if whole_batch else itemgetter(4, 3), runs))
    held: _Documents = dict(zip(documents, zip(runs, strict=False), strict=True))
    if len(held) < len(runs):
        several: dict[_Document, list[Run]] = {}
        for number in compress(count(), map(eq, documents, documents[1:])):
            several.setdefault(documents[number], [runs[number]]).append(runs[number + 1])
        held.update((document, joined(parts)) for document, parts in several.items())
    return held


def _triangle(runs: tuple[Run, ...]) -> _Bounds:
    """What a document's tokens on a rank see of themselves under a causal mask, whatever is between the runs."""
    q0, stop, _, _, sample = runs[0]
    if len(runs) > 1:
        _, stop, _, _, _ = runs[-1]
    q1, rows = stop - 1, stop - q0
    return q0, q1, q0, q1, 1 - rows, 0, rows * (rows + 1) // 2, sample


def _seen(queries: tuple[Run, ...], keys: tuple[Run, ...], bands: tuple[Band, ...]) -> list[_Bounds]:
    """What a document's queries see of its keys, as few tiles as possible.

    Runs at its ends that see nothing, or are seen by nothing, are left out. Then mostly all is seen of what is left, as
    of a zigzag's chunks of two ranks, or it is the one triangle of a rank's own tokens: its ends tell.
    """
    if len(bands) == 1:
        behind, ahead, (first, end) = bands[0]
        if first == 0 and end is None:
            q0, q_stop, query, _, sample = queries[0]
            q_last, q1, late_query, _, _ = queries[-1]
            last_query = late_query + q1 - q_last - 1
            if ahead == 0 and queries is keys and (behind is None or last_query - query <= behind):
                return [_triangle(queries)]
            k0, k_stop, key, _, _ = keys[0]
            k_last, k1, late_key, _, _ = keys[-1]
            last_key = late_key + k1 - k_last - 1
            if ahead is not None:
                while query + q_stop - q0 - 1 + ahead < key:
                    queries = queries[1:]
                    if not queries:
                        return []
                    q0, q_stop, query, _, _ = queries[0]
                while late_key > last_query + ahead:
                    keys = keys[:-1]
                    k_last, k1, late_key, _, _ = keys[-1]
                    last_key = late_key + k1 - k_last - 1
            if behind is not None:
                while late_query - behind > last_key:
                    queries = queries[:-1]
                    if not queries:
                        return []
                    q_last, q1, late_query, _, _ = queries[-1]
                    last_query = late_query + q1 - q_last - 1
                while key + k_stop - k0 - 1 + behind < query:
                    keys = keys[1:]
                    k0, k_stop, key, _, _ = keys[0]
            if (behind is None or last_query - key <= behind) and (ahead is None or last_key - query <= ahead):
                return [(q0, q1 - 1, k0, k1 - 1, k0 - q1 + 1, k1 - 1 - q0, (q1 - q0) * (k1 - k0), sample)]
    seen = [_seen_by(run, keys, bands) for run in queries]
    if len(seen) == 1 and len(seen[0]) < 2:
        return seen[0]
    one = _merged(chain.from_iterable(seen))
    return _merged_rows(_merged_keys(seen)) if one is None else [one]


def _seen_by(queries: Run, runs: tuple[Run, ...], bands: tuple[Band, ...]) -> list[_Bounds]:
    """The tiles of a document's keys that a run of its queries sees, band by band in the order of tokens."""
    tiles: list[_Bounds] = []
    q0, stop, query, _, sample = queries
    q1 = stop - 1
    for band in bands:
        behind, ahead, (first, end) = band
        for k0, stop, key, _, _ in runs if len(runs) < 3 else _reached(queries, runs, band):
            k1 = stop - 1
            low, high = k0 - q1, k1 - q0
            if key != _MANY:
                # Positions are by so much further apart than tokens.
                offset = query - q0 - key + k0
                if end is not None and key + k1 - k0 >= end:
                    k1 = k0 + end - 1 - key
                if first > key:
                    k0 += first - key
                if behind is not None:
                    low = offset - behind
                if ahead is not None:
                    high = offset + ahead
            if low <= k0 - q1 and k1 - q0 <= high and q0 <= q1 and k0 <= k1:  # All of it, as mostly.
                tiles.append((q0, q1, k0, k1, k0 - q1, k1 - q0, (q1 - q0 + 1) * (k1 - k0 + 1), sample))
            elif (bounds := _cropped(q0, q1, k0, k1, low, high, sample)) is not None:
                tiles.append(bounds)
    return tiles


_MANY = -1
"""The position of a run that is many, each of them seen by all."""


def _reached(queries: Run, runs: Sequence[Run], band: Band) -> list[Run]:
    """The runs of keys that a query sees something of.

    Those that every query sees as a whole are one without a position: they lie side by side.
    """
    first, last = queries.position, _last(queries)
    lowest, highest = _limits(band, first, last)
    begin = max(0, bisect_right(runs, lowest, key=_position) - 1)
    end = bisect_right(runs, highest, begin, key=_position)
    reached = list(runs[begin:end])
    lowest, highest = _limits(band, last, first)
    whole = bisect_left(runs, lowest, begin, end, key=_position)
    whole_end = bisect_right(runs, highest, whole, end, key=_position)
    if whole < whole_end and _last(runs[whole_end - 1]) > highest:
        whole_end -= 1
    if whole_end - whole > 1:
        side_by_side = Run(runs[whole].start, runs[whole_end - 1].stop, _MANY)
        reached[whole - begin : whole_end - begin] = [side_by_side]
    return reached


def _position(run: Run) -> int:
    return run.position


class _QueryIndex:
    """Which ranks hold the queries of each document, in the order of positions."""

    def __init__(self, layout: Layout) -> None:
        self._num_ranks = layout.num_ranks
        held: dict[tuple[int | None, int], list[tuple[int, int, int]]] = {}
        for rank in range(layout.num_ranks):
            for run in layout.runs(rank):
                held.setdefault((run.sample, run.document), []).append((run.position, _last(run), rank))
        self._held = {of: tuple(zip(*sorted(runs), strict=True)) for of, runs in held.items()}

    def ranks_that_see(self, keys: Iterable[Run], plan: AttentionPlan) -> frozenset[int]:
        """Those with a query that a band lets see one of these keys, or a position between two of them."""
        ranks: set[int] = set()
        for run in keys:
            firsts, lasts, ranks_of = self._held.get((run.sample, run.document), ((), (), ()))
            for band in plan.bands_in(run.document):
                key, last_key = max(run.position, band.keys[0]), _last(run)
                if band.keys[1] is not None:
                    last_key = min(last_key, band.keys[1] - 1)
                if key > last_key:
                    continue
                begin = 0 if band.ahead is None else bisect_left(lasts, key - band.ahead)
                end = len(firsts) if band.behind is None else bisect_right(firsts, last_key + band.behind)
                ranks.update(ranks_of[begin:end])
            if len(ranks) == self._num_ranks:
                break
        return frozenset(ranks)


def _limits(band: Band, lowest_query: int, highest_query: int) -> tuple[float, float]:
    """The first and the last key that a query sees, of the lowest and of the highest one."""
    first, stop = band.keys
    begin = first if band.behind is None else max(first, lowest_query - band.behind)
    end = float("inf") if band.ahead is None else highest_query + band.ahead
    return begin, end if stop is None else min(end, stop - 1)


def _last(run: Run) -> int:
    """Position of its last token."""
    return run.position + run.stop - run.start - 1
