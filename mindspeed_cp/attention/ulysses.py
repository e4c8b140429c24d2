"""Ulysses: an all-to-all gives each rank the whole sequence for a part of the heads, and another one takes it back.

Shapes: P ranks of the Ulysses group, B batch, H heads, S tokens of all ranks together, s tokens of this rank (not
always S / P), D head size, W numbers that one token sends to one rank.

Note [One message, one copy]
    A rank sends q, k and v in a single message: for each destination and token, its heads of q, then of k, then of v.
    The send copy regroups the heads, and the receive copy sorts the tokens of all ranks by position; on the way back
    the send copy hands the tokens to their owners, and the receive copy joins the heads. q, k and v are then views of
    the one buffer, and nothing is copied twice. Where the ranks' tokens are in order as they come, as with contiguous
    shards, nothing is sorted: what is received is the sequence, and an output is sent from where it is.

    Received from 2 ranks, and sorted:   0 3 | 1 2   ->   0 1 2 3

Source: DeepSpeed Ulysses, arXiv:2309.14509.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.exchange import in_profiles
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator, Sizes
from mindspeed_cp.plan import AttentionPlan, GroupedLayout, Part


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

    @property
    def rank(self) -> int:
        """This rank's place among the context-parallel ranks."""
        return self.groups[self.group][self.communicator.rank]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless the group divides the heads."""
        size = self.communicator.size
        for name, x in (("q", q), ("k", k)):
            if x.size(1) % size:
                raise ValueError(f"{name} has {x.size(1)} heads, not a multiple of the Ulysses degree {size}.")
        self.ring.check_heads(k.size(1) // size)

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
    ) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionPlan, Terms, "GroupOrder"]:
        """What this rank attends with: all tokens of its group for its part of the heads."""
        grouped = plan.of_groups(self.groups)
        assert isinstance(grouped.queries, GroupedLayout)
        order = group_order(grouped.queries, self.group)
        if terms.visible is not None:
            terms = replace(terms, visible=self._gather_rows(terms.visible, order))
        if grouped.keys is grouped.queries:
            q, k, v = _ScatterHeads.apply(self.communicator, order, q, k, v)
            return (q, k, v), grouped, terms, order
        assert isinstance(grouped.keys, GroupedLayout)
        (q,) = _ScatterHeads.apply(self.communicator, order, q)
        k, v = _ScatterHeads.apply(self.communicator, group_order(grouped.keys, self.group), k, v)
        return (q, k, v), grouped, terms, order

    def _back(self, part: Tensor, order: "GroupOrder") -> Tensor:
        """This rank's own tokens of all heads."""
        gathered: tuple[Tensor] = _GatherHeads.apply(self.communicator, order, part)
        return gathered[0]

    def _gather_rows(self, visible: Tensor, order: "GroupOrder") -> Tensor:
        """The mask's rows of all queries in the group, for this rank's heads: [..., S, T]."""
        mine = visible.movedim(-2, 0)
        padded = mine.new_zeros((max(order.sizes), *mine.shape[1:]))
        padded[: len(mine)] = mine
        gathered = self.communicator.all_gather(padded)
        rows = torch.cat([rows[:size] for rows, size in zip(gathered, order.sizes, strict=True)])
        rows = order.sort(rows).movedim(0, -2)
        if rows.dim() == 4 and rows.size(1) > 1:
            rows = rows.chunk(self.communicator.size, dim=1)[self.communicator.rank]
        return rows


@dataclass(frozen=True, eq=False)
class GroupOrder:
    """How the tokens of a group's members, one member after the other, are put in the order of the stream.

    sizes: tokens of each member. parts: of the members' shards, in order; of each sample, or of all where there is one.
    """

    sizes: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]
    _indices: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)

    @functools.cached_property
    def is_sorted(self) -> bool:
        """Whether they are in order as they are."""
        return all(parts == tuple(sorted(parts)) for parts in self.parts)

    def sort(self, tokens: Tensor) -> Tensor:
        """The members' tokens [S, B, ...] in order."""
        if self.is_sorted:
            return tokens
        result = torch.empty_like(tokens)
        for samples, index in self._by_sample(tokens.device):
            torch.index_select(tokens[:, samples], 0, index, out=result[:, samples])
        return result

    def unsort_into(self, result: Tensor, tokens: Tensor) -> None:
        """Put what is in order [S, B, ...] where its members have it."""
        if self.is_sorted:
            result.copy_(tokens)
            return
        for samples, index in self._by_sample(tokens.device, inverse=True):
            torch.index_select(tokens[:, samples], 0, index, out=result[:, samples])

    def _by_sample(self, device: torch.device, *, inverse: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Samples, and which of the members' tokens is the i-th in order; or the inverse of that."""
        # Copied to the device once: at each call an accelerator would have the host wait for it.
        if device not in self._indices:
            starts = (0, *accumulate(self.sizes))
            spans = [
                [(starts[part.member] + part.start, part.stop - part.start) for part in each] for each in self.parts
            ]
            there = [torch.cat([torch.arange(start, start + count) for start, count in each]) for each in spans]
            self._indices[device] = tuple(x.to(device) for each in there for x in (each, each.argsort()))
        indices = self._indices[device][inverse::2]
        for sample, index in enumerate(indices):
            yield slice(None) if len(indices) == 1 else slice(sample, sample + 1), index


@functools.lru_cache(maxsize=16)  # Each keeps a number for every token on the device, and packed batches have one each.
def group_order(layout: GroupedLayout, group: int) -> GroupOrder:
    """The order of a group's tokens, made once for all layers of a batch."""
    sizes = tuple(layout.layout.num_tokens(member) for member in layout.groups[group])
    return GroupOrder(sizes, tuple(layout.parts(group).values()))


class _ScatterHeads(torch.autograd.Function):
    """`scatter_heads`, whose gradient is `gather_heads`."""

    @staticmethod
    def forward(ctx: Any, communicator: Communicator, order: GroupOrder, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.communicator, ctx.order = communicator, order
        return scatter_heads(shards, communicator, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *gather_heads(grads, ctx.communicator, ctx.order)


class _GatherHeads(torch.autograd.Function):
    """`gather_heads`, whose gradient is `scatter_heads`."""

    @staticmethod
    def forward(ctx: Any, communicator: Communicator, order: GroupOrder, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.communicator, ctx.order = communicator, order
        return gather_heads(parts, communicator, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *scatter_heads(grads, ctx.communicator, ctx.order)


def scatter_heads(shards: Sequence[Tensor], communicator: Communicator, order: GroupOrder) -> tuple[Tensor, ...]:
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
    with in_profiles("Ulysses: exchange heads for tokens"):
        received = communicator.all_to_all(send.flatten(0, 1), Sizes([tokens] * size, order.sizes))  # [S, B, W]
    return tuple(x.permute(1, 2, 0, 3) for x in _split_heads(order.sort(received), parts))


def gather_heads(parts: Sequence[Tensor], communicator: Communicator, order: GroupOrder) -> tuple[Tensor, ...]:
    """This rank's own tokens of all heads, from all tokens of the group for its part of the heads.

    parts: tensors [B, H/P, S, D] of one dtype. Returns [B, H, s, D] for each, in memory [s, B, H, D] as Megatron wants
    them. The inverse of `scatter_heads`, likewise with one all-to-all.
    """
    size, tokens = communicator.size, order.sizes[communicator.rank]
    sequences = [x.permute(2, 0, 1, 3) for x in parts]  # [S, B, H/P, D]
    if order.is_sorted and len(parts) == 1 and sequences[0].is_contiguous():
        send = sequences[0].flatten(2)
    else:
        send = parts[0].new_empty((*sequences[0].shape[:2], _width(sequences)))
        for sequence, place in zip(sequences, _split_heads(send, sequences), strict=True):
            order.unsort_into(place, sequence)
    with in_profiles("Ulysses: exchange tokens for heads"):
        received = communicator.all_to_all(send, Sizes(order.sizes, [tokens] * size)).unflatten(0, (size, tokens))
    shards = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in _split_heads(received, sequences))
    return tuple(x.permute(1, 2, 0, 3) for x in shards)


def _width(tensors: Sequence[Tensor]) -> int:
    """Numbers that one token takes in a message of these tensors [..., heads, head size]."""
    return sum(x.size(-2) * x.size(-1) for x in tensors)


def _split_heads(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `message` [..., W], one for each of `like`, with its heads and head size as the last dims."""
    widths = [x.size(-2) * x.size(-1) for x in like]
    return [piece.unflatten(-1, x.shape[-2:]) for piece, x in zip(message.split(widths, dim=-1), like, strict=True)]
