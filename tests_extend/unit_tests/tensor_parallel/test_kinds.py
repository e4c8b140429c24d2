"""Kinds, their grids and groups: which rank is where, who is in a group with whom, and which sizes are refused."""

import re

import pytest

from mindspeed_cp.tensor_parallel import KINDS, choose_grid, grids, plan_mesh

GROUPS = [
    ("1d", 4, {}, {"tp": [(0, 1, 2, 3)]}),
    ("2d", 4, {}, {"i": [(0, 2), (1, 3)], "j": [(0, 1), (2, 3)]}),
    (
        "2.5d",
        8,
        {"depth": 2},
        {
            "depth": [(0, 4), (1, 5), (2, 6), (3, 7)],
            "i": [(0, 2), (1, 3), (4, 6), (5, 7)],
            "j": [(0, 1), (2, 3), (4, 5), (6, 7)],
        },
    ),
    (
        "3d",
        8,
        {},
        {
            "i": [(0, 1), (2, 3), (4, 5), (6, 7)],
            "j": [(0, 2), (1, 3), (4, 6), (5, 7)],
            "k": [(0, 4), (1, 5), (2, 6), (3, 7)],
        },
    ),
    ("xy", 6, {"x": 3}, {"x": [(0, 1, 2), (3, 4, 5)], "y": [(0, 3), (1, 4), (2, 5)]}),
    (
        "xy",
        8,
        {"x": 2, "y": 2, "context": 2},
        {"x": [(0, 1), (2, 3), (4, 5), (6, 7)], "context and y": [(0, 2, 4, 6), (1, 3, 5, 7)]},
    ),
]


@pytest.mark.parametrize(("kind", "ranks", "sizes", "expected"), GROUPS)
def test_groups_along_each_axis(kind, ranks, sizes, expected):
    _, grid = plan_mesh(kind, ranks, **sizes)
    for axes, groups in expected.items():
        joined = tuple(axes.split(" and "))
        assert sorted({grid.ranks_along(rank, joined) for rank in range(ranks)}) == groups
        for group in groups:
            assert [grid.index(rank, joined) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_axis_of_a_kind_has_a_role_in_every_linear_layer(kind):
    for layouts in KINDS[kind].linears:
        assert [layouts.role(axis) for axis in KINDS[kind].axes]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_linear_layers_ends_as_it_began(kind):
    first = KINDS[kind].linear(KINDS[kind].outer)
    assert KINDS[kind].linear(first.output).output == KINDS[kind].outer


def test_all_grids_of_a_number_of_ranks():
    shapes = {kind: [grid.sizes for grid in grids(kind, 64)] for kind in KINDS}
    assert shapes == {
        "1d": [(64,)],
        "1d-sp": [(64,)],
        "2d": [(8, 8)],
        "2.5d": [(64, 1, 1), (16, 2, 2), (4, 4, 4), (1, 8, 8)],
        "3d": [(4, 4, 4)],
        "xy": [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (2, 32), (1, 64)],
    }


REFUSED = [
    ("2d", 6, {}, "2d takes q x q ranks, not 6; use 4 or 9 ranks."),
    ("3d", 9, {}, "3d takes q x q x q ranks, not 9; use 8 or 27 ranks."),
    (
        "2.5d",
        8,
        {"depth": 3},
        "2.5d takes depth x q x q ranks, not 8, depth=3; use with 8 ranks depth=8 or depth=2 x i=2 x j=2, "
        "or 3 or 12 ranks.",
    ),
    ("xy", 8, {"x": 3}, "xy takes x * y ranks, not 8, x=3; use with 8 ranks y=8 or y=4 x x=2 or "),
    ("xy", 8, {}, "xy is given neither x nor y; give one of them, and the other one follows."),
    ("xy", 8, {"x": 4, "y": 4}, "xy takes x * y ranks, not 8, x=4, y=4; use with 8 ranks "),
    ("xy", 9, {"x": 4, "y": 2}, "xy takes x * y ranks, not 9, x=4, y=2; use with 9 ranks "),
    ("2d", 4, {"depth": 2}, "depth=2 is given, and 2d has no such axis; leave it out, or use 2.5d."),
    ("4d", 4, {}, "there is no tensor parallelism '4d'; there is 1d, 1d-sp, 2d, 2.5d, 3d, xy."),
]


@pytest.mark.parametrize(("kind", "ranks", "sizes", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(kind, ranks, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_grid(kind, ranks, **sizes)


@pytest.mark.parametrize(
    ("around", "message"),
    [
        ({"data": 3}, "data=3 does not divide 8 ranks; use 1, 2, 4 or 8."),
        (
            {"data": 4, "context": 4},
            "data=4 and context=4 together do not divide 8 ranks; use a divisor of 2 for context.",
        ),
    ],
)
def test_replicas_that_do_not_part_the_ranks_are_refused(around, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_mesh("1d", 8, **around)
