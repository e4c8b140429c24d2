"""The mesh: who is neighbour of whom, groups over processes, and what is refused."""

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.diffusion import MeshShape, ParallelMesh


@pytest.mark.parametrize(
    ("order", "axis", "groups"),
    [
        (("cfg", "ring", "ulysses", "tp"), "tp", {(0, 1), (2, 3), (4, 5), (6, 7)}),
        (("cfg", "ring", "ulysses", "tp"), "ulysses", {(0, 2), (1, 3), (4, 6), (5, 7)}),
        (("cfg", "ring", "ulysses", "tp"), "cfg", {(0, 4), (1, 5), (2, 6), (3, 7)}),
        (("tp", "ring", "ulysses", "cfg"), "cfg", {(0, 1), (2, 3), (4, 5), (6, 7)}),
        (("tp", "ring", "ulysses", "cfg"), "tp", {(0, 4), (1, 5), (2, 6), (3, 7)}),
    ],
)
def test_last_axis_of_the_order_has_neighbours(order, axis, groups):
    shape = MeshShape(cfg=2, ulysses=2, tp=2, order=order)
    assert {shape.ranks_along(rank, axis) for rank in range(8)} == groups


def groups_of_mesh(group, sizes):
    """The ranks along each axis, of processes that are a part of the world."""
    mesh = ParallelMesh(**sizes, group=group)
    groups = {axis: mesh.group(axis) for axis in mesh.shape.order}
    return {axis: dist.get_process_group_ranks(each) for axis, each in groups.items() if each is not None}


def groups_of_mesh_on_half(_, sizes):
    """Of a mesh on each half of the world; the numbers are the world's."""
    halves = [dist.new_group(list(range(start, start + 4))) for start in (0, 4)]
    return groups_of_mesh(halves[dist.get_rank() // 4], sizes)


def test_process_groups_are_those_of_the_shape(gloo):
    sizes = {"cfg": 2, "ring": 2, "tp": 2, "order": ("cfg", "tp", "ulysses", "ring")}
    shape = MeshShape(**sizes)
    for rank, found in enumerate(gloo.run(8, groups_of_mesh, sizes)):
        assert found == {axis: list(shape.ranks_along(rank, axis)) for axis in ("cfg", "ring", "tp")}


def test_meshes_on_parts_of_the_world_are_made_side_by_side(gloo):
    found = gloo.run(8, groups_of_mesh_on_half, {"cfg": 2, "ulysses": 2})
    assert found[5] == {"cfg": [5, 7], "ulysses": [4, 5]}


def error_of_mesh(group, sizes):
    try:
        ParallelMesh(**sizes[dist.get_rank()], group=group)
    except ValueError as error:
        return str(error)


def test_ranks_that_ask_for_different_meshes_all_get_the_error(gloo):
    errors = gloo.run(8, error_of_mesh, [{"ring": 8}] * 7 + [{"ulysses": 8}])
    assert len(set(errors)) == 1
    assert errors[0].startswith("rank 0 asks for a mesh ring=8 in the order")
    assert "and rank 7 for ulysses=8" in errors[0]


def test_product_that_is_not_the_group_is_refused_on_every_rank(gloo):
    errors = gloo.run(8, error_of_mesh, [{"cfg": 2, "ulysses": 2}] * 8)
    assert set(errors) == {
        "cfg=2 x ring=1 x ulysses=2 x tp=1 is 4 ranks and the group has 8 ranks; give axes whose product is 8, or "
        "start 4."
    }


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"cfg": 2}, "is 2 ranks and there is no process group, which makes it one rank"),
        ({"tp": 0}, "tp=0: an axis has at least one rank"),
        ({"order": ("cfg", "ring", "tp")}, "is not an order of cfg, ring, ulysses, tp"),
    ],
)
def test_mesh_of_a_program_without_processes_is_one_rank(sizes, sentence):
    assert ParallelMesh().shape.size == 1
    with pytest.raises(ValueError, match=sentence):
        ParallelMesh(**sizes)
    assert not torch.distributed.is_initialized()
