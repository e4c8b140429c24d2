"""Steps of layers under activation checkpointing, timed: attention computed again, and what it has given kept.

A layer is attention and the rest of it, which is a wait as the kernel is: so much forward, and twice that backward.
"""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mindspeed_cp.attention import ContextParallelAttention, Recomputation, build_attention
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.kernels import EmulatedKernel, wait_until
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.planner import AttentionShape


class _Rest(torch.autograd.Function):
    """All of a layer but attention: what it is given, after so many seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        wait_until(time.perf_counter() + seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wait_until(time.perf_counter() + 2 * ctx.seconds)
        return grad, None


@dataclass(frozen=True)
class _Layer:
    """An algorithm's attention on this rank: one that is computed again, and one within a `Recomputation`."""

    again: ContextParallelAttention
    kept: ContextParallelAttention
    recomputation: Recomputation


_IN_A_ROW = 5

_LAYERS: dict[str, _Layer] = {}
"""By the algorithm's name."""


def prepare(algorithm: Algorithm, flops_per_s: float) -> None:
    """Make an algorithm's process groups and attention, on an emulated accelerator of so many operations a second."""
    assert dist.group.WORLD is not None
    config, kernels, recomputation = algorithm.config, KernelRegistry((EmulatedKernel(flops_per_s),)), Recomputation()
    groups = ContextParallelGroups.build(algorithm.topology, dist.group.WORLD, overlap=algorithm.overlap)
    _LAYERS[algorithm.name] = _Layer(
        build_attention(config, groups, kernels=kernels),
        build_attention(config, groups, kernels=kernels, recomputation=recomputation),
        recomputation,
    )


def attention_seconds(algorithm: str, shape: AttentionShape) -> float:
    """A forward pass of attention alone, on this rank: one of several in a row, as in a step.

    In the time of a single one ranks would still be coming from the barrier before it.
    """
    x, attention = _shard(shape), _LAYERS[algorithm].again
    return _timed(lambda: [attention(x, x, x) for _ in range(_IN_A_ROW)]) / _IN_A_ROW


def step_seconds(algorithm: str, shape: AttentionShape, rest_s: float, num_layers: int, keep: bool) -> float:
    """Forward and backward pass of layers that are recomputed, each by itself, on this rank.

    rest_s: what a layer's forward pass takes beside attention. keep: whether what attention has given is kept.
    """
    layer, x = _LAYERS[algorithm], _shard(shape).requires_grad_()
    attention = layer.kept if keep else layer.again
    recomputed = layer.recomputation.around(checkpoint) if keep else checkpoint

    def run(x: Tensor) -> Tensor:
        x = _Rest.apply(x, rest_s)
        return attention(x, x, x)

    def step() -> None:
        out = x
        for _ in range(num_layers):
            out = recomputed(run, out, use_reentrant=False)
        out.backward(torch.ones_like(out))

    return _timed(step)


def _shard(shape: AttentionShape) -> Tensor:
    """This rank's tokens, which are queries, keys and values at once."""
    size = 1, shape.num_heads, shape.num_tokens // dist.get_world_size(), shape.head_size
    return torch.zeros(size, dtype=torch.bfloat16)


def _timed(compute: Any) -> float:
    gc.collect()
    dist.barrier()
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start
