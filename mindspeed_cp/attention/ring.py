"""Ring attention: K/V blocks travel from rank to rank while each rank's queries stay. Plain and double ring alike.

Shapes: B batch, N query heads, G key/value heads, S tokens of one rank, D key head size, V value head size.

Which block is worked on at each step is data: see Note [One schedule] in schedule.py. Who sees whom is data too:
SequenceLayout.work. What travels meanwhile is in transit.py. This module only follows them, forward and backward.

Sources: Ring Attention arXiv:2310.01889, LoongTrain (double ring) arXiv:2406.18485.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from mindspeed_cp.attention.local import check_shards, default_scale
from mindspeed_cp.attention.merge import MergedOutput, accumulator_dtype
from mindspeed_cp.attention.transit import GradientsHome, Ring, travel
from mindspeed_cp.kernels import (
    KERNELS,
    MERGE_KERNELS,
    BlockCase,
    BlockMask,
    BlockOutput,
    KernelRegistry,
    MergeKernel,
    add_,
)
from mindspeed_cp.layout import BlockWork, MaskKind


@dataclass(frozen=True)
class RingAttention(Ring):
    """Attention whose keys and values are spread over the ranks of a ring.

    kernels: what to choose from for each block. merge_kernels: what to choose from for merging them, the preferred
    first.
    """

    kernels: KernelRegistry = KERNELS
    merge_kernels: Sequence[MergeKernel] = MERGE_KERNELS

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """See Attention. Raises ValueError where a causal attention is given a mask, or the chunks do not fit."""
        check_shards(q, k, v, visible)
        if self.causal and visible is not None:
            raise ValueError("a causal attention takes no mask tensor; build it with attention_mask_type='general'.")
        if q.size(2) % self.layout.chunks_per_rank:
            raise ValueError(
                f"{q.size(2)} tokens a rank are not a multiple of the {self.layout.chunks_per_rank} chunks it holds."
            )
        out: Tensor = _Ring.apply(self, q, k, v, visible, default_scale(q) if scale is None else scale)
        return out

    def mask(self, work: BlockWork, key_owner: int, visible: Tensor | None) -> BlockMask:
        """The mask of a block: the layout's, or the columns of `visible` that stand for the block's keys."""
        if visible is None:
            return BlockMask(work.mask)
        return BlockMask(MaskKind.ARBITRARY, self.layout.shard(visible, key_owner, dim=-1))


class _Ring(torch.autograd.Function):
    """Forward and backward pass over the ring; q, k, v, out and lse are saved once."""

    @staticmethod
    def forward(
        ctx: Any, ring: RingAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float
    ) -> Tensor:
        merged: MergedOutput | None = None
        states: list[tuple[Tensor, ...]] = []
        for step, owner, keys, values in travel(ring, k, v, "forward"):
            work = ring.work(ring.rank, owner, q.size(2))
            if work is None:
                states.append(())
                continue
            with record_function(ring.step_name("forward", step)):
                block = (q[:, :, work.queries], keys[:, :, work.keys], values[:, :, work.keys])
                mask = ring.mask(work, owner, visible)
                output = ring.kernels.choose(BlockCase.of(*block, mask)).forward(*block, mask, scale)
                if merged is None:
                    merged = MergedOutput(output, ring.merge_kernels)
                else:
                    merged.merge(output, work.queries)
            states.append(output.state)
        assert merged is not None, "the first step is the rank's own block, which it always sees"
        out, lse, _ = merged.result(q.dtype)
        ctx.save_for_backward(q, k, v, visible, out, lse)
        ctx.ring, ctx.scale, ctx.states = ring, scale, states
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, visible, out, lse = ctx.saved_tensors
        ring: RingAttention = ctx.ring
        (dout,) = grad_outputs
        dq = torch.zeros(q.shape, dtype=accumulator_dtype(q.dtype), device=q.device)
        homing = GradientsHome(ring, k, v)
        for state, (step, owner, keys, values) in zip(ctx.states, travel(ring, k, v, "backward"), strict=True):
            work = ring.work(ring.rank, owner, q.size(2))
            if work is None:
                homing.bring(step, None, None)
                continue
            with record_function(ring.step_name("backward", step)):
                rows = work.queries
                block = (q[:, :, rows], keys[:, :, work.keys], values[:, :, work.keys])
                mask = ring.mask(work, owner, visible)
                output = BlockOutput(out[:, :, rows], lse[:, :, rows], state)
                kernel = ring.kernels.choose(BlockCase.of(*block, mask))
                grads = kernel.backward(dout[:, :, rows], *block, output, mask, ctx.scale)
                add_(dq[:, :, rows], grads.dq)
            homing.bring(step, grads.dk, grads.dv)
        dk, dv = homing.finish()
        return None, dq.to(q.dtype), dk, dv, None, None
