"""Partial attention states (out, lse), and how they become one: on a rank, and over the ranks that hold the keys.

Note [States]
    Attention of a query over some keys is a pair: the output, and the log-sum-exp of its scores. Over disjoint keys

        m = max_i lse_i;  w_i = exp(lse_i - m);  out = sum_i w_i out_i / sum_i w_i;  lse = m + log sum_i w_i

    is attention over all of them, in any order and grouping; (anything, -inf) is a query that has seen no key, and
    changes nothing. What kernels leave for such a query is told apart by its weight: where that is 0 the output is
    not read, since 0 * NaN is NaN; and a log-sum-exp of NaN or +inf, which some of them give there, counts as -inf.
    Where nothing has been seen at all, out = 0 and lse = -inf.

    Over ranks (`all_reduce_state`) that is an all-reduce. Tree attention has it as two, the maximum, and numerator and
    denominator in one message ("all_reduce"). With an all-to-all a rank is given all parts of its share of the rows,
    merges them as above, and an all-gather hands out the results ("a2a"): a number less for each row, and half the
    messages. Every rank has the same bits either way.

Shapes: out [..., V], lse [...]: by head and row in any order, [B, N, S, V] and [B, N, S] in the rest of this package.

Sources: FlashAttention arXiv:2205.14135; FlashInfer, Recursive Attention (its tutorial); tree attention
arXiv:2408.04093; Helix arXiv:2507.07120 (the all-to-all).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mindspeed_cp.comm import Communicator, Sizes
from mindspeed_cp.comm.reduction import accumulation_dtype, all_reduce, all_reduce_largest, reduce_scatter

LseBase = Literal["e", "2"]
AllReduceBackend = Literal["a2a", "all_reduce"]
ReduceScatterBackend = Literal["a2a", "ag_rs"]

_POWERS = {"e": (torch.exp, torch.log), "2": (torch.exp2, torch.log2)}


class State(NamedTuple):
    """Attention over some keys. out: [..., V]. lse: [...], fp32 (fp64 for fp64), -inf where no key is seen."""

    out: Tensor
    lse: Tensor


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: LseBase = "e") -> State:
    """Attention over the keys of both; see `merge_states`."""
    return merge_states((out_a, out_b), (lse_a, lse_b), lse_base=lse_base)


def merge_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    dim: int = 0,
    lse_base: LseBase = "e",
) -> State:
    """Attention over the keys of all of them, exact up to rounding; differentiable in both. Note [States].

    outs: [..., V], stacked along `dim` of lses, or one after another in a sequence; lses: likewise [...]. lse_base: of
    their logarithm, and of the result's: FlashAttention's is "e", FlashInfer's and some latent attention kernels' "2".

    Returns out and lse in fp32 (fp64 for fp64): round once, when all has been merged. Raises ValueError where shapes
    do not fit or the base is none.
    """
    _check_choice("lse_base", lse_base, LseBase)
    if not (isinstance(outs, Tensor) and isinstance(lses, Tensor)):
        outs, lses, dim = _stacked("outs", outs), _stacked("lses", lses), 0
    _check_state(outs, lses)
    power, logarithm = _POWERS[lse_base]
    dtype = accumulation_dtype(outs.dtype)
    dim = _dim_of(lses, dim)
    outs, lses = outs.to(dtype), _seen(lses.to(dtype))
    # A constant: the result does not depend on it. The lowest number does for -inf, as in kernels/merge.py.
    anchor = lses.detach().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(dtype).min)
    weights = power(lses - anchor)
    total = weights.sum(dim=dim)
    weighted = weights.unsqueeze(-1) * outs.masked_fill(weights.unsqueeze(-1) == 0.0, 0.0)
    # Where a key is seen the largest weight is 1. Elsewhere the logarithm has no gradient, rather than 0 / 0.
    seen = total > 0.0
    out = weighted.sum(dim=dim) / total.clamp_min(1.0).unsqueeze(-1)
    lse = anchor.squeeze(dim) + logarithm(total.where(seen, 1.0))
    return State(out, lse.where(seen, -torch.inf))


@torch.no_grad()
def all_reduce_state(
    out: Tensor,
    lse: Tensor,
    communicator: Communicator | None,
    *,
    backend: AllReduceBackend = "a2a",
    lse_base: LseBase = "e",
) -> State:
    """Attention over the keys of all ranks, on every rank, with the same bits; Note [States].

    out, lse: of the same queries on all ranks, over each rank's keys. communicator: None for a rank that is alone.
    backend: how it is sent. lse_base: as in `merge_states`.

    Returns fp32 (fp64 for fp64). No gradients. Raises ValueError where shapes do not fit or there is no such backend.
    """
    _check_choice("backend", backend, AllReduceBackend)
    _check_choice("lse_base", lse_base, LseBase)
    _check_state(out, lse)
    if communicator is None or communicator.size == 1:
        return merge_states((out,), (lse,), lse_base=lse_base)
    if lse_base == "2":
        return _in_base_2(all_reduce_state(*_from_base_2(out, lse), communicator, backend=backend))
    if backend == "all_reduce":
        return _of_sums(_clean(out, lse), communicator)
    rows = _message(out, lse).flatten(0, -2)
    size, count = communicator.size, rows.size(0)
    if size == 2:  # As many numbers, in one message.
        return _merged_parts(communicator.all_gather(rows), out.shape)
    share = -(-count // size)
    padded = rows.new_zeros(size * share, rows.size(1))
    padded[:count] = rows
    own = _merged_parts(communicator.all_to_all(padded.view(size, share, -1)), (share, out.size(-1)))
    merged = communicator.all_gather(_message(*own)).flatten(0, 1)[:count]
    return _split(merged.view(*lse.shape, -1))


@torch.no_grad()
def reduce_scatter_state(
    out: Tensor,
    lse: Tensor,
    communicator: Communicator | None,
    *,
    dim: int,
    sizes: Sequence[int] | None = None,
    backend: ReduceScatterBackend = "a2a",
    lse_base: LseBase = "e",
) -> State:
    """Attention over the keys of all ranks, for this rank's share of the queries along a dim; Note [States].

    out, lse: of the same queries on all ranks, over each rank's keys. communicator: None for a rank that is alone.
    dim: of `lse` along which the queries are shared out, 1 for heads of [B, N, S]. sizes: how many of it each rank
    gets; equal shares by default. backend: the states in one all-to-all, or an all-gather of lse and a reduce-scatter
    of weighted outputs, which sends more and is what a backend without an all-to-all can do; equal shares only.
    lse_base: as in `merge_states`.

    Returns fp32 (fp64 for fp64). No gradients. Raises ValueError where shapes or shares do not fit or there is no such
    backend.
    """
    _check_choice("backend", backend, ReduceScatterBackend)
    _check_choice("lse_base", lse_base, LseBase)
    _check_state(out, lse)
    dim = _dim_of(lse, dim)
    if communicator is None or communicator.size == 1:
        return merge_states((out,), (lse,), lse_base=lse_base)
    if lse_base == "2":
        natural = _from_base_2(out, lse)
        return _in_base_2(reduce_scatter_state(*natural, communicator, dim=dim, sizes=sizes, backend=backend))
    size, whole = communicator.size, lse.size(dim)
    if sizes is None:
        if whole % size:
            raise ValueError(f"dim {dim} of {tuple(lse.shape)} has no {size} equal shares; give sizes, one a rank.")
        sizes = [whole // size] * size
    if len(sizes) != size or sum(sizes) != whole or min(sizes) < 0:
        raise ValueError(f"sizes {list(sizes)} do not share out {whole} of dim {dim} among {size} ranks; give {size}.")
    if backend == "ag_rs":
        return _weighted_sum(out, lse, communicator, dim, sizes)
    message = _message(out, lse).movedim(dim, 0).contiguous()
    own = sizes[communicator.rank]
    received = communicator.all_to_all(message, Sizes(sizes, [own] * size))
    parts = received.view(size, own, *message.shape[1:])
    return _split_merged(parts, dim)


def _weighted_sum(out: Tensor, lse: Tensor, communicator: Communicator, dim: int, sizes: Sequence[int]) -> State:
    if len(set(sizes)) > 1:
        raise ValueError(f"backend='ag_rs' takes equal shares, and sizes are {list(sizes)}; use backend='a2a'.")
    out, lse = _clean(out, lse)
    lses = communicator.all_gather(lse.contiguous())
    anchor = lses.amax(dim=0).clamp_min_(torch.finfo(lse.dtype).min)
    total = (lses - anchor).exp_().sum(dim=0)
    share = (lse - anchor).exp_().div_(total.clamp_min(1.0))
    parts = (out * share.unsqueeze(-1)).movedim(dim, 0).unflatten(0, (communicator.size, -1)).contiguous()
    place = sum(sizes[: communicator.rank]), sizes[communicator.rank]
    merged = anchor.add_(total.log_()).narrow(dim, *place)
    return State(reduce_scatter(communicator, parts).movedim(0, dim), merged)


def _of_sums(state: State, communicator: Communicator) -> State:
    """The maximum, then numerator and denominator in one message."""
    out, lse = state
    anchor = all_reduce_largest(communicator, lse).clamp_min(torch.finfo(lse.dtype).min)
    weight = (lse - anchor).exp_().unsqueeze(-1)
    summed = all_reduce(communicator, torch.cat([out * weight, weight], dim=-1))
    total = summed[..., -1]
    return State(summed[..., :-1] / total.clamp_min(1.0).unsqueeze(-1), anchor + total.log())


def _clean(out: Tensor, lse: Tensor) -> State:
    """In the dtype of sums, with out = 0 and lse = -inf where nothing has been seen."""
    dtype = accumulation_dtype(out.dtype)
    lse = _seen(lse.to(dtype))
    return State(out.to(dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0), lse)


def _from_base_2(out: Tensor, lse: Tensor) -> State:
    return State(out, lse.to(accumulation_dtype(out.dtype)) * math.log(2.0))


def _in_base_2(state: State) -> State:
    return State(state.out, state.lse / math.log(2.0))


def _seen(lse: Tensor) -> Tensor:
    return lse.where(lse < torch.inf, -torch.inf)  # NaN is below nothing.


def _message(out: Tensor, lse: Tensor) -> Tensor:
    """[..., V + 1], in the dtype of sums: rows with their log-sum-exp behind them."""
    out, lse = _clean(out, lse)
    return torch.cat([out, lse.unsqueeze(-1)], dim=-1)


def _split(message: Tensor) -> State:
    return State(message[..., :-1], message[..., -1])


def _merged_parts(parts: Tensor, shape: Sequence[int]) -> State:
    """Of messages [ranks, rows, V + 1], in a shape of the output."""
    out, lse = merge_states(*_split(parts))
    return State(out.view(*shape), lse.view(*shape[:-1]))


def _split_merged(parts: Tensor, dim: int) -> State:
    out, lse = merge_states(*_split(parts))
    return State(out.movedim(0, dim), lse.movedim(0, dim))


def _check_state(out: Tensor, lse: Tensor) -> None:
    if out.shape[:-1] != lse.shape:
        raise ValueError(
            f"out {tuple(out.shape)} and lse {tuple(lse.shape)} are no state; lse is as out without its last dim."
        )


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Of a sequence. Raises ValueError for what is none, and for parts of several shapes."""
    shapes = [] if isinstance(parts, Tensor) else sorted({tuple(part.shape) for part in parts})
    if len(shapes) != 1:
        found = "a tensor" if isinstance(parts, Tensor) else f"of shapes {shapes}"
        raise ValueError(f"{name} are {found}: give outs and lses both stacked, or both as sequences of one shape.")
    return torch.stack(tuple(parts))


def _dim_of(lse: Tensor, dim: int) -> int:
    """A dim of lse, from 0 on."""
    if not -lse.dim() <= dim < lse.dim():
        raise ValueError(f"lse {tuple(lse.shape)} has no dim {dim}; give one from {-lse.dim()} to {lse.dim() - 1}.")
    return dim % lse.dim()


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is none; give {' or '.join(map(repr, get_args(choices)))}.")
