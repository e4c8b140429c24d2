"""The plain baseline: gather all keys and values, then compute each query chunk over what it sees.

Shapes: P ranks, B batch, N query heads, G key/value heads, s tokens of one rank, S = P * s tokens, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.attention.terms import default_scale
from mindspeed_cp.comm import Communicator
from mindspeed_cp.kernels import TileKernel, TileOutput, TileTerms, Window
from mindspeed_cp.kernels.places import in_all_samples
from mindspeed_cp.kernels.tiles import cut
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import AttentionPlan, Tile
from mindspeed_cp.sharding import SequenceLayout


@dataclass(frozen=True)
class AllGatherAttention:
    """Causal attention on zigzag shards; gathered keys and values are kept for the backward pass.

    Forward sends K/V P - 1 times; backward sends each partial dK/dV to its owner in the input type, added in fp32.
    """

    communicator: Communicator
    kernel: TileKernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [B, N, s, D] of this rank's queries; q: [B, N, s, D]; k, v: [B, G, s, D]."""
        out: Tensor = _AllGather.apply(self, q, k, v)
        return out

    @property
    def layout(self) -> SequenceLayout:
        """Who holds which tokens."""
        return SequenceLayout(size=self.communicator.size)

    def tiles(self, num_tokens: int) -> Iterator[Tile]:
        """The rank's queries and the sequence's keys that they see: for each chunk what is before it, then itself."""
        whole = EqualChunks(1, num_tokens * self.layout.size, "contiguous")
        plan = AttentionPlan(self.layout.of(num_tokens), whole)
        for tile in plan.tiles(self.communicator.rank, 0):
            yield from cut(tile)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: AllGatherAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gathered = attention.communicator.all_gather(torch.cat([k, v]).movedim(2, 0).contiguous())
        keys, values = attention.layout.restore(gathered.flatten(0, 1), dim=0).movedim(0, 2).chunk(2)
        merged = MergedOutput.of(q, v.size(3))
        for tile in attention.tiles(q.size(2)):
            block = (q[:, :, tile.queries], keys[:, :, tile.keys], values[:, :, tile.keys])
            output = attention.kernel.forward(
                *block, TileTerms(default_scale(q.size(-1)), Window(tile.left, tile.right))
            )
            merged.merge(output, in_all_samples(tile.queries))
        out, lse, _ = merged.result()
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.attention = attention
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, out, lse = ctx.saved_tensors
        attention: AllGatherAttention = ctx.attention
        dq, dk, dv = (
            torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (q, keys, values)
        )
        for tile in attention.tiles(q.size(2)):
            queries, seen, window = tile.queries, tile.keys, Window(tile.left, tile.right)
            block = (q[:, :, queries], keys[:, :, seen], values[:, :, seen])
            output = TileOutput(out[:, :, queries], lse[:, :, queries])
            terms = TileTerms(default_scale(q.size(-1)), window)
            grads = attention.kernel.backward(grad_outputs[0][:, :, queries], *block, output, terms)
            dq[:, :, queries] += grads.dq
            dk[:, :, seen] += grads.dk
            dv[:, :, seen] += grads.dv
        partials = torch.cat([dk, dv]).to(q.dtype)
        layout = attention.layout
        send = torch.stack([layout.shard(partials, rank, dim=2) for rank in range(layout.size)])
        own_dk, own_dv = attention.communicator.all_to_all(send).sum(dim=0, dtype=dk.dtype).to(q.dtype).chunk(2)
        return None, dq.to(q.dtype), own_dk, own_dv
