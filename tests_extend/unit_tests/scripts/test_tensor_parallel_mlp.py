"""The example of tensor parallelism: what it prints, in each kind."""

import re

import pytest

SHAPES = [
    ("1d", 4, {}, ["(256, 256)", "(256, 256)", "(16, 256)", "(16, 256)", "(16, 256)"]),
    ("2d", 4, {}, ["(512, 128)", "(128, 512)", "(8, 128)", "(8, 512)", "(8, 128)"]),
    ("2.5d", 8, {"depth": 2}, ["(512, 128)", "(128, 512)", "(4, 128)", "(4, 512)", "(4, 128)"]),
    ("3d", 8, {}, ["(512, 64)", "(128, 256)", "(4, 128)", "(4, 512)", "(4, 128)"]),
]
"""Weights of both layers, the input, and the outputs of both layers, on each rank."""


@pytest.mark.parametrize(("mode", "ranks", "sizes", "shapes"), SHAPES)
def test_the_example_shows_each_kinds_shapes_and_agrees_with_one_rank(run_script, mode, ranks, sizes, shapes):
    options = [text for axis, size in sizes.items() for text in (f"--{axis}", size)]
    ended = run_script("tensor_parallel_mlp.py", "--mode", mode, "--ranks", ranks, *options)
    assert ended.status == 0
    assert re.findall(r"^(?:Weight|Input|Output of the (?:first|second)).*?: (\([\d, ]+\))", ended.out, re.M) == shapes
