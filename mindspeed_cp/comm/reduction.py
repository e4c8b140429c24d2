"""Sums over the ranks of a group, from the two operations that every Communicator has.

Note [Reduction]
    A reduce-scatter is an all-to-all whose received parts are added up, and an all-reduce is that and an all-gather.
    No byte more is sent than by a ring, (P-1)/P of the tensor each; but the parts are added by us: in the order of the
    ranks, so that two runs and all backends give the same bits, and in fp32, so that the error of a sum of bf16 does
    not grow with the number of ranks. All ranks get an element from the one that has added it: their bits are equal.
    (gloo's own reduce-scatter is an all-reduce inside, and sends twice as much.)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mindspeed_cp.comm.communicator import Communicator


def reduce_scatter(communicator: Communicator, parts: Tensor) -> Tensor:
    """The sum over all ranks of their `parts[r]`, on rank r; see Note [Reduction].

    parts: [size, ...], contiguous. Returns [...] in the same dtype, rounded once.
    """
    if communicator.size == 1:
        return parts[0]
    return _sum(communicator.all_to_all(parts))


def all_reduce(communicator: Communicator, x: Tensor) -> Tensor:
    """The sum of every rank's `x`, on all of them with the same bits; see Note [Reduction]. `x` is left as it is."""
    return _all_reduce(communicator, x, _sum)


def all_reduce_largest(communicator: Communicator, x: Tensor) -> Tensor:
    """The largest of every rank's `x`, element by element, as `all_reduce` has their sum; NaN where one is NaN."""
    return _all_reduce(communicator, x, _largest)


def _all_reduce(communicator: Communicator, x: Tensor, reduced: Callable[[Tensor], Tensor]) -> Tensor:
    size, count = communicator.size, x.numel()
    if size == 1:
        return x
    if size == 2:
        # Each sends the whole to the other: as many bytes, in one message instead of two.
        return reduced(communicator.all_gather(x.contiguous()))
    padded = x.new_zeros(size, -(-count // size))
    padded.view(-1)[:count] = x.reshape(-1)
    own = reduced(communicator.all_to_all(padded))
    return communicator.all_gather(own).view(-1)[:count].view(x.shape)


def all_reduce_numbers(count: int, size: int) -> int:
    """How many numbers each of `size` ranks sends in an `all_reduce` of so many."""
    return count if size == 2 else 2 * (size - 1) * -(-count // size)


def _sum(rows: Tensor) -> Tensor:
    """Over the first dim, in its order."""
    return rows.sum(dim=0, dtype=accumulation_dtype(rows.dtype)).to(rows.dtype)


def _largest(rows: Tensor) -> Tensor:
    """Over the first dim."""
    return rows.amax(dim=0)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tensors of `dtype` are added up."""
    return torch.promote_types(dtype, torch.float32)
