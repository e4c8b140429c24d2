"""Multi-latent attention in each of its forms on emulated accelerators: what a rank runs, timed.

All arithmetic is a wait for its floating-point operations, messages are real. Sizes are those of a LatentShape.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, Latent, build_attention
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.kernels import EmulatedKernel, wait_until
from mindspeed_cp.comm import Traffic
from mindspeed_cp.kernels import KernelRegistry
from mindspeed_cp.planner import LatentShape
from mindspeed_cp.program import Phase

Passes = dict[Phase, float]


class _Product(torch.autograd.Function):
    """Zeros of given shapes after so many seconds, and gradients after twice that."""

    @staticmethod
    def forward(ctx: Any, seconds: float, shapes: tuple[tuple[int, ...], ...], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.seconds, ctx.given = seconds, [x.shape for x in given]
        start = time.perf_counter()
        made = tuple(given[0].new_zeros(shape) for shape in shapes)
        wait_until(start + seconds)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        start = time.perf_counter()
        found = [grads[0].new_zeros(shape) for shape in ctx.given]
        wait_until(start + 2 * ctx.seconds)
        return None, None, *found


class _Bench:
    """An algorithm's attention on this rank. flops_per_s: of the emulated accelerator."""

    def __init__(self, algorithm: Algorithm, flops_per_s: float) -> None:
        self.flops_per_s, self.traffic = flops_per_s, Traffic()
        kernels = KernelRegistry((EmulatedKernel(flops_per_s),))
        self.attention: ContextParallelAttention = build_attention(
            algorithm.config, kernels=kernels, traffic=self.traffic
        )

    def attend(self, shape: LatentShape, q: Tensor, payload: Tensor, up: Tensor) -> Tensor:
        """Output [1, N, s, V] of queries [1, N, s, U + R] and payloads [1, s, L + R]. up: [N, U + V, L]."""
        heads, tokens = q.size(1), q.size(2)
        own_s = shape.own_flops(tokens, Phase.FORWARD) / self.flops_per_s
        if shape.form == "expanded":
            sizes = (1, heads, tokens, shape.head_size), (1, heads, tokens, shape.value_size)
            k, v = _Product.apply(own_s, sizes, payload, up)
            return self.attention(q, k, v)
        if shape.form == "latent":
            return self.attention.of_latent(q, Latent(payload, self._expand(shape), (up,)))
        # Queries are multiplied before attention and outputs after it: by U and by V numbers of U + V.
        unshared = shape.head_size - shape.rotated
        of_queries = own_s * unshared / (unshared + shape.value_size)
        (q,) = _Product.apply(of_queries, ((1, heads, tokens, shape.payload),), q, up)
        out = self.attention.of_latent(
            q, Latent(payload, lambda x: (x.unsqueeze(1), x.unsqueeze(1)[..., : shape.latent]))
        )
        result: Tensor
        (result,) = _Product.apply(own_s - of_queries, ((1, heads, tokens, shape.value_size),), out, up)
        return result

    def _expand(self, shape: LatentShape) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def expand(payload: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
            heads, tokens = up.size(0), payload.size(1)
            seconds = shape.projection_flops(tokens) * heads / shape.num_heads / self.flops_per_s
            sizes = (1, heads, tokens, shape.head_size), (1, heads, tokens, shape.value_size)
            k, v = _Product.apply(seconds, sizes, payload, up)
            return k, v

        return expand


_BENCHES: dict[str, _Bench] = {}
"""By the algorithm's name."""


def prepare(algorithm: Algorithm, flops_per_s: float) -> None:
    """Make an algorithm's process groups and attention."""
    _BENCHES[algorithm.name] = _Bench(algorithm, flops_per_s)


def run(algorithm: str, shape: LatentShape) -> tuple[Passes, int]:
    """Seconds of both passes on this rank, and bytes that it has sent."""
    bench, size = _BENCHES[algorithm], dist.get_world_size()
    tokens, heads = shape.num_tokens // size, shape.num_heads
    unshared = shape.head_size - shape.rotated
    sizes = (
        (1, heads, tokens, shape.head_size),
        (1, tokens, shape.payload),
        (heads, unshared + shape.value_size, shape.latent),
    )
    q, payload, up = (torch.zeros(each, dtype=torch.bfloat16, requires_grad=True) for each in sizes)
    bench.traffic.clear()
    gc.collect()
    dist.barrier()
    start = time.perf_counter()
    out = bench.attend(shape, q, payload, up)
    forward = time.perf_counter() - start
    dout = torch.zeros_like(out)
    dist.barrier()
    start = time.perf_counter()
    torch.autograd.grad(out, (q, payload, up), dout)
    return {Phase.FORWARD: forward, Phase.BACKWARD: time.perf_counter() - start}, bench.traffic.bytes_sent.total()
