"""Heads exchanged for tokens among the ranks of a Ulysses group, and back: one all-to-all for several tensors.

Shapes: P ranks of the group, B batch, H heads, h heads of one rank, S tokens of all ranks together, s tokens of this
rank (not always S / P), D head size, W numbers that one token sends to one rank.

Note [One message, one copy]
    A rank sends q, k and v in a single message: for each destination and token, its heads of q, then of k, then of v.
    The send copy regroups the heads, and the receive copy sorts the tokens of all ranks by position; on the way back
    the send copy hands the tokens to their owners, and the receive copy joins the heads. q, k and v are then views of
    the one buffer, and nothing is copied twice. Where the ranks' tokens are in order as they come, as with contiguous
    shards, nothing is sorted: what is received is the sequence, and an output is sent from where it is.

    Received from 2 ranks, and sorted:   0 3 | 1 2   ->   0 1 2 3
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_cp.attention.group_order import GroupOrder
from mindspeed_cp.attention.in_place import gather_in_place, is_worth_it, scatter_in_place, split_heads
from mindspeed_cp.attention.profiles import in_profiles
from mindspeed_cp.comm import Communicator, Sizes
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.heads import Dealt
from mindspeed_cp.plan import Part

_THERE, _BACK = "Ulysses: exchange heads for tokens", "Ulysses: exchange tokens for heads"
"""How all-to-alls are called in profiles."""


def scatter_heads(
    shards: Sequence[Tensor], communicator: Communicator, order: GroupOrder, heads: Sequence[Dealt]
) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, for this rank's part of the heads, from its own tokens of all heads.

    shards: tensors [B, H, s, D] of one dtype, whose H and D may differ. heads: how those of each are dealt. Returns
    [B, h, S, D] for each, views of one buffer. One all-to-all for all of them, see Note [One message, one copy].
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
    return tuple(x.permute(1, 2, 0, 3) for x in split_heads(order.sort(received), sent[rank]))


def gather_heads(
    parts: Sequence[Tensor], communicator: Communicator, order: GroupOrder, heads: Sequence[Dealt]
) -> tuple[Tensor, ...]:
    """This rank's own tokens of all heads, from all tokens of the group for its part of the heads.

    parts: tensors [B, h, S, D] of one dtype. Returns [B, H, s, D] for each, in memory [s, B, H, D] as Megatron wants
    them; the sum of a head that several members have. The inverse of `scatter_heads`, likewise with one all-to-all.
    """
    size, tokens = communicator.size, order.sizes[communicator.rank]
    if (chunks := _in_place(order, heads, [x.shape for x in parts], parts[0].dtype)) is not None:
        with in_profiles(_BACK):
            return gather_in_place(parts, communicator, chunks)
    sequences = [x.permute(2, 0, 1, 3) for x in parts]  # [S, B, h, D]
    send = _by_member(sequences, order)
    if all(dealt.is_even for dealt in heads):
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
