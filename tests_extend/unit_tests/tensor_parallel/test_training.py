"""A tiny GPT trained in every kind: losses and replicas against the plain one on one rank."""

import pytest
import torch
from torch import nn

from mindspeed_cp.tensor_parallel import MLP, LayerNorm, full_state_dict, load_full_state_dict, shard
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, train
from unit_tests.tensor_parallel.gpt_cases import (
    EACH_KIND,
    LIKE_LLAMA,
    SIZES,
    STEPS,
    assert_as_accurate_as_whole,
    assert_replicas_are_equal,
    assert_trained_as_whole,
    train_sharded,
    train_whole,
    trained,
)
from unit_tests.tensor_parallel.mesh_cases import MeshCase, xy


@pytest.mark.parametrize("case", EACH_KIND, ids=str)
def test_a_gpt_with_gated_mlps_and_a_tied_head_trains_in_every_kind_as_on_one_rank(case):
    results = case.run(lambda mesh: train_sharded(mesh, sizes=LIKE_LLAMA))
    assert_trained_as_whole(results, sizes=LIKE_LLAMA)
    assert_replicas_are_equal(results)


def test_replicas_are_equal_to_the_bit_after_twenty_steps_of_adam():
    def run(mesh):
        generator = torch.Generator().manual_seed(0)
        whole = nn.ModuleDict({"norm": nn.LayerNorm(16), "fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)})
        for parameter in whole.parameters():
            nn.init.normal_(parameter, generator=generator)
        model = nn.ModuleList([LayerNorm.from_norm(whole["norm"], mesh), MLP(whole["fc1"], whole["fc2"], mesh)])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(20):
            x = shard(torch.randn(4, 8, 16, generator=generator), mesh.kind.outer, mesh)
            optimizer.zero_grad()
            model[1](model[0](x)).local.square().sum().backward()
            optimizer.step()
        return trained([], model, mesh)

    assert_replicas_are_equal(MeshCase("2.5d", 8, (("depth", 2),)).run(run))


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [(xy(2, 2, context=2), "double ring"), (xy(2, 2, context=2), "hybrid"), (xy(2, 2), "ulysses"), (xy(2, 2), "ring")],
    ids=str,
)
def test_x_times_y_trains_with_the_sequence_over_y_and_context(case, algorithm):
    results = case.run(lambda mesh: train_sharded(mesh, algorithm=algorithm))
    assert_trained_as_whole(results)
    assert_replicas_are_equal(results)


@pytest.mark.parametrize("case", [MeshCase("2.5d", 8, (("depth", 2),)), xy(4, 1)], ids=str)
def test_losses_in_bf16_are_as_near_to_the_exact_ones_as_those_of_one_rank(case):
    assert_as_accurate_as_whole(case.run(lambda mesh: train_sharded(mesh, dtype=torch.bfloat16)))


def test_a_state_of_one_mesh_is_loaded_on_another_and_trains_as_on_one_rank():
    saved = MeshCase("3d", 8).run(lambda mesh: full_state_dict(ShardedGPT(GPT(SIZES).double(), mesh)))[0]

    def resume(mesh):
        model = ShardedGPT(GPT(SIZES, seed=1).double(), mesh)
        load_full_state_dict(model, saved)
        return train(model, SIZES, range(STEPS))

    expected, _ = train_whole()
    for losses in MeshCase("2d", 4).run(resume):
        assert losses == pytest.approx(expected, rel=0, abs=1e-9)
