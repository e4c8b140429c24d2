"""Packed documents to measure layouts on, and what is measured of a plan: area and tokens that travel."""

import math
import random

from mindspeed_cp.plan import AttentionPlan


def lognormal_mix(seed: int, length: int, mean: float | None = None) -> tuple[int, ...]:
    """Lengths of documents that make up so many tokens: lognormal, sigma 1, a sixteenth of all on the average.

    mean: tokens of a document on the average, where that is something else. The last one is cut at the end.
    """
    rng, lengths, left = random.Random(seed), list[int](), length
    location = math.log(mean or length / 16) - 0.5
    while left:
        lengths.append(min(left, max(1, round(rng.lognormvariate(location, 1)))))
        left -= lengths[-1]
    return tuple(lengths)


def areas(plan: AttentionPlan) -> list[int]:
    """Pairs of query and key that each rank computes."""
    ranks = range(plan.queries.num_ranks)
    return [sum(plan.area(mine, theirs) for theirs in range(plan.keys.num_ranks)) for mine in ranks]


def unevenness(loads: list[int]) -> float:
    """The largest by the mean: the time of a step in which all wait for the last, by the least possible."""
    return max(loads) * len(loads) / sum(loads)


def received(plan: AttentionPlan) -> int:
    """Tokens of others that the ranks need, all together: what direct transport sends."""
    pairs = ((mine, theirs) for mine in range(plan.queries.num_ranks) for theirs in range(plan.keys.num_ranks))
    slices = (each for mine, theirs in pairs if mine != theirs for each in plan.needed(mine, theirs))
    return sum(each.stop - each.start for each in slices)
