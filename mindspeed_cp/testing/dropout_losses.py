"""Losses of a tiny GPT that drops attention probabilities, trained in plain PyTorch on any number of virtual ranks."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_cp.attention import Attention, AttentionTerms, Dropout, compose_attention
from mindspeed_cp.comm import RingCommunicators, VirtualCommunicator, VirtualWorld
from mindspeed_cp.comm.reduction import all_reduce
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.testing.tiny_gpt import GPT, Block, Sizes, make_batch

CONFIGS = {
    "CP 1": ContextParallelConfig(),
    "CP 2, ring": ContextParallelConfig(context_parallel_size=2, context_parallel_algo="megatron_cp_algo"),
    "CP 4, Ulysses in a ring": ContextParallelConfig(
        context_parallel_size=4, context_parallel_algo="hybrid_cp_algo", ulysses_degree_in_cp=2
    ),
}
TIMEOUT_S = 120.0


def train(config: ContextParallelConfig, steps: int, *, rate: float) -> list[float]:
    """The loss of each step with Adam, in fp64, of sequences that the ranks share. rate: of dropout."""
    world = VirtualWorld(config.context_parallel_size, TIMEOUT_S)
    return world.run(lambda rank: _train(world, rank, config, steps, rate))[0]


def _train(world: VirtualWorld, rank: int, config: ContextParallelConfig, steps: int, rate: float) -> list[float]:
    sizes, layout, attention = Sizes(), config.layout, _attention(world, rank, config)
    everyone = VirtualCommunicator(world, range(config.context_parallel_size), rank, "gradients of weights")
    model = GPT(sizes).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        batch = make_batch(sizes, step)
        x = model.tokens(layout.shard(batch.tokens, rank, dim=1)) + layout.shard(model.positions.weight, rank, dim=0)
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            dropout = Dropout(rate=rate, seed=1, layer=layer, micro_batch=step)
            block.attention.attend = partial(attention, terms=AttentionTerms(dropout=dropout))
            x = block(x)
        logits: Tensor = model.head(model.norm(x))
        labels = layout.shard(batch.labels, rank, dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / batch.labels.numel()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = all_reduce(everyone, parameter.grad)
        optimizer.step()
        losses.append(all_reduce(everyone, loss.detach().reshape(1)).item())
    return losses


def _attention(world: VirtualWorld, rank: int, config: ContextParallelConfig) -> Attention:
    topology, ulysses, ring = config.topology, None, None
    if topology.ulysses > 1:
        ulysses = VirtualCommunicator(world, topology.ulysses_ranks(rank), rank, "ulysses")
    if topology.ring_size > 1:
        kinds = (VirtualCommunicator(world, topology.ring_ranks(rank), rank, "ring") for _ in RingCommunicators._fields)
        ring = RingCommunicators(*kinds)
    return compose_attention(config, rank=rank, ulysses=ulysses, ring=ring)
