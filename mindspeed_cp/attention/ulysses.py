"""Ulysses: an all-to-all gives each rank the whole sequence for a part of the heads, and another one takes it back.

What an all-to-all sends is in head_exchange.py. Shapes: B batch, H heads, S tokens of all ranks together, s tokens of
this rank (not always S / P of P ranks), T keys, D head size.

Source: DeepSpeed Ulysses, arXiv:2309.14509.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.group_order import GroupOrder, group_order
from mindspeed_cp.attention.head_exchange import gather_heads, scatter_heads
from mindspeed_cp.attention.interface import OUTPUT, WITH_LSE, GridAttention, Source, SourceOfPart, Wanted
from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.recomputation import Recomputation, replay
from mindspeed_cp.attention.repeated_heads import RepeatedHeads
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator
from mindspeed_cp.heads import Dealt, HeadLayout
from mindspeed_cp.plan import AttentionPlan, GroupedLayout, Layout


@dataclass(frozen=True)
class UlyssesAttention(GridAttention):
    """Attention whose heads are split over the ranks of a group.

    communicator: this rank's group. groups: the ranks of all groups, in order; each is one rank of the ring across.
    group: which is this rank's. ring: attention over what the groups hold, for a part of the heads.
    """

    communicator: Communicator
    groups: tuple[tuple[int, ...], ...]
    group: int
    ring: RingAttention

    @property
    def exchanges_heads(self) -> bool:
        """See Attention."""
        return True

    @property
    def recomputation(self) -> Recomputation | None:
        """Of the checkpoints that it runs in."""
        return self.ring.recomputation

    @property
    def rank(self) -> int:
        """This rank's place among the context-parallel ranks."""
        return self.groups[self.group][self.communicator.rank]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless each rank of the group gets a head."""
        heads = dealt_heads(q.size(1), k.size(1), self.communicator.size)
        for given in set(heads.keys.given):
            self.ring.check_heads(len(given))

    def check_latent(self) -> None:
        """Raise ValueError where a latent cannot travel in the ring."""
        self.ring.check_latent()

    def attend(
        self, wanted: Wanted, q: Tensor, source: Source, plan: AttentionPlan, terms: Terms
    ) -> tuple[Tensor, ...]:
        """See GridAttention. plan: between all context-parallel ranks."""
        part = self._exchanged(q, source, plan, terms)
        out, *beside = self.ring.attend(wanted, part.q, part.source, part.plan, part.terms)
        out = self._back(out, part)
        if wanted == OUTPUT:
            return (out,)
        (mine,) = beside
        if wanted == WITH_LSE:
            return out, self._back(mine.unsqueeze(-1), part).squeeze(-1)
        largest = mine.new_full((q.size(1),), -torch.inf)
        largest[part.heads.queries.parts[self.communicator.rank]] = mine
        return out, largest

    def _terms_of_group(self, terms: Terms, order: GroupOrder, heads: Dealt) -> Terms:
        """Those of all queries of the group, for this rank's heads."""
        terms = terms.of_heads(heads.parts[self.communicator.rank])
        if terms.visible is not None:
            terms = replace(terms, visible=self._gather_rows(terms.visible, order, heads))
        if terms.bias is not None:
            terms = replace(terms, bias=self._rows_of_bias(terms.bias, order, heads))
        return terms

    def _exchanged(self, q: Tensor, source: Source, plan: AttentionPlan, terms: Terms) -> "_Part":
        """What this rank attends with: all tokens of its group for its part of the heads.

        Of a latent each rank gets the payloads of its group, all of them, and makes keys and values of its own heads.
        """
        communicator, grouped = self.communicator, plan.of_groups(self.groups)
        k, v = source.stand_ins if isinstance(source, Latent) else source
        heads = dealt_heads(q.size(1), k.size(1), communicator.size)
        keys: tuple[Tensor, ...] = (k, v)
        dealt: tuple[Dealt, ...] = (heads.keys, heads.keys)
        if isinstance(source, Latent):
            keys, dealt = (source.payload.unsqueeze(1),), (dealt_heads(q.size(1), 1, communicator.size).keys,)
        order = self._order("queries", grouped.queries, grouped)
        terms = self._terms_of_group(terms, order, heads.queries)
        if grouped.keys is grouped.queries:
            q, *keys_ = _ScatterHeads.apply(self._exchange(order, heads.queries, *dealt), q, *keys)
        else:
            (q,) = _ScatterHeads.apply(self._exchange(order, heads.queries), q)
            order_of_keys = self._order("keys", grouped.keys, grouped)
            keys_ = _ScatterHeads.apply(self._exchange(order_of_keys, *dealt), *keys)
        if isinstance(source, Latent):
            (payload,), rank = keys_, communicator.rank
            source = source.of_heads(payload.squeeze(1), heads.keys.parts[rank], heads.keys.given[rank])
            return _Part(q, source, grouped, terms, order, heads)
        k, v = keys_
        return _Part(q, self._repeated(k, v, heads.keys.given[communicator.rank]), grouped, terms, order, heads)

    def _repeated(self, k: Tensor, v: Tensor, given: tuple[int, ...]) -> SourceOfPart:
        """K/V as the ring is given them: told to be repeated where kernels want that. given: see Dealt."""
        if given == tuple(range(k.size(1))):
            return k, v
        source = RepeatedHeads(k, v, given)
        # Pieces of the heads given are none of those that are sent: one of these may be in two.
        return source if self.ring.pieces == 1 else source.at_once()

    def _exchange(self, order: GroupOrder, *heads: Dealt) -> "_Exchange":
        return _Exchange(self.communicator, order, heads, self.recomputation)

    def _order(self, of: str, layout: Layout, grouped: AttentionPlan) -> GroupOrder:
        """The order of this group's tokens, made once for all layers of a batch."""
        assert isinstance(layout, GroupedLayout)
        return grouped.once(("order of", of, self.group), lambda: group_order(layout, self.group))

    def _back(self, x: Tensor, part: "_Part") -> Tensor:
        """This rank's own tokens of all heads, from all tokens of a part."""
        gathered: tuple[Tensor] = _GatherHeads.apply(self._exchange(part.order, part.heads.queries), x)
        return gathered[0]

    def _rows_of_bias(self, bias: Tensor, order: GroupOrder, heads: Dealt) -> Tensor:
        """The bias of all queries in the group, for this rank's heads: [.., S, T]. Heads alike are sent once a rank."""
        if bias.size(1) == 1:
            size = self.communicator.size
            bias, heads = bias.expand(-1, size, -1, -1), dealt_heads(size, size, size).queries
        rows: tuple[Tensor] = _ScatterHeads.apply(self._exchange(order, heads), bias)
        return rows[0]

    def _gather_rows(self, visible: Tensor, order: GroupOrder, heads: Dealt) -> Tensor:
        """The mask's rows of all queries in the group, for this rank's heads: [..., S, T]."""
        mine = visible.movedim(-2, 0)
        padded = mine.new_zeros((max(order.sizes), *mine.shape[1:]))
        padded[: len(mine)] = mine
        gathered = replay(self.recomputation, padded.shape, lambda: self.communicator.all_gather(padded))
        rows = torch.cat([rows[:size] for rows, size in zip(gathered, order.sizes, strict=True)])
        rows = order.sort(rows).movedim(0, -2)
        if rows.dim() == 4 and rows.size(1) > 1:
            rows = rows[:, heads.parts[self.communicator.rank]]
        return rows


class _Part(NamedTuple):
    """What a rank attends with: tensors of its heads, and all of its group that goes with them."""

    q: Tensor
    source: SourceOfPart
    plan: AttentionPlan
    terms: Terms
    order: GroupOrder
    heads: "_Heads"


class _Heads(NamedTuple):
    """How the heads of queries, and of keys and values, are dealt to the members of a group."""

    queries: Dealt
    keys: Dealt


@functools.lru_cache(maxsize=256)
def dealt_heads(num_heads: int, num_kv_heads: int, degree: int) -> _Heads:
    """What a HeadLayout says, made once for all layers and batches."""
    layout = HeadLayout(num_heads, num_kv_heads, degree)
    return _Heads(layout.queries, layout.keys)


class _Exchange(NamedTuple):
    """What `scatter_heads` and `gather_heads` take beside tensors, and the checkpoints in which they run."""

    communicator: Communicator
    order: GroupOrder
    heads: tuple[Dealt, ...]
    recomputation: Recomputation | None

    def replay(self, exchange: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What an exchange of these tensors gives, or has given."""
        case = tuple((x.shape, x.dtype) for x in tensors)
        return replay(self.recomputation, case, lambda: exchange(tensors, self.communicator, self.order, self.heads))


class _ScatterHeads(torch.autograd.Function):
    """`scatter_heads`, whose gradient is `gather_heads`."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.replay(scatter_heads, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gather_heads(grads, *ctx.exchange[:3])


class _GatherHeads(torch.autograd.Function):
    """`gather_heads`, whose gradient is `scatter_heads`."""

    @staticmethod
    def forward(ctx: Any, exchange: _Exchange, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.replay(gather_heads, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *scatter_heads(grads, *ctx.exchange[:3])
