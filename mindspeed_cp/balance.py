"""Documents and stretches of them dealt to ranks that have room for so many tokens, so that all compute as much.

Integers and slices; no torch.

Note [Balance]
    Each rank wants as much area (pairs of query and key that see each other) as the others, and has room for so many
    tokens. What it still wants, divided by the room that is left, is the density that it needs; the density of a
    stretch is its area by its tokens. The densest stretch goes to the rank that needs the densest, again and again: the
    needs draw together, and what is left in the end are stretches that hardly count. A stretch that is longer than the
    room is split, and its late part stays.

    The fewer documents are cut, the less K/V travels. So documents that are longer than a stretch may first be placed
    whole, from the largest area down, each on the rank that wants most, where its area and room allow that and it can
    still come to its share: what it then needs must not be denser than what the documents offer that have to be cut.
    Those are dealt as above, with the documents that are a stretch each in any case.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

Stretch = tuple[int, int, int]
"""Document, start and stop: some of its tokens. There are thousands of a batch, so they are plain."""

Area = Callable[[int, int, int], int]
"""Pairs of query and key that tokens start..stop of a document see, by its number."""

_Measured = tuple[float, int, int, int, int]
"""Density, document, start, stop and area; they are sorted by it."""

_REACH = 0.75
"""Of the highest density among what is cut: what a rank may still need. At 1 it would need nothing but such."""

_SLACK = 0.02
"""Of a rank's share of the area: what it may miss when it is full."""


def deal(
    lengths: Sequence[int],
    area: Area,
    room: Sequence[int],
    owed: Sequence[float],
    *,
    chunks: int,
    keep_whole: bool,
) -> tuple[list[list[Stretch]], list[float]]:
    """The stretches that each rank holds, in order, and the area that each is still owed.

    lengths: tokens of each document. area: what tokens start..stop of a document see. room: tokens that each rank
    takes, in all as many as there are. owed: area that a rank wants beyond its equal share. chunks: a stretch of a
    document that is cut has at most this part of a rank's tokens and of its area. keep_whole: whether documents stay
    whole where they fit, see Note [Balance].
    """
    areas = [area(document, 0, length) for document, length in enumerate(lengths)]
    taking = max(1, sum(tokens > 0 for tokens in room))
    share = sum(areas) / taking
    wanted = [more + share * (tokens > 0) for more, tokens in zip(owed, room, strict=True)]
    ranks = _Ranks(list(room), wanted, [[] for _ in room])
    most = sum(lengths) / taking / chunks, share / chunks
    dealt = [document for document, length in enumerate(lengths) if length]
    if keep_whole:
        longer = [each for each in dealt if lengths[each] > most[0] or areas[each] > most[1]]
        longer.sort(key=lambda document: (-areas[document], -lengths[document]))
        shorter = set(dealt).difference(longer)
        highest = max((area(each, lengths[each] - 1, lengths[each]) for each in shorter), default=0)
        usual = sum(areas[each] for each in shorter) / max(1, sum(lengths[each] for each in shorter))
        whole = _place_whole(longer, lengths, areas, area, ranks, _SLACK * share, (usual, highest))
        dealt = [document for document in dealt if document not in whole]
    stretches: list[_Measured] = []
    for document in dealt:
        length, its_area = lengths[document], areas[document]
        if length <= most[0] and its_area <= most[1]:
            stretches.append((its_area / length, document, 0, length, its_area))
        else:
            stretches += _cut(document, length, its_area, most, area)
    _deal_stretches(stretches, area, ranks)
    for held in ranks.held:
        held.sort()
    return ranks.held, ranks.wanted


class _Ranks(NamedTuple):
    """Tokens that each still takes, area that it still wants, and what it holds."""

    room: list[int]
    wanted: list[float]
    held: list[list[Stretch]]


def _place_whole(
    documents: Iterable[int],
    lengths: Sequence[int],
    areas: Sequence[int],
    area: Area,
    ranks: _Ranks,
    slack: float,
    offered: tuple[float, float],
) -> set[int]:
    """Those of the documents, which come by their area, that have been placed; the others are to be cut."""
    room, wanted, held = ranks
    queue = [(-want, rank) for rank, want in enumerate(wanted) if room[rank]]
    heapq.heapify(queue)
    whole, sparsest, densest = set(), (1 - _REACH) * offered[0], _REACH * offered[1]
    for document in documents:
        length, its_area = lengths[document], areas[document]
        rank = queue[0][1] if queue else 0
        left, tokens_left = wanted[rank] - its_area, room[rank] - length
        if tokens_left >= 0 and tokens_left * sparsest <= left <= tokens_left * densest + slack:
            room[rank], wanted[rank] = tokens_left, left
            held[rank].append((document, 0, length))
            whole.add(document)
            if tokens_left:
                heapq.heapreplace(queue, (-left, rank))
            else:
                heapq.heappop(queue)
        else:
            densest = max(densest, _REACH * area(document, length - 1, length))
    return whole


def _cut(document: int, length: int, its_area: int, most: tuple[float, float], area: Area) -> Iterator[_Measured]:
    """A document in stretches of as many tokens, the most that they may have. most: tokens, and area on the average."""
    count = min(length, max(math.ceil(length / most[0]), math.ceil(its_area / most[1]) if its_area else 1))
    for number in range(count):
        yield _measured(document, length * number // count, length * (number + 1) // count, area)


def _measured(document: int, start: int, stop: int, area: Area) -> _Measured:
    its_area = area(document, start, stop)
    return its_area / (stop - start), document, start, stop, its_area


def _deal_stretches(stretches: list[_Measured], area: Area, ranks: _Ranks) -> None:
    """The densest stretch to the rank that needs the densest, until there is none left."""
    room, wanted, held = ranks
    stretches.sort()
    queue = [(-wanted[rank] / tokens, rank) for rank, tokens in enumerate(room) if tokens]
    heapq.heapify(queue)
    while stretches:
        _, document, start, stop, its_area = stretches.pop()
        rank = queue[0][1]
        left = room[rank] - stop + start
        if left < 0:
            stretches.append(_measured(document, start, start - left, area))
            start, left = start - left, 0
            its_area = area(document, start, stop)
        room[rank] = left
        wanted[rank] = want = wanted[rank] - its_area
        held[rank].append((document, start, stop))
        if left:
            heapq.heapreplace(queue, (-want / left, rank))
        else:
            heapq.heappop(queue)
