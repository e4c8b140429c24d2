"""Documents and pieces of them dealt to ranks that have room for so many tokens, so that all compute as much.

Integers and slices; no torch.

Note [Balance]
    Each rank wants as much area (pairs of query and key that see each other) as the others, and has room for so many
    tokens. What it still wants, divided by the room that is left, is the density that it needs; the density of a piece
    is its area by its tokens. The densest piece goes to the rank that needs the densest, again and again: the needs
    draw together, and what is left in the end are pieces that hardly count. A piece that is longer than the room is
    split, and its late part stays.

    The fewer documents are cut, the less K/V travels. So documents that are longer than a piece may first be placed
    whole, from the largest area down, each on the rank that wants most, where its area and room allow that and it can
    still come to its share: what it then needs must not be denser than what the documents offer that have to be cut.
    Those are dealt as above, with the documents that are a piece each in any case.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens start..stop of a document."""

    document: int
    start: int
    stop: int


_REACH = 0.75
"""Of the highest density among what is cut: what a rank may still need. At 1 it would need nothing but such pieces."""

_SLACK = 0.02
"""Of a rank's share of the area: what it may miss when it is full."""


def deal(
    lengths: Sequence[int],
    area: Callable[[int, int, int], int],
    room: Sequence[int],
    owed: Sequence[float],
    *,
    chunks: int,
    keep_whole: bool,
) -> tuple[list[list[Piece]], list[float]]:
    """The pieces that each rank holds, in order, and the area that each is still owed.

    lengths: tokens of each document. area: what tokens start..stop of a document see. room: tokens that each rank
    takes, in all as many as there are. owed: area that a rank wants beyond its equal share. chunks: a piece of a
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
        pieces = set(dealt).difference(longer)
        highest = max((area(each, lengths[each] - 1, lengths[each]) for each in pieces), default=0)
        usual = sum(areas[each] for each in pieces) / max(1, sum(lengths[each] for each in pieces))
        whole = _place_whole(longer, lengths, areas, area, ranks, _SLACK * share, (usual, highest))
        dealt = [document for document in dealt if document not in whole]
    _deal_pieces([piece for each in dealt for piece in _cut(each, lengths[each], areas[each], most)], area, ranks)
    for held in ranks.held:
        held.sort()
    return ranks.held, ranks.wanted


class _Ranks(NamedTuple):
    """Tokens that each still takes, area that it still wants, and what it holds."""

    room: list[int]
    wanted: list[float]
    held: list[list[Piece]]

    def give(self, rank: int, piece: Piece, area: int) -> None:
        self.room[rank] -= piece.stop - piece.start
        self.wanted[rank] -= area
        self.held[rank].append(piece)


def _place_whole(
    documents: Iterable[int],
    lengths: Sequence[int],
    areas: Sequence[int],
    area: Callable[[int, int, int], int],
    ranks: _Ranks,
    slack: float,
    offered: tuple[float, float],
) -> set[int]:
    """Those of the documents, which come by their area, that have been placed; the others are to be cut."""
    room, wanted, _ = ranks
    queue = [(-want, rank) for rank, want in enumerate(wanted) if room[rank]]
    heapq.heapify(queue)
    whole, sparsest, densest = set(), (1 - _REACH) * offered[0], _REACH * offered[1]
    for document in documents:
        length, its_area = lengths[document], areas[document]
        rank = queue[0][1] if queue else 0
        left, tokens_left = wanted[rank] - its_area, room[rank] - length
        if tokens_left >= 0 and tokens_left * sparsest <= left <= tokens_left * densest + slack:
            ranks.give(rank, Piece(document, 0, length), its_area)
            whole.add(document)
            if room[rank]:
                heapq.heapreplace(queue, (-left, rank))
            else:
                heapq.heappop(queue)
        else:
            densest = max(densest, _REACH * area(document, length - 1, length))
    return whole


def _cut(document: int, length: int, area: int, most: tuple[float, float]) -> Iterator[Piece]:
    """A document in pieces of as many tokens, the most that they may have. most: tokens, and area on the average."""
    count = min(length, max(1, math.ceil(length / most[0]), math.ceil(area / most[1]) if area else 1))
    for number in range(count):
        yield Piece(document, length * number // count, length * (number + 1) // count)


def _deal_pieces(pieces: list[Piece], area: Callable[[int, int, int], int], ranks: _Ranks) -> None:
    """The densest piece to the rank that needs the densest, until there is none left."""
    room, wanted, _ = ranks
    measured = [(area(*piece), piece) for piece in pieces]
    measured.sort(key=lambda item: (item[0] / (item[1].stop - item[1].start), item[1]))
    queue = [(-wanted[rank] / tokens, rank) for rank, tokens in enumerate(room) if tokens]
    heapq.heapify(queue)
    while measured:
        its_area, piece = measured.pop()
        rank = queue[0][1]
        document, start, stop = piece
        if stop - start > room[rank]:
            middle = stop - room[rank]
            measured.append((area(document, start, middle), Piece(document, start, middle)))
            piece = Piece(document, middle, stop)
            its_area = area(*piece)
        ranks.give(rank, piece, its_area)
        if room[rank]:
            heapq.heapreplace(queue, (-wanted[rank] / room[rank], rank))
        else:
            heapq.heappop(queue)
