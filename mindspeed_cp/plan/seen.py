"""What the queries of one rank see of the keys of another, document by document, as few tiles as possible."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import chain, compress, count
from operator import eq, itemgetter

from mindspeed_cp.plan.bands import Band, limits
from mindspeed_cp.plan.runs import Layout, Run, joined, last_position
from mindspeed_cp.plan.tiles import Bounds, Tile, cropped, merge, merge_keys, merge_rows

_Document = int | tuple[int, int]
"""A document, after its sample where it has one."""


_Ends = tuple[int, int, int, int, int, int, int, int, int, int, int | None]
"""Of a document on a rank: its first token and position; the last position of its first run, and where the second one
begins; where the last run begins, and the last position before; its last position, and where it ends; its sample.
"""


class Documents:
    """A rank's runs by document.

    runs: as few as possible of each, in the order of the stream. They lie side by side: a document's tokens are one
    part of the rank's, in the order of positions.
    """

    __slots__ = ("_ends", "runs")

    def __init__(self, runs: Sequence[Run]) -> None:
        # Thousands of documents have mostly a run each: those are left to loops in C.
        whole_batch = not runs or runs[0].sample is None
        if not whole_batch:
            runs = sorted(runs, key=itemgetter(4))
        documents: list[_Document] = list(map(itemgetter(3) if whole_batch else itemgetter(4, 3), runs))
        self.runs: dict[_Document, tuple[Run, ...]] = dict(zip(documents, zip(runs, strict=False), strict=True))
        self._ends: dict[_Document, _Ends] = {}
        if len(self.runs) < len(runs):
            several: dict[_Document, list[Run]] = {}
            for number in compress(count(), map(eq, documents, documents[1:])):
                several.setdefault(documents[number], [runs[number]]).append(runs[number + 1])
            self.runs.update((document, joined(parts)) for document, parts in several.items())

    def ends_of(self, documents: Set[_Document]) -> "dict[_Document, _Ends]":
        """The ends of these at least, which are looked at once."""
        if len(self._ends) < len(self.runs):
            for document in documents - self._ends.keys():
                self._ends[document] = _ends(self.runs[document])
        return self._ends


def _ends(runs: tuple[Run, ...]) -> _Ends:
    start, second, first, _, sample = runs[0]
    late, stop, late_first, _, _ = runs[-1]
    early_last, last = first + second - start - 1, late_first + stop - late - 1
    if len(runs) == 1:
        # What would be left without its run begins where that ends, and ends where that begins.
        second_first, before = last + 1, first - 1
    elif len(runs) == 2:
        second_first, before = late_first, early_last
    else:
        second_first, before = runs[1].position, last_position(runs[-2])
    return start, first, early_last, second, second_first, late, late_first, before, last, stop, sample


def over_all_keys(bands: tuple[Band, ...]) -> Band | None:
    """The one band of all keys, where that is what they are: all but prefixes."""
    return bands[0] if len(bands) == 1 and bands[0].keys == (0, None) else None


def glance(queries: _Ends, keys: _Ends, band: Band) -> Bounds | tuple[()] | None:
    """What a document's queries see of its keys where the ends tell: nothing, or all that is left without a first and
    a last run that see nothing or are seen by nothing, as of a zigzag's chunks of two ranks. None where they do not.
    """
    behind, ahead, _ = band
    q0, query, early_query, q_second, query_second, q_late, late_query, query_before, last_query, q_stop, sample = (
        queries
    )
    k0, key, early_key, k_second, key_second, k_late, late_key, key_before, last_key, k_stop, _ = keys
    if ahead is not None:
        if early_query + ahead < key:
            q0, query = q_second, query_second
        if late_key > last_query + ahead:
            k_stop, last_key = k_late, key_before
    if behind is not None:
        if late_query - behind > last_key:
            q_stop, last_query = q_late, query_before
        if early_key < query - behind:
            k0, key = k_second, key_second
    rows, width = q_stop - q0, k_stop - k0
    if rows < 1 or width < 1:
        return ()
    if (ahead is None or last_key <= query + ahead) and (behind is None or last_query - behind <= key):
        q1, k1 = q_stop - 1, k_stop - 1
        return q0, q1, k0, k1, k0 - q1, k1 - q0, rows * width, sample
    return None


def triangles(documents: Iterable[tuple[Run, ...]]) -> tuple[Tile, ...]:
    """What documents see of themselves on a rank under a causal mask, whatever lies between their runs.

    Those of one token that follow each other are one diagonal.
    """
    tiles: list[Tile] = []
    make, alone = tuple.__new__, 0  # How many of one token have come last.
    for runs in documents:
        start, stop, _, _, sample = runs[0]
        if len(runs) > 1:
            _, stop, _, _, _ = runs[-1]
        rows = stop - start
        if rows > 1:
            tokens, alone = slice(start, stop), 0
            tiles.append(make(Tile, (tokens, tokens, None, 0, rows * (rows + 1) // 2, sample)))
            continue
        if alone and tiles[-1].sample == sample:
            tiles.pop()
            alone += 1
        else:
            alone = 1
        tokens, bound = slice(stop - alone, stop), 0 if alone > 1 else None
        tiles.append(make(Tile, (tokens, tokens, bound, bound, alone, sample)))
    return tuple(tiles)


def bounds_between(queries: tuple[Run, ...], keys: tuple[Run, ...], bands: tuple[Band, ...]) -> list[Bounds]:
    """What a document's queries see of its keys, as few tiles as possible."""
    rows = [_seen_by(run, keys, bands) for run in queries]
    if len(rows) == 1 and len(rows[0]) < 2:
        return rows[0]
    one = merge(chain.from_iterable(rows))
    return merge_rows(merge_keys(rows)) if one is None else [one]


def _seen_by(queries: Run, runs: tuple[Run, ...], bands: tuple[Band, ...]) -> list[Bounds]:
    """The tiles of a document's keys that a run of its queries sees, band by band in the order of tokens."""
    tiles: list[Bounds] = []
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
            elif (bounds := cropped(q0, q1, k0, k1, low, high, sample)) is not None:
                tiles.append(bounds)
    return tiles


_MANY = -1
"""The position of a run that is many, each of them seen by all."""


def _reached(queries: Run, runs: Sequence[Run], band: Band) -> list[Run]:
    """The runs of keys that a query sees something of.

    Those that every query sees as a whole are one without a position: they lie side by side.
    """
    first, last = queries.position, last_position(queries)
    lowest, highest = limits(band, first, last)
    begin = max(0, bisect_right(runs, lowest, key=_position) - 1)
    end = bisect_right(runs, highest, begin, key=_position)
    reached = list(runs[begin:end])
    lowest, highest = limits(band, last, first)
    whole = bisect_left(runs, lowest, begin, end, key=_position)
    whole_end = bisect_right(runs, highest, whole, end, key=_position)
    if whole < whole_end and last_position(runs[whole_end - 1]) > highest:
        whole_end -= 1
    if whole_end - whole > 1:
        side_by_side = Run(runs[whole].start, runs[whole_end - 1].stop, _MANY)
        reached[whole - begin : whole_end - begin] = [side_by_side]
    return reached


def _position(run: Run) -> int:
    return run.position


class QueryIndex:
    """Which ranks hold the queries of each document, in the order of positions."""

    def __init__(self, layout: Layout) -> None:
        self._num_ranks = layout.num_ranks
        held: dict[tuple[int | None, int], list[tuple[int, int, int]]] = {}
        for rank in range(layout.num_ranks):
            for run in layout.runs(rank):
                held.setdefault((run.sample, run.document), []).append((run.position, last_position(run), rank))
        self._held = {of: tuple(zip(*sorted(runs), strict=True)) for of, runs in held.items()}

    def ranks_that_see(self, keys: Iterable[Run], bands_in: Callable[[int], tuple[Band, ...]]) -> frozenset[int]:
        """Those with a query that a band lets see one of these keys, or a position between two of them.

        bands_in: what a query of a document sees of it.
        """
        ranks: set[int] = set()
        for run in keys:
            firsts, lasts, ranks_of = self._held.get((run.sample, run.document), ((), (), ()))
            for band in bands_in(run.document):
                key, last_key = max(run.position, band.keys[0]), last_position(run)
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
