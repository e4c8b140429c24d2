"""A gated MLP, whose gate shares the input's way with fc1, and a head that is the embedding's table, in every kind."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_cp.tensor_parallel import (
    MLP,
    Linear,
    Sharded,
    TiedEmbedding,
    comm_volume,
    mlp_shapes,
    plan_mesh,
    shard,
    shard_tokens,
    unshard,
)
from unit_tests.tensor_parallel.mesh_cases import MeshCase, assert_close, gradients, numbers, randomize, xy

HIDDEN, FFN, SEQUENCE, VOCABULARY = 36, 72, 12, 72
EACH_KIND = [
    MeshCase("1d", 4),
    MeshCase("1d-sp", 4),
    MeshCase("2d", 4),
    MeshCase("2.5d", 8, (("depth", 2),)),
    MeshCase("3d", 8),
    xy(3, 2),
]


def gated():
    sizes = {"gate": (HIDDEN, FFN), "fc1": (HIDDEN, FFN), "fc2": (FFN, HIDDEN)}
    return randomize(nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}).double(), scale=0.25)


def sharded_mlp(mesh, **options):
    whole = gated()
    return MLP(whole["fc1"], whole["fc2"], mesh, gate=whole["gate"], activation=F.silu, **options)


@pytest.mark.parametrize(("case", "gathering"), [*((case, "keep") for case in EACH_KIND), (EACH_KIND[4], "panels")])
def test_a_gated_mlp_gives_the_outputs_and_gradients_of_one_rank_and_sends_x_once(case, gathering):
    shape = (case.batch(2), SEQUENCE, HIDDEN)

    def run(mesh):
        mlp = sharded_mlp(mesh, gathering=gathering)
        x = shard(numbers(*shape), mesh.kind.outer, mesh)
        x.local.requires_grad_()
        y = mlp(x)
        y.local.backward(shard(numbers(*shape, seed=9), y.layout, mesh).local)
        assert sum(mesh.traffic.bytes_sent.values()) == sent
        return {"y": unshard(y, mesh), "dx": unshard(Sharded(x.local.grad, x.layout), mesh)} | gradients(mlp)

    shapes = mlp_shapes(*shape[:2], HIDDEN, FFN, gated=True)
    sent = comm_volume(
        *plan_mesh(case.kind, case.ranks, **dict(case.sizes)), shapes, gathering=gathering, itemsize=8
    ).total
    whole, x = gated(), numbers(*shape).requires_grad_()
    y = whole["fc2"](F.silu(whole["gate"](x)) * whole["fc1"](x))
    y.backward(numbers(*shape, seed=9))
    expected = {name: each.grad for name, each in whole.named_parameters()}
    assert_close(case.run(run), {"y": y.detach(), "dx": x.grad} | expected)


@pytest.mark.parametrize("case", [*EACH_KIND, xy(2, 2, context=2)], ids=str)
def test_a_tied_head_and_embedding_give_torchs_outputs_and_the_sum_of_both_gradients(case):
    tokens = torch.randint(VOCABULARY, (case.batch(2), SEQUENCE), generator=torch.Generator().manual_seed(3))
    dy = numbers(*tokens.shape, VOCABULARY, seed=9)

    def run(mesh):
        head = Linear.from_linear(randomize(nn.Linear(HIDDEN, VOCABULARY, bias=False).double(), scale=0.25), mesh)
        tied = nn.ModuleDict({"tokens": TiedEmbedding(head), "head": head})
        x = tied["tokens"](shard_tokens(tokens, mesh.kind.outer, mesh))
        y = head(x)
        y.local.backward(shard(dy, y.layout, mesh).local)
        assert [name for name, _ in tied.named_parameters()] == ["tokens.weight"]
        assert set(tied.state_dict()) == {"tokens.weight", "head.weight"}
        return {"x": unshard(x, mesh), "y": unshard(y, mesh)} | gradients(tied)

    weight = randomize(nn.Linear(HIDDEN, VOCABULARY, bias=False).double(), scale=0.25).weight
    x = F.embedding(tokens, weight)
    y = F.linear(x, weight)
    y.backward(dy)
    assert_close(case.run(run), {"x": x.detach(), "y": y.detach(), "tokens.weight": weight.grad})


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (nn.Linear(8, 12), "a gate 8 -> 12 with bias does not go with fc1 8 -> 16 with bias; give both the same sizes"),
        (nn.Linear(8, 16, bias=False), "a gate 8 -> 16 without bias does not go with fc1 8 -> 16 with bias; give both"),
    ],
)
def test_a_gate_that_does_not_go_with_fc1_is_refused(gate, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("1d", 1).run(lambda mesh: MLP(nn.Linear(8, 16), nn.Linear(16, 8), mesh, gate=gate))


def test_a_head_of_other_activations_shares_no_table():
    message = "a head of activations with sequence by y, features by x shares no table with an embedding, which gives"
    with pytest.raises(ValueError, match=re.escape(message)):
        xy(2, 1).run(lambda mesh: TiedEmbedding(Linear.from_linear(nn.Linear(8, 8), mesh, input=mesh.kind.inner)))
