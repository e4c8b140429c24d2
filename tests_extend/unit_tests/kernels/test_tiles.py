"""Tiles cut into what kernels take: rectangles and triangles that cover them."""

from collections import Counter
from itertools import product

import pytest

from mindspeed_cp.kernels.tiles import cut
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import AttentionPlan, Band, Tile
from unit_tests.test_plan import pairs_of_ranks, random_plans, seen_by_tiles


def is_taken(tile: Tile) -> bool:
    square = tile.queries.stop - tile.queries.start == tile.keys.stop - tile.keys.start
    return (tile.left, tile.right) == (None, None) or (square and (tile.left, tile.right) in ((None, 0), (0, None)))


def test_cut_tiles_are_rectangles_and_triangles_that_cover_the_tile_once():
    for plan in random_plans(200):
        for pair in pairs_of_ranks(plan):
            for tile in plan.tiles(*pair):
                parts = cut(tile)
                assert all(is_taken(part) for part in parts), (tile, parts)
                assert Counter(seen_by_tiles(parts)) == Counter(seen_by_tiles((tile,)))


@pytest.mark.parametrize(("behind", "ahead"), list(product((None, 0, 3, 9), repeat=2)))
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (9, 4), (4, 11), (16, 16)])
def test_every_window_on_every_rectangle_is_cut_into_few(queries, keys, behind, ahead):
    plan = AttentionPlan(
        EqualChunks(1, queries, "contiguous"), EqualChunks(1, keys, "contiguous"), (Band(behind, ahead),)
    )
    for tile in plan.tiles(0, 0):
        parts = cut(tile)
        assert Counter(seen_by_tiles(parts)) == Counter(seen_by_tiles((tile,)))
        width = 1 if None in (behind, ahead) else behind + ahead + 1
        assert len(parts) <= (4 if None in (behind, ahead) else 8 * (queries // width + 1))


def test_what_kernels_take_is_not_cut():
    zigzag = EqualChunks(4, 8)
    for plan in (AttentionPlan(zigzag, zigzag), AttentionPlan(zigzag, zigzag, (Band(None, None),))):
        for pair in pairs_of_ranks(plan):
            assert all(cut(tile) == (tile,) for tile in plan.tiles(*pair))
