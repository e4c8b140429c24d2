"""Second derivatives of what is not linear are refused: torch would leave out some of them."""

import pytest
import torch
from torch import nn

from mindspeed_cp.tensor_parallel import Linear, cross_entropy, shard, shard_tokens
from unit_tests.tensor_parallel.mesh_cases import MeshCase, numbers


def a_product(mesh):
    layer = Linear.from_linear(nn.Linear(4, 8).double(), mesh)
    x = shard(numbers(2, 4, 4), mesh.kind.outer, mesh)
    x.local.requires_grad_()
    return layer(x).local.sum(), x.local


def a_loss(mesh):
    logits = shard(numbers(2, 4, 8), mesh.kind.inner, mesh)
    logits.local.requires_grad_()
    labels = shard_tokens(torch.arange(8).view(2, 4), logits.layout, mesh)
    return cross_entropy(logits, labels, mesh), logits.local


@pytest.mark.parametrize(
    ("of", "what"),
    [
        (
            a_product,
            "the gradient of a tensor-parallel product has none of its own; .*functional.linear on one",
        ),
        (
            a_loss,
            "the gradient of a loss over a vocabulary in parts has none of its own; .*functional.cross_entropy",
        ),
    ],
)
def test_a_second_derivative_is_refused_and_not_left_out(of, what):
    def once(mesh):
        (gradient,) = torch.autograd.grad(*of(mesh))
        assert gradient.isfinite().all() and not gradient.requires_grad

    def twice(mesh):
        torch.autograd.grad(*of(mesh), create_graph=True)

    MeshCase("1d", 2).run(once)
    with pytest.raises(RuntimeError, match=what):
        MeshCase("1d", 2).run(twice)
