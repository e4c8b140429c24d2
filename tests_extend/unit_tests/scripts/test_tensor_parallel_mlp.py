"""The example MLP: in every mode it shows the shapes that its kind says, and agrees with one rank."""

import pytest

import tensor_parallel_mlp
from mindspeed_cp.tensor_parallel import on_virtual_ranks, plan_mesh

SHAPES = [
    ("1d", 4, {}, ["(256, 256)", "(256, 256)", "(16, 256)", "(16, 256)", "(16, 256)"]),
    ("2d", 4, {}, ["(512, 128)", "(128, 512)", "(8, 128)", "(8, 512)", "(8, 128)"]),
    ("2.5d", 8, {"depth": 2}, ["(512, 128)", "(128, 512)", "(4, 128)", "(4, 512)", "(4, 128)"]),
    ("3d", 8, {}, ["(512, 64)", "(128, 256)", "(4, 128)", "(4, 512)", "(4, 128)"]),
]
"""Weights of both layers, the input, and the outputs of both layers, on each rank."""


@pytest.mark.parametrize(("mode", "ranks", "sizes", "shapes"), SHAPES)
def test_the_example_shows_each_kinds_shapes_and_agrees_with_one_rank(mode, ranks, sizes, shapes):
    for shown in on_virtual_ranks(tensor_parallel_mlp.run, *plan_mesh(mode, ranks, **sizes)):
        assert [line.partition(": ")[2].partition("), ")[0].rstrip(")") + ")" for line in shown.lines[:5]] == shapes
        assert max(shown.differences.values()) < tensor_parallel_mlp.TOLERANCE
