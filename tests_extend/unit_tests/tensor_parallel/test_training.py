"""A tiny GPT trained in every kind: losses and replicas against the plain one on one rank."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.tensor_parallel import MLP, LayerNorm, full_state_dict, load_full_state_dict, shard
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, Sizes, train
from unit_tests.tensor_parallel.mesh_cases import MeshCase, virtual_attention, xy

SIZES = Sizes(batch=4, sequence=8, hidden=16, heads=8, kv_heads=8, layers=1, vocabulary=16)
STEPS = 2
CASES = [
    MeshCase("1d", 4),
    MeshCase("1d-sp", 4),
    MeshCase("2d", 4),
    MeshCase("2.5d", 8, (("depth", 2),)),
    MeshCase("3d", 8),
    xy(4, 1),
]

ALGORITHMS = {
    "ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "double ring": {"context_parallel_algo": "megatron_cp_algo", "cp_window_size": 2},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
}


class Trained(NamedTuple):
    """losses: of each step. parts: a rank's parameters. places: which part of each it has. whole: all, gathered."""

    losses: list[float]
    parts: dict[str, torch.Tensor]
    places: dict[str, int]
    whole: dict[str, torch.Tensor]


def train_sharded(mesh, steps, dtype=torch.float64, algorithm=None, **options):
    attend = layout = None
    if mesh.within_attention is not None:
        config = ContextParallelConfig(context_parallel_size=mesh.within_attention.size, **ALGORITHMS[algorithm])
        attend, layout = virtual_attention(config, mesh.within_attention), config.layout
    model = ShardedGPT(GPT(SIZES).to(dtype), mesh, attend=attend, layout=layout, **options)
    return trained(train(model, SIZES, range(steps)), model, mesh)


def trained(losses, model, mesh):
    places = {
        f"{prefix}.{name}": mesh.index(sum(whole.placement, ()))
        for prefix, module in model.named_modules()
        for name, whole in getattr(module, "wholes", {}).items()
    }
    return Trained(losses, dict(model.named_parameters()), places, full_state_dict(model))


def train_whole(steps, dtype=torch.float64):
    model = GPT(SIZES).to(dtype)
    return train(model, SIZES, range(steps)), dict(model.named_parameters())


def assert_trained_as_whole(results):
    losses, parameters = train_whole(STEPS)
    for result in results:
        assert result.losses == pytest.approx(losses, rel=0, abs=1e-9)
        assert result.whole.keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(result.whole[name], parameter.detach(), rtol=0, atol=1e-6, msg=name)


def assert_replicas_are_equal(results):
    """To the bit; every part is somewhere."""
    for name in results[0].parts:
        by_place = {}
        for result in results:
            replica = by_place.setdefault(result.places[name], result.parts[name])
            assert torch.equal(replica, result.parts[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpt_trains_in_every_kind_with_the_losses_of_one_rank(case):
    results = case.run(lambda mesh: train_sharded(mesh, steps=STEPS))
    assert_trained_as_whole(results)
    assert_replicas_are_equal(results)


@pytest.mark.parametrize("case", [MeshCase("1d-sp", 4), MeshCase("2.5d", 8, (("depth", 2),))], ids=str)
def test_replicas_are_equal_to_the_bit_after_twenty_steps_of_adam(case):
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

    assert_replicas_are_equal(case.run(run))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_x_times_y_trains_with_the_sequence_over_y_and_context_in_each_algorithm(algorithm):
    results = xy(2, 2, context=2).run(lambda mesh: train_sharded(mesh, steps=STEPS, algorithm=algorithm))
    assert_trained_as_whole(results)
    assert_replicas_are_equal(results)


@pytest.mark.parametrize("algorithm", ["ulysses", "ring"])
def test_x_times_y_trains_with_the_sequence_over_y_alone(algorithm):
    results = xy(2, 2).run(lambda mesh: train_sharded(mesh, steps=STEPS, algorithm=algorithm))
    assert_trained_as_whole(results)


def test_panels_train_as_gathered_operands_do():
    results = MeshCase("2d", 4).run(lambda mesh: train_sharded(mesh, steps=STEPS, gathering="panels"))
    assert_trained_as_whole(results)


@pytest.mark.parametrize("case", [MeshCase("2.5d", 8, (("depth", 2),)), xy(4, 1)], ids=str)
def test_losses_in_bf16_are_as_near_to_the_exact_ones_as_those_of_one_rank(case):
    exact, _ = train_whole(STEPS)
    plain, _ = train_whole(STEPS, torch.bfloat16)
    error = max(abs(a - b) for a, b in zip(plain, exact, strict=True))
    for result in case.run(lambda mesh: train_sharded(mesh, steps=STEPS, dtype=torch.bfloat16)):
        assert max(abs(a - b) for a, b in zip(result.losses, exact, strict=True)) <= 2 * error


def test_a_state_of_one_mesh_is_loaded_on_another_and_trains_as_on_one_rank():
    saved = MeshCase("3d", 8).run(lambda mesh: full_state_dict(ShardedGPT(GPT(SIZES).double(), mesh)))[0]

    def resume(mesh):
        model = ShardedGPT(GPT(SIZES, seed=1).double(), mesh)
        load_full_state_dict(model, saved)
        return train(model, SIZES, range(STEPS))

    expected, _ = train_whole(STEPS)
    for losses in MeshCase("2d", 4).run(resume):
        assert losses == pytest.approx(expected, rel=0, abs=1e-9)
