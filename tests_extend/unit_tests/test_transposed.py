"""Plans whose queries travel: the same pairs, told from the side of the keys."""

from collections import Counter

from mindspeed_cp.program import TransposedPlan
from unit_tests.test_plan import pairs_of_ranks, random_plans, seen_by_tiles


def test_tiles_of_queries_that_travel_hold_the_pairs_of_the_attention():
    for plan in random_plans(20):
        turned = TransposedPlan(plan)
        for query_rank, key_rank in pairs_of_ranks(plan):
            pairs = Counter(
                (sample, key, query) for sample, query, key in seen_by_tiles(plan.tiles(query_rank, key_rank))
            )
            assert Counter(seen_by_tiles(turned.tiles(key_rank, query_rank))) == pairs
