"""A sample of what virtual ranks are tested with, over processes."""

import pytest
import torch

from mindspeed_cp.diffusion import MeshShape, ParallelMesh, on_virtual_ranks
from mindspeed_cp.testing.rank_pool import RankFailure
from unit_tests.diffusion import process_cases as cases
from unit_tests.diffusion.mesh_cases import denoised, model


@pytest.mark.parametrize(
    ("sizes", "joint", "tokens"),
    [({"cfg": 2, "ring": 2, "ulysses": 2}, True, 35), ({"cfg": 4, "tp": 2}, False, 35)],
    ids=["cfg 2 x ring 2 x ulysses 2", "cfg 4 x tp 2, ranks left over"],
)
def test_processes_paint_and_send_what_virtual_ranks_do(gloo, sizes, joint, tokens):
    shape, whole = MeshShape(**sizes), model(joint=joint)
    expected = denoised(ParallelMesh(), whole, joint=joint, tokens=tokens)

    def paint(mesh):
        denoised(mesh, whole, joint=joint, tokens=tokens)
        return {axis: traffic.bytes_sent.total() for axis, traffic in mesh.traffic.items()}

    virtual = on_virtual_ranks(paint, shape)
    found = gloo.run(shape.size, cases.paint, sizes, joint, tokens)
    for (picture, sent), expected_sent in zip(found, virtual, strict=True):
        torch.testing.assert_close(picture, expected, rtol=0, atol=1e-10)
        assert sent == expected_sent


@pytest.mark.slow
def test_rank_that_is_killed_ends_the_others_with_its_number(gloo):
    with pytest.raises(RankFailure, match="no answer from rank 1 of the group"):
        gloo.run(8, cases.paint_until_killed, {"cfg": 2, "ring": 4}, 1, timeout_s=60.0)
