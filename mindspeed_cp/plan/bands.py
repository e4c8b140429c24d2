"""What a query sees of its document: by distance, and among which keys."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from mindspeed_cp.plan.tiles import band_area


class Band(NamedTuple):
    """Query i of a document sees its key j where -ahead <= i - j <= behind; None is without bound.

    keys: the positions of the keys that it is about, from..to, the last excluded; the bands of one
    document are about different keys.
    """

    behind: int | None
    ahead: int | None
    keys: tuple[int, int | None] = (0, None)


FULL = (Band(None, None),)
"""A query sees all of its document."""
CAUSAL = (Band(None, 0),)
"""A query sees itself and what came before."""


def check_bands(bands: tuple[Band, ...]) -> None:
    """Raise ValueError for a band in which nothing sees anything, or bands about the same keys."""
    for band in bands:
        if not isinstance(band, Band):
            raise ValueError(f"bands hold {band!r}; give Band(behind, ahead), None being without bound.")
        first, last = band.keys
        if (None not in (band.behind, band.ahead) and band.behind + band.ahead < 0) or (  # type: ignore[operator]
            first < 0 or (last is not None and last < first)
        ):
            raise ValueError(f"{band}: nothing sees anything in it; it wants -ahead <= behind, and keys from 0 on.")
    for earlier, later in pairwise(sorted(bands, key=lambda band: band.keys[0])):
        if earlier.keys[1] is None or earlier.keys[1] > later.keys[0]:
            raise ValueError(
                f"{earlier} and {later} are about the same keys, which a query would see twice; give each key to "
                f"one band."
            )


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


def limits(band: Band, lowest_query: int, highest_query: int) -> tuple[float, float]:
    """The first and the last key that a query sees, of the lowest and of the highest one."""
    first, stop = band.keys
    begin = first if band.behind is None else max(first, lowest_query - band.behind)
    end = float("inf") if band.ahead is None else highest_query + band.ahead
    return begin, end if stop is None else min(end, stop - 1)
