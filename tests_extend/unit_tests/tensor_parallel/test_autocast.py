"""Under torch.autocast: the dtypes and the accuracy of one rank's, and half of the bytes of fp32."""

import pytest
import torch

from mindspeed_cp.tensor_parallel import Linear, comm_volume, plan_mesh, shard
from mindspeed_cp.tensor_parallel.costs import LinearShape
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, Sizes, make_batch
from unit_tests.tensor_parallel.mesh_cases import MeshCase, xy

SIZES = Sizes(batch=4, sequence=8, hidden=16, heads=8, kv_heads=8, layers=1, vocabulary=16, gated=True, tied=True)


def loss_under_autocast(model):
    """And the dtypes of the gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(make_batch(SIZES, 0))
    loss.backward()
    return loss.item(), {parameter.grad.dtype for parameter in model.parameters()}


@pytest.mark.parametrize(("case", "gathering"), [(MeshCase("2.5d", 8, (("depth", 2),)), "panels"), (xy(4, 1), "keep")])
def test_a_gpt_under_autocast_is_as_near_to_the_exact_loss_as_on_one_rank(case, gathering):
    exact = GPT(SIZES).double().loss(make_batch(SIZES, 0)).item()
    error = abs(loss_under_autocast(GPT(SIZES))[0] - exact)
    for loss, dtypes in case.run(lambda mesh: loss_under_autocast(ShardedGPT(GPT(SIZES), mesh, gathering=gathering))):
        assert abs(loss - exact) <= 2 * error
        assert dtypes == {torch.float32}


def test_a_linear_layer_gives_and_sends_what_autocast_computes_in():
    case, shape = MeshCase("2d", 4), LinearShape(2, 4, 8, 16)

    def run(mesh):
        layer = Linear.from_linear(torch.nn.Linear(8, 16), mesh)
        x = shard(torch.zeros(2, 4, 8), mesh.kind.outer, mesh)
        x.local.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.local.sum().backward()
        return y.local.dtype, x.local.grad.dtype, sum(mesh.traffic.bytes_sent.values())

    sent = comm_volume(*plan_mesh("2d", 4), [shape], itemsize=2).total
    assert case.run(run) == [(torch.bfloat16, torch.float32, sent)] * 4
