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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.exchange import in_profiles
from mindspeed_cp.attention.in_place import gather_in_place, is_worth_it, scatter_in_place, split_heads
from mindspeed_cp.attention.interface import OUTPUT, WITH_LSE, GridAttention, Source, Wanted
from mindspeed_cp.attention.latent import Latent
from mindspeed_cp.attention.recomputation import Recomputation, replay
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.comm import Communicator, Sizes
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.heads import Dealt, HeadLayout
from mindspeed_cp.plan import AttentionPlan, GroupedLayout, Layout, Part


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
        heads = HeadLayout(q.size(1), k.size(1), self.communicator.size)
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

    def _terms_of_group(self, terms: Terms, order: "GroupOrder", heads: Dealt) -> Terms:
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
        heads = head_layout(q.size(1), k.size(1), communicator.size)
        keys: tuple[Tensor, ...] = (k, v)
        dealt: tuple[Dealt, ...] = (heads.keys, heads.keys)
        if isinstance(source, Latent):
            keys, dealt = (source.payload.unsqueeze(1),), (head_layout(q.size(1), 1, communicator.size).keys,)
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
        else:
            k, v = keys_
            source = k, v
        return _Part(q, source, grouped, terms, order, heads)

    def _exchange(self, order: "GroupOrder", *heads: Dealt) -> "_Exchange":
        return _Exchange(self.communicator, order, heads, self.recomputation)

    def _order(self, of: str, layout: Layout, grouped: AttentionPlan) -> "GroupOrder":
        """The order of this group's tokens, made once for all layers of a batch."""
        assert isinstance(layout, GroupedLayout)
        return grouped.once(("order of", of, self.group), lambda: group_order(layout, self.group))

    def _back(self, x: Tensor, part: "_Part") -> Tensor:
        """This rank's own tokens of all heads, from all tokens of a part."""
        gathered: tuple[Tensor] = _GatherHeads.apply(self._exchange(part.order, part.heads.queries), x)
        return gathered[0]

    def _rows_of_bias(self, bias: Tensor, order: "GroupOrder", heads: Dealt) -> Tensor:
        """The bias of all queries in the group, for this rank's heads: [.., S, T]. Heads alike are sent once a rank."""
        if bias.size(1) == 1:
            size = self.communicator.size
            bias, heads = bias.expand(-1, size, -1, -1), head_layout(size, size, size).queries
        rows: tuple[Tensor] = _ScatterHeads.apply(self._exchange(order, heads), bias)
        return rows[0]

    def _gather_rows(self, visible: Tensor, order: "GroupOrder", heads: Dealt) -> Tensor:
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
    source: Source
    plan: AttentionPlan
    terms: Terms
    order: "GroupOrder"
    heads: "_Heads"


class _Heads(NamedTuple):
    """How the heads of queries, and of keys and values, are dealt to the members of a group."""

    queries: Dealt
    keys: Dealt


@functools.lru_cache(maxsize=256)
def head_layout(num_heads: int, num_kv_heads: int, degree: int) -> _Heads:
    """Made once for all layers and batches."""
    layout = HeadLayout(num_heads, num_kv_heads, degree)
    return _Heads(layout.queries, layout.keys)


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


def group_order(layout: GroupedLayout, group: int) -> GroupOrder:
    """The order of a group's tokens."""
    sizes = tuple(layout.layout.num_tokens(member) for member in layout.groups[group])
    return GroupOrder(sizes, tuple(layout.parts(group).values()))


_THERE, _BACK = "Ulysses: exchange heads for tokens", "Ulysses: exchange tokens for heads"
"""How all-to-alls are called in profiles."""


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


def scatter_heads(
    shards: Sequence[Tensor], communicator: Communicator, order: GroupOrder, heads: Sequence[Dealt]
) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, for this rank's part of the heads, from its own tokens of all heads.

    shards: tensors [B, H, s, D] of one dtype, whose H and D may differ. heads: how those of each are dealt. Returns
    [B, h, S, D] for each, h heads as they are given to kernels; views of one buffer but for heads that are given more
    than once. One all-to-all for all of them, see Note [One message, one copy].
    """
    size, rank = communicator.size, communicator.rank
    batch, _, tokens, _ = shards[0].shape
    shares = [torch.Size((batch, x.size(1) // size, 0, x.size(3))) for x in shards]
    if (chunks := _in_place(order, heads, shares, shards[0].dtype)) is not None:
        with in_profiles(_THERE):
            return scatter_in_place(shards, communicator, chunks)
    if all(dealt.is_even for dealt in heads):
        parts = [x.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4) for x in shards]  # [P, s, B, H/P, D]
        send = shards[0].new_empty((size, tokens, batch, _width(parts)))
        for part, place in zip(parts, split_heads(send, parts), strict=True):
            place.copy_(part)
        with in_profiles(_THERE):
            received = communicator.all_to_all(send.flatten(0, 1), Sizes([tokens] * size, order.sizes))  # [S, B, W]
        return tuple(x.permute(1, 2, 0, 3) for x in split_heads(order.sort(received), parts))
    sent = [_of_member(shards, heads, member) for member in range(size)]
    widths = [_width(each) for each in sent]
    send = shards[0].new_empty(tokens * batch * sum(widths))
    for message, each in zip(send.split([tokens * batch * width for width in widths]), sent, strict=True):
        for part, place in zip(each, split_heads(message.view(tokens, batch, _width(each)), each), strict=True):
            place.copy_(part)
    sizes = Sizes([tokens * batch * width for width in widths], [count * batch * widths[rank] for count in order.sizes])
    with in_profiles(_THERE):
        received = communicator.all_to_all(send, sizes).view(sum(order.sizes), batch, widths[rank])
    mine = (x.permute(1, 2, 0, 3) for x in split_heads(order.sort(received), sent[rank]))
    return tuple(_repeated(x, dealt.given[rank]) for x, dealt in zip(mine, heads, strict=True))


def gather_heads(
    parts: Sequence[Tensor], communicator: Communicator, order: GroupOrder, heads: Sequence[Dealt]
) -> tuple[Tensor, ...]:
    """This rank's own tokens of all heads, from all tokens of the group for its part of the heads.

    parts: tensors [B, h, S, D] of one dtype. Returns [B, H, s, D] for each, in memory [s, B, H, D] as Megatron wants
    them; the sum of a head that several members have, or one has repeated. The inverse of `scatter_heads`, likewise
    with one all-to-all.
    """
    size, rank, tokens = communicator.size, communicator.rank, order.sizes[communicator.rank]
    if (chunks := _in_place(order, heads, [x.shape for x in parts], parts[0].dtype)) is not None:
        with in_profiles(_BACK):
            return gather_in_place(parts, communicator, chunks)
    is_even = all(dealt.is_even for dealt in heads)
    if not is_even:
        parts = [_added(x, dealt.given[rank]) for x, dealt in zip(parts, heads, strict=True)]
    sequences = [x.permute(2, 0, 1, 3) for x in parts]  # [S, B, h, D]
    send = _by_member(sequences, order)
    if is_even:
        with in_profiles(_BACK):
            received = communicator.all_to_all(send, Sizes(order.sizes, [tokens] * size)).unflatten(0, (size, tokens))
        del send  # While the heads are joined a pass holds the most.
        shards = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in split_heads(received, sequences))
        return tuple(x.permute(1, 2, 0, 3) for x in shards)
    batch = send.size(1)
    sums = [_HeadSum(x, dealt, tokens) for x, dealt in zip(sequences, heads, strict=True)]
    widths = [sum(each.width(member) for each in sums) for member in range(size)]
    sizes = Sizes([count * batch * send.size(2) for count in order.sizes], [tokens * batch * w for w in widths])
    with in_profiles(_BACK):
        messages = communicator.all_to_all(send.flatten(), sizes).split(list(sizes.received))
    for member, message in enumerate(messages):
        shares = message.view(tokens, batch, widths[member]).split([each.width(member) for each in sums], dim=-1)
        for each, share in zip(sums, shares, strict=True):
            each.add(member, share)
    return tuple(each.result() for each in sums)


def _in_place(
    order: GroupOrder, heads: Sequence[Dealt], shapes: Sequence[torch.Size], dtype: torch.dtype
) -> Sequence[Part] | None:
    """The chunks that are sent by themselves; None where all samples and heads are not alike, or they are small."""
    if len(order.parts) != 1 or not all(dealt.is_even for dealt in heads):
        return None
    return order.parts[0] if is_worth_it(order.parts[0], shapes, dtype) else None


def _by_member(sequences: Sequence[Tensor], order: GroupOrder) -> Tensor:
    """The tokens [S, B, h, D] in order as their members have them, [S, B, W]; where they lie if they can be."""
    if order.is_sorted and len(sequences) == 1 and sequences[0].is_contiguous():
        return sequences[0].flatten(2)
    send = sequences[0].new_empty((*sequences[0].shape[:2], _width(sequences)))
    for sequence, place in zip(sequences, split_heads(send, sequences), strict=True):
        order.unsort_into(place, sequence)
    return send


def _of_member(shards: Sequence[Tensor], heads: Sequence[Dealt], member: int) -> list[Tensor]:
    """What a member is sent of each tensor [B, H, s, D]: [s, B, h, D]."""
    return [x[:, dealt.parts[member]].permute(2, 0, 1, 3) for x, dealt in zip(shards, heads, strict=True)]


def _repeated(x: Tensor, given: tuple[int, ...]) -> Tensor:
    """The heads of x [B, h, S, D] as they are given to kernels."""
    if given == tuple(range(x.size(1))):
        return x
    return x.index_select(1, torch.tensor(given, device=x.device))


def _added(x: Tensor, given: tuple[int, ...]) -> Tensor:
    """The inverse of `_repeated` for gradients: those of one head are added in fp32, and rounded once."""
    count = given[-1] + 1
    if count == len(given):
        return x
    total = x.new_zeros((x.size(0), count, *x.shape[2:]), dtype=accumulation_dtype(x.dtype))
    return total.index_add_(1, torch.tensor(given, device=x.device), x.to(total.dtype)).to(x.dtype)


class _HeadSum:
    """Heads [s, B, H, D] of this rank's tokens, of which members have parts; added where several have one."""

    def __init__(self, like: Tensor, heads: Dealt, tokens: int) -> None:
        self._like, self._parts = like, heads.parts
        count = max(part.stop for part in heads.parts)
        overlap = sum(part.stop - part.start for part in heads.parts) > count
        dtype = accumulation_dtype(like.dtype) if overlap else like.dtype
        self._total = like.new_zeros((tokens, like.size(1), count, like.size(3)), dtype=dtype)

    def width(self, member: int) -> int:
        """Numbers of a token that a member sends."""
        part = self._parts[member]
        return int((part.stop - part.start) * self._like.size(3))

    def add(self, member: int, share: Tensor) -> None:
        """Add what a member has sent, [s, B, width]."""
        self._total[:, :, self._parts[member]] += share.unflatten(-1, (-1, self._like.size(3)))

    def result(self) -> Tensor:
        """[B, H, s, D], rounded once."""
        return self._total.to(self._like.dtype).permute(1, 2, 0, 3)


def _width(tensors: Sequence[Tensor]) -> int:
    """Numbers that one token takes in a message of these tensors [..., heads, head size]."""
    return sum(x.size(-2) * x.size(-1) for x in tensors)
