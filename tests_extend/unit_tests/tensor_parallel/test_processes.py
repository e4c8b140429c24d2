"""A sample over gloo: meshes of process groups and subgroups, training, and checkpoints from mesh to mesh."""

import pytest
import torch

from mindspeed_cp.tensor_parallel import plan_mesh
from mindspeed_cp.tensor_parallel.costs import LinearShape, comm_volume
from mindspeed_cp.testing.tiny_gpt import GPT, Sizes, train_with
from unit_tests.tensor_parallel import process_cases as cases

SIZES = Sizes(batch=4, sequence=8, hidden=16, heads=8, kv_heads=8, layers=1, vocabulary=16, gated=True, tied=True)


@pytest.mark.parametrize(("kind", "sizes", "gathering"), [("2d", {}, "panels"), ("xy", {"x": 2}, "keep")])
def test_a_mesh_over_half_of_the_world_computes_counts_and_has_a_device_mesh(gloo, kind, sizes, gathering):
    results = gloo.run(8, cases.linear_in_half_of_the_world, kind, sizes, (8, 16), gathering)
    full_kind, grid = plan_mesh(kind, 4, **sizes)
    expected = comm_volume(full_kind, grid, [LinearShape(4, 8, 8, 16)], gathering=gathering, itemsize=8).total
    for rank, result in enumerate(results):
        assert max(result["output"], result["gradient"]) < 1e-12
        assert result["sent"] == expected
        assert result["axes"] == grid.axes
        assert result["coordinate"] == tuple(grid.coordinate(rank % 4, axis) for axis in grid.axes)


def test_groups_that_do_not_part_the_world_are_refused_on_every_rank(gloo):
    for message in gloo.run(8, cases.mesh_over_overlapping_groups):
        assert message.startswith(
            "the groups [(0, 1, 2, 3), (2, 3, 4, 5), (6, 7)] do not part the 8 ranks of the world"
        )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("xy", {"x": 2, "y": 2, "context": 2}),
        pytest.param("2.5d", {"depth": 2}, marks=pytest.mark.slow),
        pytest.param("1d-sp", {"data": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_3d_goes_on_as_one_rank_would_on_another_mesh(gloo, tmp_path, kind, sizes):
    whole = GPT(SIZES).double()
    expected = train_with(torch.optim.Adam(whole.parameters(), lr=1e-2), whole.loss, SIZES, range(3))
    for losses, _ in gloo.run(8, cases.train_and_save, "3d", {}, SIZES, 1, tmp_path):
        assert losses == pytest.approx(expected[:1], rel=0, abs=1e-9)
    for losses in gloo.run(8, cases.load_and_train, kind, sizes, SIZES, range(1, 3), tmp_path):
        assert losses == pytest.approx(expected[1:], rel=0, abs=1e-9)
