"""What gloo ranks run for the tests of this folder."""

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.tensor_parallel import Linear, TensorMesh, full_state_dict, shard, unshard
from mindspeed_cp.tensor_parallel.checkpoint import load_checkpoint, save_checkpoint
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, train_with


def build(kind, sizes, group=None):
    return TensorMesh.build(kind, group, **sizes)


def model_on(mesh, sizes, seed=0):
    """The GPT on a mesh, attention over several ranks being a ring where the sequence is sharded within it."""
    attend = layout = None
    if mesh.within_attention is not None:
        config = ContextParallelConfig(
            context_parallel_size=mesh.within_attention.size, context_parallel_algo="megatron_cp_algo"
        )
        attend, layout = build_attention(config, mesh.within_attention.group), config.layout
    return ShardedGPT(GPT(sizes, seed).double(), mesh, attend=attend, layout=layout)


def train_and_save(group, kind, mesh_sizes, sizes, steps, path):
    """Losses, and the whole parameters afterwards."""
    model = model_on(build(kind, mesh_sizes), sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = train_with(optimizer, model.loss, sizes, range(steps))
    save_checkpoint(path, model, optimizer)
    return losses, full_state_dict(model)


def load_and_train(group, kind, mesh_sizes, sizes, steps, path):
    """Losses of further steps of a model that was made otherwise and then loaded."""
    model = model_on(build(kind, mesh_sizes), sizes, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    load_checkpoint(path, model, optimizer)
    return train_with(optimizer, model.loss, sizes, steps)


def mesh_over_overlapping_groups(group):
    """The error of ranks that give a group each, two of which overlap."""
    groups = [dist.new_group(list(ranks)) for ranks in (range(4), range(2, 6), range(6, 8))]
    try:
        build("1d", {}, groups[(0, 0, 1, 1, 1, 1, 2, 2)[dist.get_rank()]])
    except ValueError as error:
        return str(error)


def linear_in_half_of_the_world(group, kind, mesh_sizes, widths, gathering):
    """Output of a layer on the mesh of this rank's half of the world, and what has been counted and is where."""
    halves = [dist.new_group(list(ranks)) for ranks in (range(4), range(4, 8))]
    half = halves[dist.get_rank() // 4]
    mesh = build(kind, mesh_sizes, half)
    generator = torch.Generator().manual_seed(dist.get_rank() // 4)
    whole = nn.Linear(*widths).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter, generator=generator)
    layer = Linear.from_linear(whole, mesh, gathering=gathering)
    x = torch.randn(4, 8, widths[0], generator=generator, dtype=torch.float64)
    part = shard(x, mesh.kind.outer, mesh)
    part.local.requires_grad_()
    y = layer(part)
    y.local.sum().backward()
    sent = sum(mesh.traffic.bytes_sent.values())
    gradient = full_state_dict(layer)["weight"].clone()
    layer.weight.data.copy_(layer.weight.grad)
    gradient = full_state_dict(layer)["weight"]
    exact = whole(x)
    exact.sum().backward()
    return {
        "output": (unshard(y, mesh) - exact).abs().max().item(),
        "gradient": (gradient - whole.weight.grad).abs().max().item(),
        "sent": sent,
        "axes": tuple(mesh.device_mesh.mesh_dim_names),
        "coordinate": tuple(mesh.device_mesh.get_coordinate()),
    }
