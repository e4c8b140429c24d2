r"""Rectangles of local tokens in which a band says who sees whom: what a kernel computes.

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

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple


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


Bounds = tuple[int, int, int, int, int, int, int, int | None]
"""Queries and keys from..to in local tokens, the last included; low and high; area; sample.

a sees b where low <= b - a <= high, and both bounds are reached. Thousands of these are made for a batch: they are
plain, and compared one by one where min and max would say it shorter.
"""


def tiles_of(each: Iterable[Bounds]) -> tuple[Tile, ...]:
    """As kernels know them. Documents of a token or two may go on where the one before them ends: those are merged."""
    tiles: list[Tile] = []
    make = tuple.__new__  # Tile itself would take twice as long, and there are thousands.
    before: Bounds | None = None
    last_key, lowest = 0, 0
    for bounds in each:
        q0, q1, k0, k1, low, high, area, sample = bounds
        # A band of both would let the later queries see the last of the earlier keys, mostly: seen at a glance.
        if lowest > last_key - q0 < low and before is not None and sample == before[7]:
            merged = merge((before, bounds))
            if merged is not None:
                tiles.pop()
                q0, q1, k0, k1, low, high, area, sample = bounds = merged
        left = k1 - q1 - low if low > k0 - q1 else None
        right = high + q1 - k1 if high < k1 - q0 else None
        tiles.append(make(Tile, (slice(q0, q1 + 1), slice(k0, k1 + 1), left, right, area, sample)))
        before, last_key, lowest = bounds, k1, low
    return tuple(tiles)


def bounds_of(tile: Tile) -> Bounds:
    """The inverse of `tiles_of`, of one."""
    q0, q1, k0, k1 = tile.queries.start, tile.queries.stop - 1, tile.keys.start, tile.keys.stop - 1
    low = k0 - q1 if tile.left is None else k1 - q1 - tile.left
    high = k1 - q0 if tile.right is None else tile.right + k1 - q1
    return q0, q1, k0, k1, low, high, tile.area, tile.sample


def cropped(q0: int, q1: int, k0: int, k1: int, low: int, high: int, sample: int | None) -> Bounds | None:
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


def merge(tiles: Iterable[Bounds]) -> Bounds | None:
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


def merge_keys(rows: list[list[Bounds]]) -> Iterator[list[Bounds]]:
    """The tiles of each row; one that continues the one before it is merged with that."""
    for row in rows:
        result: list[Bounds] = []
        for bounds in row:
            merged = merge((result[-1], bounds)) if result else None
            if merged is None:
                result.append(bounds)
            else:
                result[-1] = merged
        yield result


def merge_rows(rows: Iterable[list[Bounds]]) -> list[Bounds]:
    """The tiles of all rows; one that continues a tile of the row before it is merged with that one."""
    result: list[Bounds] = []
    above: dict[tuple[str, int], int] = {}  # Places in `result` by first and by last key: others cannot continue.
    for row in rows:
        edges: dict[tuple[str, int], int] = {}
        for bounds in row:
            _, _, first_key, last_key, *_ = bounds
            place = len(result)
            for edge in (("first", first_key), ("last", last_key), ("only", 0)):
                if edge in above and (merged := merge((result[above[edge]], bounds))) is not None:
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
    q0, q1, k0, k1, low, high, _, sample = bounds_of(tile)
    q0, q1 = max(q0, queries.start), min(q1, queries.stop - 1)
    k0, k1 = max(k0, keys.start), min(k1, keys.stop - 1)
    if q0 > q1 or k0 > k1:
        return None
    part = cropped(q0, q1, k0, k1, low, high, sample)
    return None if part is None else tiles_of([part])[0]


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
