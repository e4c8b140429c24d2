"""Rounds of an all-to-all: who sends to whom when.

Note [Rounds]
    In each round of an all-to-all every rank sends to one other and receives from one, so that no link has several
    messages in its queue while another one is idle. Started all at once, they queue as they come, and the longest queue
    is waited for. Links between nodes, moreover, want rounds in which all ranks leave their node, or none does. By
    distance, with four ranks to a node, rank 3 leaves it from distance 1 on, and rank 0 from 4 on: 15 of 16 ranks'
    rounds cross for somebody. So numbers are added digit by digit, without carry, digits being those of the prime
    factors of the size:

        round    1  2  3   4  5  6  7   8 ...        of 16 = 2 * 2 * 2 * 2 ranks, where it is rank XOR round:
        rank 0   1  2  3   4  5  6  7   8            rounds 1 to 3 stay inside a node, 4 to 15 cross, for every rank
        rank 3   2  1  0   7  6  5  4  11

    Two rounds are under way at a time, so that the next one begins without a pause; among up to four ranks all are.
"""

import functools
import math
from typing import NamedTuple

_FEW = 4
"""Ranks whose rounds are all under way at once: of small messages an exchange then takes 0.85 to 0.95 of the time, and
of large ones no more."""


def rounds_under_way(size: int) -> int:
    """How many rounds of so many ranks to start before the first is waited for.

    16 ranks take 1.04 times what the links need with 1 or 2, 1.1 to 1.16 with 3 or 4, 1.2 to 1.4 with all at once.
    """
    return size if size <= _FEW else 2


class Round(NamedTuple):
    """To whom a rank sends, and from whom it receives."""

    to: int
    source: int


@functools.lru_cache(maxsize=1024)
def rounds(rank: int, size: int) -> tuple[Round, ...]:
    """All rounds of a rank of so many, see Note [Rounds]."""
    radices = _prime_factors(size)
    return tuple(
        Round(_shifted(rank, distance, radices, 1), _shifted(rank, distance, radices, -1))
        for distance in range(1, size)
    )


def _shifted(rank: int, distance: int, radices: list[int], sign: int) -> int:
    """rank + sign * distance without carry; the first radix is that of the lowest digit."""
    shifted, weight = 0, 1
    for radix in radices:
        shifted += (rank // weight + sign * (distance // weight)) % radix * weight
        weight *= radix
    return shifted


def _prime_factors(number: int) -> list[int]:
    """In ascending order; none of 1."""
    if number == 1:
        return []
    smallest = next((factor for factor in range(2, math.isqrt(number) + 1) if number % factor == 0), number)
    return [smallest, *_prime_factors(number // smallest)]
