"""The grid of context-parallel ranks, over every grid of up to 16 ranks."""

import dataclasses

import pytest

from mindspeed_cp.topology import Coordinates, CPTopology

GRIDS = [
    CPTopology(outer=outer, inner=inner, ulysses=ulysses)
    for outer in range(1, 17)
    for inner in range(1, 17 // outer + 1)
    for ulysses in range(1, 17 // (outer * inner) + 1)
    if outer * inner * ulysses <= 16 and (outer == 1 or inner > 1)
]


def test_sizes_are_products_of_the_axes():
    for grid in GRIDS:
        assert grid.size == grid.outer * grid.inner * grid.ulysses
        assert grid.ring_size == grid.outer * grid.inner


def test_every_rank_has_a_place_of_its_own_and_ulysses_varies_fastest_then_inner():
    for grid in GRIDS:
        expected = [
            Coordinates(outer, inner, ulysses)
            for outer in range(grid.outer)
            for inner in range(grid.inner)
            for ulysses in range(grid.ulysses)
        ]
        assert [grid.coordinates(rank) for rank in range(grid.size)] == expected


def test_ulysses_groups_are_neighbours_and_part_the_ranks():
    for grid in GRIDS:
        groups = {grid.ulysses_ranks(rank) for rank in range(grid.size)}
        assert sorted(rank for group in groups for rank in group) == list(range(grid.size))
        for rank in range(grid.size):
            group = grid.ulysses_ranks(rank)
            assert rank in group
            assert group == tuple(range(group[0], group[0] + grid.ulysses))


def test_ulysses_group_shares_its_place_in_the_rings():
    for grid in GRIDS:
        for rank in range(grid.size):
            places = [grid.coordinates(other) for other in grid.ulysses_ranks(rank)]
            assert {place[:2] for place in places} == {grid.coordinates(rank)[:2]}
            assert [place.ulysses for place in places] == list(range(grid.ulysses))


def test_rings_hold_one_rank_of_each_ulysses_group_inner_ring_by_inner_ring():
    for grid in GRIDS:
        for rank in range(grid.size):
            place = grid.coordinates(rank)
            places = [grid.coordinates(other) for other in grid.ring_ranks(rank)]
            assert places == [
                Coordinates(outer, inner, place.ulysses) for outer in range(grid.outer) for inner in range(grid.inner)
            ]


def test_default_grid_is_one_rank():
    assert CPTopology() == CPTopology(outer=1, inner=1, ulysses=1)
    assert CPTopology().size == 1


@pytest.mark.parametrize("axis", ["outer", "inner", "ulysses"])
@pytest.mark.parametrize("size", [0, -1])
def test_axis_below_one_is_refused(axis, size):
    with pytest.raises(ValueError) as refusal:
        CPTopology(**{axis: size})
    assert str(refusal.value) == f"CPTopology {axis}={size}: each axis has at least one rank; give 1 or more."


def test_inner_rings_of_one_rank_are_refused_with_the_plain_ring_that_they_are():
    with pytest.raises(ValueError, match="outer=4, inner=1: inner rings of one rank make a plain ring; use inner=4"):
        CPTopology(outer=4)


def test_topology_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPTopology().outer = 2
    with pytest.raises(TypeError, match="positional"):
        CPTopology(1, 2, 3)
