"""Large exchanges of heads and tokens, whose messages are received where they belong, and sent from where they lie.

Note [In place]
    The tokens of a group's members are chunks of the sequence, a few of each (two under zigzag). Received chunk by
    chunk each finds its place in the sequence, and nothing is sorted; handed back chunk by chunk, an output is sent
    from where the kernel has put it, and nothing is regrouped. What is left is one copy that regroups the heads of q, k
    and v for their destinations, and one that joins the heads of what has come back. A rank's own share is copied once,
    from where it is to where it belongs. That is worth it where a chunk is large: it is a message of its own.

Shapes: P ranks, B batch, H heads, h = H / P heads of one rank, S tokens of all ranks, s tokens of this rank, D head
size, W numbers that one token sends to one rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_cp.comm import LARGE, Communicator
from mindspeed_cp.plan import Part


def is_worth_it(parts: Sequence[Part], shapes: Sequence[torch.Size], dtype: torch.dtype) -> bool:
    """Whether the chunks of a group are large: the same on all of its ranks.

    parts: all chunks of the sequence, in order. shapes: [B, h, .., D] of a rank's share of the heads of each tensor.
    """
    tokens = sum(part.stop - part.start for part in parts)
    smallest = min(shape[0] * shape[1] * shape[3] for shape in shapes)
    return bool(parts) and tokens * smallest * dtype.itemsize >= LARGE * len(parts)


def scatter_in_place(shards: Sequence[Tensor], communicator: Communicator, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """All tokens of the group, in order, for this rank's share of the heads; see `scatter_heads`.

    shards: [B, H, s, D]. Returns views [B, h, S, D] of one buffer.
    """
    size, rank = communicator.size, communicator.rank
    batch, _, tokens, _ = shards[0].shape
    split = [x.unflatten(1, (size, -1)).permute(1, 3, 0, 2, 4) for x in shards]  # [P, s, B, h, D]
    width = sum(x.size(3) * x.size(4) for x in split)
    received = shards[0].new_empty((sum(part.stop - part.start for part in parts), batch, width))
    leaving = shards[0].new_empty((size - 1, tokens, batch, width))
    for x, place in zip(split, split_heads(leaving, split), strict=True):
        place[:rank].copy_(x[:rank])
        place[rank:].copy_(x[rank + 1 :])
    sends: list[list[Tensor]] = [[] for _ in range(size)]
    receives: list[list[Tensor]] = [[] for _ in range(size)]
    begin = 0
    for part in parts:
        arriving = received[begin : begin + part.stop - part.start]
        begin += part.stop - part.start
        if part.member != rank:
            receives[part.member].append(arriving)
            continue
        for x, place in zip(split, split_heads(arriving, split), strict=True):
            place.copy_(x[rank, part.start : part.stop])
        for other in range(size):
            if other != rank:
                sends[other].append(leaving[other - (other > rank), part.start : part.stop])
    communicator.all_to_all_of_parts(sends, receives)
    return tuple(x.permute(1, 2, 0, 3) for x in split_heads(received, split))


def gather_in_place(shares: Sequence[Tensor], communicator: Communicator, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """This rank's own tokens of all heads; see `gather_heads`.

    shares: [B, h, S, D]. Returns [B, H, s, D] of each, in memory [s, B, H, D].
    """
    size, rank = communicator.size, communicator.rank
    sequences = [x.permute(2, 0, 1, 3).contiguous() for x in shares]  # [S, B, h, D], as kernels have it in memory.
    tokens = sum(part.stop - part.start for part in parts if part.member == rank)
    arriving = [x.new_empty((size - 1, tokens, *x.shape[1:])) for x in sequences]
    sends: list[list[Tensor]] = [[] for _ in range(size)]
    receives: list[list[Tensor]] = [[] for _ in range(size)]
    own: list[tuple[Part, int]] = []
    begin = 0
    for part in parts:
        here = slice(begin, begin + part.stop - part.start)
        if part.member == rank:
            own.append((part, begin))
            for other in range(size):
                if other != rank:
                    receives[other] += [x[other - (other > rank), part.start : part.stop] for x in arriving]
        else:
            sends[part.member] += [x[here] for x in sequences]
        begin = here.stop
    communicator.all_to_all_of_parts(sends, receives)
    del receives, sends
    joined = []
    for x in sequences:
        # One after another: what has come of a tensor is gone when the next is joined.
        whole = x.new_empty((tokens, x.size(1), size, *x.shape[2:]))
        come = arriving.pop(0).permute(1, 2, 0, 3, 4)
        whole[:, :, :rank].copy_(come[:, :, :rank])
        whole[:, :, rank + 1 :].copy_(come[:, :, rank:])
        del come
        for part, begin in own:
            whole[part.start : part.stop, :, rank].copy_(x[begin : begin + part.stop - part.start])
        joined.append(whole.flatten(2, 3).permute(1, 2, 0, 3))
    return tuple(joined)


def split_heads(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of a message [..., W], one for each of `like`, with its heads and head size as the last dims."""
    widths = [x.size(-2) * x.size(-1) for x in like]
    return [each.unflatten(-1, x.shape[-2:]) for each, x in zip(message.split(widths, dim=-1), like, strict=True)]
