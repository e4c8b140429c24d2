"""K/V heads that kernels are given more than once, see Note [Heads] in heads.py: repeated where they are read.

Note [Repeated heads]
    What is exchanged, sent on, kept and saved has each head once. A step repeats those of its block that its tiles see,
    in both passes, and drops them; the gradients of a head are added once the kernels of the step have given all of
    theirs, in fp32 (fp64 for fp64). With `pieces` above 1, heads are repeated before the ring and all at once: a head
    that is sent once may be in two pieces.

Shapes: B batch, h heads as they are sent, H heads as they are given to kernels, S tokens, D key head size, V value head
size.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.attention.blocks import Block, in_one
from mindspeed_cp.attention.exchange import Partial
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.plan import Tile, union


def repeated(x: Tensor, given: Sequence[int]) -> Tensor:
    """[B, H, S, D] of x [B, h, S, D]. given: which of its heads, in order."""
    return x.index_select(1, _index(tuple(given), x.device))


def added(x: Tensor, given: Sequence[int]) -> Tensor:
    """The inverse of `repeated` for gradients [B, H, S, D]: those of a head are added, in the dtype of sums."""
    total = x.new_zeros((x.size(0), max(given) + 1, *x.shape[2:]), dtype=accumulation_dtype(x.dtype))
    return total.index_add_(1, _index(tuple(given), x.device), x.to(total.dtype))


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _index(given: tuple[int, ...], device: torch.device) -> Tensor:
    """[H] int64. Made once: each is a copy to the device, which an accelerator's host waits for."""
    return torch.tensor(given, device=device)


@dataclass(frozen=True, eq=False)
class RepeatedHeads:
    """Keys [B, h, S, D] and values [B, h, S, V], and which of their heads kernels are given, in order."""

    k: Tensor
    v: Tensor
    given: tuple[int, ...]

    @property
    def stand_ins(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, D] and values [B, H, S, V] that say what they would be like, in no memory of their own."""
        k, v = (x[:, :1].expand(-1, len(self.given), -1, -1) for x in (self.k, self.v))
        return k, v

    def at_once(self) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, D] and values [B, H, S, V], for what works on some heads after others."""
        k, v = _Repeat.apply(self.given, self.k, self.v)
        return k, v


class _Repeat(torch.autograd.Function):
    """`repeated`, whose gradient is `added`, rounded once."""

    @staticmethod
    def forward(ctx: Any, given: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.given = given
        return tuple(repeated(x, given) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(added(x, ctx.given).to(x.dtype) for x in grads)


class Repetition:
    """How a pass repeats the heads of its blocks, as `Expansion` makes keys and values of what travels."""

    def __init__(self, given: Sequence[int]) -> None:
        self._given = given

    def block(self, block: Block, tiles: Sequence[Tile]) -> Block:
        """The keys and values that these tiles see, with the heads that kernels are given."""
        tokens = union(tile.keys for tile in tiles)
        k, v = (repeated(in_one(parts), self._given) for parts in block.parts(tokens))
        return Block(tokens, k, v)

    def of_payload(self, block: Block, found: Sequence[Partial]) -> list[Partial]:
        """Gradients of the heads as they travel, from those of the heads given."""
        return [each._replace(dk=added(each.dk, self._given), dv=added(each.dv, self._given)) for each in found]

    def gradients(self) -> tuple[Tensor, ...]:
        """Those of weights, of which there are none."""
        return ()
