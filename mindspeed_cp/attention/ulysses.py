"""Ulysses: an all-to-all gives each rank the whole sequence for a part of the heads, and another one takes it back.

Shapes: P ranks of the Ulysses group, C chunks a rank holds, B batch, H heads, S tokens of all ranks together,
s = S / P tokens of one rank, D head size, W numbers that one token sends to one rank.

Note [One message, one copy]
    A rank sends q, k and v in a single message: for each destination and token, its heads of q, then of k, then of v.
    The all-to-all needs one copy on either side in any case. The send copy regroups the heads, and the receive copy
    sorts the chunks of the zigzag by position; on the way back the send copy hands the chunks to their owners, and the
    receive copy joins the heads. q, k and v are then views of the one buffer, and nothing is copied twice.

    Received from 2 ranks, and sorted:   0 3 | 1 2   ->   0 1 2 3

Source: DeepSpeed Ulysses, arXiv:2309.14509.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator
from mindspeed_cp.plan import AttentionPlan, GroupedLayout


@dataclass(frozen=True)
class UlyssesAttention:
    """Attention whose heads are split over the ranks of a group.

    communicator: this rank's group. groups: the ranks of all groups, in order; each is one rank of the ring across.
    group: which is this rank's. ring: attention over what the groups hold, for a part of the heads.
    """

    communicator: Communicator
    groups: tuple[tuple[int, ...], ...]
    group: int
    ring: RingAttention

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless the group divides the heads."""
        size = self.communicator.size
        for name, x in (("q", q), ("k", k)):
            if x.size(1) % size:
                raise ValueError(f"{name} has {x.size(1)} heads, not a multiple of the Ulysses degree {size}.")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> Tensor:
        """See Attention. plan: between all context-parallel ranks."""
        (q, k, v), grouped, terms, order = self._exchanged(q, k, v, plan, terms)
        return self._back(self.ring(q, k, v, grouped, terms), order)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms) -> tuple[Tensor, Tensor]:
        """See Attention. plan: between all context-parallel ranks."""
        (q, k, v), grouped, terms, order = self._exchanged(q, k, v, plan, terms)
        out, lse = self.ring.with_lse(q, k, v, grouped, terms)
        return self._back(out, order), self._back(lse.unsqueeze(-1), order).squeeze(-1)

    def _exchanged(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, terms: Terms
    ) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionPlan, Terms, tuple[int, ...]]:
        """What this rank attends with: all tokens of its group for its part of the heads."""
        grouped = plan.of_groups(self.groups)
        assert isinstance(grouped.queries, GroupedLayout)
        order = chunk_order(grouped.queries, self.group)
        if terms.visible is not None:
            terms = replace(terms, visible=self._gather_rows(terms.visible, order))
        q, k, v = _ScatterHeads.apply(self.communicator, order, q, k, v)
        return (q, k, v), grouped, terms, order

    def _back(self, part: Tensor, order: tuple[int, ...]) -> Tensor:
        """This rank's own tokens of all heads."""
        gathered: tuple[Tensor] = _GatherHeads.apply(self.communicator, order, part)
        return gathered[0]

    def _gather_rows(self, visible: Tensor, order: tuple[int, ...]) -> Tensor:
        """The mask's rows of all queries in the group, for this rank's heads: [..., S, T]."""
        size = self.communicator.size
        rows: Tensor = self.communicator.all_gather(visible.movedim(-2, 0).contiguous()).flatten(0, 1)
        chunks = rows.unflatten(0, (len(order), -1))
        rows = chunks.index_select(0, _index(order, rows.device)).flatten(0, 1).movedim(0, -2)
        if rows.dim() == 4 and rows.size(1) > 1:
            rows = rows.chunk(size, dim=1)[self.communicator.rank]
        return rows


@functools.lru_cache(maxsize=256)
def chunk_order(layout: GroupedLayout, group: int) -> tuple[int, ...]:
    """The order that sorts the chunks of a group's concatenated shards: entry i is the place of the i-th earliest.

    The chunks are as long as the parts of the members' shards allow.
    """
    (parts,) = layout.parts(group).values()
    shards = [layout.layout.num_tokens(member) for member in layout.groups[group]]
    starts = [0, *accumulate(shards)]
    chunk = math.gcd(*(edge for part in parts for edge in (starts[part.member] + part.start, part.stop - part.start)))
    tokens = (starts[part.member] + token for part in parts for token in range(part.start, part.stop, chunk))
    places = [token // chunk for token in tokens]
    return tuple(places)


class _ScatterHeads(torch.autograd.Function):
    """`scatter_heads`, whose gradient is `gather_heads`."""

    @staticmethod
    def forward(
        ctx: Any, communicator: Communicator, chunk_order: tuple[int, ...], *shards: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.communicator, ctx.chunk_order = communicator, chunk_order
        return scatter_heads(shards, communicator, chunk_order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *gather_heads(grads, ctx.communicator, ctx.chunk_order)


class _GatherHeads(torch.autograd.Function):
    """`gather_heads`, whose gradient is `scatter_heads`."""

    @staticmethod
    def forward(
        ctx: Any, communicator: Communicator, chunk_order: tuple[int, ...], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.communicator, ctx.chunk_order = communicator, chunk_order
        return gather_heads(parts, communicator, chunk_order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *scatter_heads(grads, ctx.communicator, ctx.chunk_order)


def scatter_heads(
    shards: Sequence[Tensor], communicator: Communicator, chunk_order: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, for this rank's part of the heads, from its own tokens of all heads.

    shards: tensors [B, H, s, D] of one dtype, whose H and D may differ. Returns [B, H/P, S, D] for each, views of one
    buffer. One all-to-all for all of them, see Note [One message, one copy].
    """
    size = communicator.size
    batch, _, tokens, _ = shards[0].shape
    parts = [x.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4) for x in shards]  # [P, s, B, H/P, D]
    send = shards[0].new_empty((size, tokens, batch, _width(parts)))
    for part, place in zip(parts, _split_heads(send, parts), strict=True):
        place.copy_(part)
    received = communicator.all_to_all(send).view(len(chunk_order), -1, batch, send.size(-1))
    if list(chunk_order) != sorted(chunk_order):
        received = received.index_select(0, _index(chunk_order, received.device))
    sequence = received.flatten(0, 1)  # [S, B, W]
    return tuple(x.permute(1, 2, 0, 3) for x in _split_heads(sequence, parts))


def gather_heads(
    parts: Sequence[Tensor], communicator: Communicator, chunk_order: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """This rank's own tokens of all heads, from all tokens of the group for its part of the heads.

    parts: tensors [B, H/P, S, D] of one dtype. Returns [B, H, s, D] for each, in memory [s, B, H, D] as Megatron wants
    them. The inverse of `scatter_heads`, likewise with one all-to-all.
    """
    size = communicator.size
    sequences = [x.permute(2, 0, 1, 3).unflatten(0, (len(chunk_order), -1)) for x in parts]  # [P*C, s/C, B, H/P, D]
    send = parts[0].new_empty((*sequences[0].shape[:3], _width(sequences)))
    owner_order = _index(_inverse(chunk_order), send.device)
    for sequence, place in zip(sequences, _split_heads(send, sequences), strict=True):
        torch.index_select(sequence, 0, owner_order, out=place)
    received = communicator.all_to_all(send.view(size, -1, *send.shape[2:]))  # [P, s, B, W]
    shards = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in _split_heads(received, sequences))
    return tuple(x.permute(1, 2, 0, 3) for x in shards)


def _width(tensors: Sequence[Tensor]) -> int:
    """Numbers that one token takes in a message of these tensors [..., heads, head size]."""
    return sum(x.size(-2) * x.size(-1) for x in tensors)


def _split_heads(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `message` [..., W], one for each of `like`, with its heads and head size as the last dims."""
    widths = [x.size(-2) * x.size(-1) for x in like]
    return [piece.unflatten(-1, x.shape[-2:]) for piece, x in zip(message.split(widths, dim=-1), like, strict=True)]


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@functools.cache
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    """`order` on a device. Made once: a copy to an accelerator in every layer would have the host wait for it."""
    return torch.tensor(order, device=device)
