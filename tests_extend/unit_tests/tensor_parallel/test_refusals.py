"""Layers, shapes and meshes that do not go together are refused in a line with both values and the way out."""

import re

import pytest
import torch
from torch import nn

from mindspeed_cp.tensor_parallel import (
    KINDS,
    MLP,
    Grid,
    LayerNorm,
    Linear,
    SelfAttention,
    best,
    comm_volume,
    memory,
    mlp_shapes,
    shard,
)
from unit_tests.tensor_parallel.mesh_cases import MeshCase

SHAPES = mlp_shapes(4, 8, 16, 64)


def narrow_input(mesh):
    layer = Linear.from_linear(nn.Linear(8, 16), mesh, gathering="panels")
    layer(shard(torch.zeros(4, 4, 12), mesh.kind.outer, mesh))


LAYERS = [
    (narrow_input, "this linear layer takes 8 features, of which this rank has 4, and is given 6; shard an activation"),
    (
        lambda mesh: MLP(nn.Linear(8, 16), nn.Linear(32, 8), mesh),
        "fc1 gives 16 features, and fc2 takes 32; make one for the other.",
    ),
    (
        lambda mesh: SelfAttention(nn.Linear(8, 24), nn.Linear(16, 8), mesh, num_heads=4),
        "proj takes 16 features, and 4 heads of 2 give 8; make it for those.",
    ),
    (
        lambda mesh: LayerNorm.from_norm(nn.LayerNorm((4, 8)), mesh),
        "a LayerNorm over the dims (4, 8); flatten them into one.",
    ),
]


@pytest.mark.parametrize(("make", "message"), LAYERS)
def test_layers_that_do_not_fit_each_other_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("2d", 4).run(make)


@pytest.mark.parametrize("cost", [comm_volume, memory])
def test_costs_of_another_kinds_grid_or_of_no_gathering_are_refused(cost):
    with pytest.raises(
        ValueError, match=re.escape("2d has the axes i, j, and the grid has tp; take both from plan_mesh")
    ):
        cost(KINDS["2d"], Grid(("tp",), (4,)), SHAPES)
    with pytest.raises(ValueError, match=re.escape("there is no gathering='panel'; use one of keep, again, panels.")):
        cost(KINDS["1d"], Grid(("tp",), (4,)), SHAPES, gathering="panel")


def test_a_mesh_of_no_ranks_is_refused():
    with pytest.raises(ValueError, match=re.escape("a mesh of 0 ranks; use 1 or more.")):
        best(0, SHAPES)
