"""Norms, embedding, loss, dropout and attention of every kind against torch's own in fp64, and what they refuse."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mindspeed_cp.tensor_parallel import (
    Dropout,
    Embedding,
    LayerNorm,
    Layout,
    RMSNorm,
    SelfAttention,
    Sharded,
    cross_entropy,
    shard,
    shard_tokens,
    unshard,
)
from unit_tests.tensor_parallel.mesh_cases import MESHES, MeshCase, assert_close, gradients, numbers, randomize, xy

HIDDEN, HEADS, SEQUENCE, VOCABULARY = 36, 36, 12, 72
SAMPLE = [
    MeshCase("1d", 4),
    MeshCase("1d-sp", 4),
    MeshCase("2d", 4),
    MeshCase("2.5d", 8),
    MeshCase("3d", 8),
    xy(2, 2),
    xy(2, 2, context=2),
]


NORMS = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
@pytest.mark.parametrize(("sharded", "whole"), NORMS)
def test_norms_are_torchs_own_and_leave_their_input_untouched(case, sharded, whole):
    shape = (case.batch(2), SEQUENCE, HIDDEN)

    def run(norm, x, dy):
        y = norm(x)
        y.backward(dy)
        return {"y": y.detach(), "dx": x.grad} | {name: each.grad for name, each in norm.named_parameters()}

    def run_sharded(mesh):
        norm = sharded.from_norm(randomize(whole(HIDDEN).double()), mesh)
        x = shard(numbers(*shape), mesh.kind.outer, mesh)
        x.local.requires_grad_()
        before = x.local.detach().clone()
        y = norm(x)
        y.local.backward(shard(numbers(*shape, seed=9), y.layout, mesh).local)
        assert torch.equal(x.local, before)
        return {"y": unshard(y, mesh), "dx": unshard(Sharded(x.local.grad, x.layout), mesh)} | gradients(norm)

    reference = randomize(whole(HIDDEN).double())
    assert_close(case.run(run_sharded), run(reference, numbers(*shape).requires_grad_(), numbers(*shape, seed=9)))


def test_a_norm_without_bias_or_weights_has_none():
    def names(mesh):
        norms = [
            LayerNorm.from_norm(nn.LayerNorm(HIDDEN, bias=False), mesh),
            LayerNorm.from_norm(nn.LayerNorm(HIDDEN, elementwise_affine=False), mesh),
        ]
        x = shard(torch.randn(2, 4, HIDDEN), mesh.kind.outer, mesh)
        return [(sorted(dict(norm.named_parameters())), norm(x).local.shape == x.local.shape) for norm in norms]

    assert MeshCase("2d", 4).run(names) == [[(["weight"], True), ([], True)]] * 4


def tokens(batch):
    return torch.randint(VOCABULARY, (batch, SEQUENCE), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", [*SAMPLE, MeshCase("3d", 27)], ids=str)
def test_embedding_is_torchs_own(case):
    batch = case.batch(2)
    dy = numbers(batch, SEQUENCE, HIDDEN, seed=9)

    def run_sharded(mesh):
        table = Embedding.from_embedding(randomize(nn.Embedding(VOCABULARY, HIDDEN).double()), mesh)
        y = table(shard_tokens(tokens(batch), mesh.kind.outer, mesh))
        y.local.backward(shard(dy, y.layout, mesh).local)
        return {"y": unshard(y, mesh)} | gradients(table)

    reference = randomize(nn.Embedding(VOCABULARY, HIDDEN).double())
    y = reference(tokens(batch))
    y.backward(dy)
    assert_close(case.run(run_sharded), {"y": y.detach(), "weight": reference.weight.grad})


@pytest.mark.parametrize("case", [*SAMPLE, MeshCase("3d", 27)], ids=str)
def test_cross_entropy_is_torchs_own_with_tokens_that_have_no_loss(case):
    batch = case.batch(2)
    labels = tokens(batch).masked_fill(numbers(batch, SEQUENCE) > 1.0, -100)
    # Far from 0, so that exponentials overflow unless the largest is taken off.
    whole = (numbers(batch, SEQUENCE, VOCABULARY) * 30 + 1000).requires_grad_()

    def run_sharded(mesh):
        logits = shard(whole.detach(), mesh.kind.inner, mesh)
        logits.local.requires_grad_()
        loss = cross_entropy(logits, shard_tokens(labels, logits.layout, mesh), mesh)
        (3 * loss).backward()
        return {"loss": loss.detach(), "dx": unshard(Sharded(logits.local.grad, logits.layout), mesh)}

    loss = F.cross_entropy(whole.flatten(0, 1), labels.flatten())
    (3 * loss).backward()
    assert_close(case.run(run_sharded), {"loss": loss.detach(), "dx": whole.grad})


@pytest.mark.parametrize("case", [MeshCase("2.5d", 8), MeshCase("1d", 4)], ids=str)
def test_dropout_draws_another_mask_in_each_shard_and_one_in_all_its_replicas(case):
    def run(mesh):
        dropout = Dropout(0.25, mesh, generator=torch.Generator().manual_seed(7))
        x = Sharded(torch.ones(100, 100), mesh.kind.outer)
        first, second = dropout(x).local, dropout(x).local
        assert not torch.equal(first, second)
        return mesh.index(x.layout.rows + x.layout.features), first

    results = case.run(run)
    for place, mask in results:
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((mask == 0).float().mean().item() - 0.25) < 0.02
        for other_place, other in results:
            assert torch.equal(mask, other) == (place == other_place)


def test_dropout_does_nothing_outside_training_and_refuses_what_is_no_part():
    def run(mesh):
        x = Sharded(torch.ones(4), Layout())
        assert Dropout(0.5, mesh).eval()(x) is x
        with pytest.raises(ValueError, match=re.escape("dropout drops a part p=1.5; use one from 0 to 1.")):
            Dropout(1.5, mesh)

    MeshCase("1d", 1).run(run)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads=4 does not divide num_heads=6; use a divisor of it."),
        (
            {"num_heads": 6, "num_kv_heads": 3},
            "num_kv_heads=3 heads are cut in 2 parts along j, which do not",
        ),
        ({"num_heads": 10}, "qkv gives 108 features, not a multiple of 10 + 2 * 10 heads; use one."),
    ],
)
def test_heads_that_do_not_fit_are_refused(heads, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("2d", 4).run(
            lambda mesh: SelfAttention(nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), mesh, **heads)
        )


def test_attention_over_a_sharded_sequence_has_to_be_given():
    message = "the sequence is sharded by context and y within attention: give attend, attention over their ranks,"
    with pytest.raises(ValueError, match=re.escape(message)):
        xy(2, 2, context=2).run(
            lambda mesh: SelfAttention(nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN), mesh, num_heads=HEADS)
        )


@pytest.mark.parametrize("case", [case for case in MESHES if case.ranks == 1], ids=str)
def test_one_rank_sends_nothing(case):
    def run(mesh):
        norm = LayerNorm.from_norm(nn.LayerNorm(HIDDEN), mesh)
        norm(shard(torch.randn(1, SEQUENCE, HIDDEN), mesh.kind.outer, mesh)).local.sum().backward()
        return sum(mesh.traffic.bytes_sent.values())

    assert case.run(run) == [0]
