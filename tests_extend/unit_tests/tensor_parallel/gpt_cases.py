"""A tiny GPT trained on a mesh and on one rank, and what is compared."""

from typing import NamedTuple

import pytest
import torch

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.tensor_parallel import full_state_dict
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, Sizes, train
from unit_tests.tensor_parallel.mesh_cases import MeshCase, virtual_attention, xy

SIZES = Sizes(batch=4, sequence=8, hidden=16, heads=8, kv_heads=8, layers=1, vocabulary=16)
LIKE_LLAMA = Sizes(batch=4, sequence=8, hidden=16, heads=8, kv_heads=8, layers=1, vocabulary=16, gated=True, tied=True)
STEPS = 2
EACH_KIND = [
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


def train_sharded(mesh, steps=STEPS, dtype=torch.float64, algorithm=None, sizes=SIZES, **options):
    attend = layout = None
    if mesh.within_attention is not None:
        config = ContextParallelConfig(context_parallel_size=mesh.within_attention.size, **ALGORITHMS[algorithm])
        attend, layout = virtual_attention(config, mesh.within_attention), config.layout
    model = ShardedGPT(GPT(sizes).to(dtype), mesh, attend=attend, layout=layout, **options)
    return trained(train(model, sizes, range(steps)), model, mesh)


def trained(losses, model, mesh):
    places = {
        f"{prefix}.{name}": mesh.index(sum(whole.placement, ()))
        for prefix, module in model.named_modules()
        for name, whole in getattr(module, "wholes", {}).items()
    }
    return Trained(losses, dict(model.named_parameters()), places, full_state_dict(model))


def train_whole(steps=STEPS, dtype=torch.float64, sizes=SIZES):
    model = GPT(sizes).to(dtype)
    return train(model, sizes, range(steps)), model.state_dict()


def assert_trained_as_whole(results, steps=STEPS, sizes=SIZES):
    losses, parameters = train_whole(steps, sizes=sizes)
    for result in results:
        assert result.losses == pytest.approx(losses, rel=0, abs=1e-9)
        assert result.whole.keys() == parameters.keys()
        for name, parameter in parameters.items():
            torch.testing.assert_close(result.whole[name], parameter, rtol=0, atol=1e-6, msg=name)


def assert_replicas_are_equal(results):
    """To the bit; every part is somewhere."""
    for name in results[0].parts:
        by_place = {}
        for result in results:
            replica = by_place.setdefault(result.places[name], result.parts[name])
            assert torch.equal(replica, result.parts[name]), name


def assert_as_accurate_as_whole(results, steps=STEPS, dtype=torch.bfloat16):
    """Losses are at most twice as far from the exact ones as those of one rank in the same dtype."""
    exact, _ = train_whole(steps)
    plain, _ = train_whole(steps, dtype)
    error = max(abs(a - b) for a, b in zip(plain, exact, strict=True))
    for result in results:
        assert max(abs(a - b) for a, b in zip(result.losses, exact, strict=True)) <= 2 * error
