"""Ring attention: K/V blocks travel from rank to rank while each rank's queries stay. Plain and double ring alike.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Which block is worked on at each step is data: see Note [One schedule] in schedule.py. Who sees whom is data too:
SequenceLayout.work. What travels meanwhile is in transit.py. This module only follows them, forward and backward.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from mindspeed_cp.attention.call import default_scale
from mindspeed_cp.attention.merge import MergedOutput, accumulator_dtype
from mindspeed_cp.attention.transit import GradientsHome, Ring, travel
from mindspeed_cp.kernels import (
    KERNELS,
    MERGE_KERNELS,
    BlockCase,
    BlockGradients,
    BlockKernel,
    BlockMask,
    BlockOutput,
    KernelRegistry,
    MergeKernel,
    add_,
)
from mindspeed_cp.kernels.precision import autocast_off
from mindspeed_cp.layout import BlockWork, MaskKind


@dataclass(frozen=True)
class RingAttention(Ring):
    """Attention whose keys and values are spread over the ranks of a ring.

    kernels: what to choose from for each block. merge_kernels: what to choose from for merging them, the preferred
    first.
    """

    kernels: KernelRegistry = KERNELS
    merge_kernels: Sequence[MergeKernel] = MERGE_KERNELS

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """See Attention. The chunks divide the tokens."""
        if q.size(2) % self.layout.chunks_per_rank:
            raise ValueError(
                f"{q.size(2)} tokens a rank are not a multiple of the {self.layout.chunks_per_rank} chunks it holds."
            )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """See Attention."""
        out: Tensor = _Ring.apply(self, q, k, v, visible, default_scale(q) if scale is None else scale)
        return out

    def mask(self, work: BlockWork, key_owner: int, visible: Tensor | None) -> BlockMask:
        """The mask of a block: the layout's, or the columns of `visible` that stand for the block's keys."""
        if visible is None:
            return BlockMask(work.mask)
        return BlockMask(MaskKind.ARBITRARY, self.layout.shard(visible, key_owner, dim=-1))


class _Step(NamedTuple):
    """What the forward pass keeps of a step: the kernel that computed it, and that kernel's own state."""

    kernel: BlockKernel
    state: tuple[Tensor, ...]


class _Ring(torch.autograd.Function):
    """Forward and backward pass over the ring; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any, ring: RingAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
    ) -> Tensor:
        with autocast_off(q.device.type):
            (out, lse, _), steps = _forward(ring, q, k, v, visible, scale)
        ctx.save_for_backward(q, k, v, visible, out, lse)
        ctx.ring, ctx.scale, ctx.steps = ring, scale, steps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out, lse = ctx.saved_tensors
        with autocast_off(q.device.type):
            gradients = _backward(
                ctx.ring, ctx.steps, grad_outputs[0], q, k, v, visible, BlockOutput(out, lse), ctx.scale
            )
        return None, *gradients, None, None


def _forward(
    ring: RingAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
) -> tuple[BlockOutput, list[_Step | None]]:
    """The merged output over all blocks, and what the backward pass needs of each step; None where nothing was done."""
    merged: MergedOutput | None = None
    steps: list[_Step | None] = []
    for step, owner, keys, values in travel(ring, k, v, "forward"):
        work = ring.work(ring.rank, owner, q.size(2))
        if work is None:
            steps.append(None)
            continue
        with record_function(ring.step_name("forward", step)):
            block = (q[:, :, work.queries], keys[:, :, work.keys], values[:, :, work.keys])
            mask = ring.mask(work, owner, visible)
            kernel = ring.kernels.choose(BlockCase.of(*block, mask))
            output = kernel.forward(*block, mask, scale)
            if merged is None:
                merged = MergedOutput(output, ring.merge_kernels)
            else:
                merged.merge(output, work.queries)
        steps.append(_Step(kernel, output.state))
    assert merged is not None, "the first step is the rank's own block, which it always sees"
    return merged.result(q.dtype), steps


def _backward(
    ring: RingAttention,
    steps: list[_Step | None],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    merged: BlockOutput,
    scale: float,
) -> BlockGradients:
    """Gradients of this rank's q, k and v, each rounded once."""
    dq = torch.zeros(q.shape, dtype=accumulator_dtype(q.dtype), device=q.device)
    homing = GradientsHome(ring, k, v)
    for done, (step, owner, keys, values) in zip(steps, travel(ring, k, v, "backward"), strict=True):
        work = ring.work(ring.rank, owner, q.size(2))
        if work is None or done is None:
            homing.bring(step, None, None)
            continue
        with record_function(ring.step_name("backward", step)):
            rows = work.queries
            block = (q[:, :, rows], keys[:, :, work.keys], values[:, :, work.keys])
            output = BlockOutput(merged.out[:, :, rows], merged.lse[:, :, rows], done.state)
            grads = done.kernel.backward(dout[:, :, rows], *block, output, ring.mask(work, owner, visible), scale)
            add_(dq[:, :, rows], grads.dq)
        homing.bring(step, grads.dk, grads.dv)
    return BlockGradients(dq.to(q.dtype), *homing.finish())
