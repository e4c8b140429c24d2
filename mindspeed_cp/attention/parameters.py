"""Gradients of learnable terms, summed over the context-parallel ranks for programs that have no reducer to do it.

A head's sink and slope are the same on all ranks, and each finds the part of their gradients that is of its queries.
A bias is not among them: its rows are those of a rank's own queries, and so is all of its gradient.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.attention.terms import AttentionTerms, is_learnt
from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype, all_reduce


def with_summed_gradients(terms: AttentionTerms | None, communicator: Communicator | None) -> AttentionTerms | None:
    """The same terms; the gradients of sinks and slopes that are learnt are the sums over the ranks, rounded once.

    All of them go in one message. communicator: of the context-parallel ranks; None leaves gradients as they are.
    """
    if terms is None or communicator is None:
        return terms
    sinks, slopes = terms.sinks, terms.alibi_slopes
    learnt = [x for x in (sinks, slopes) if isinstance(x, Tensor) and is_learnt(x)]
    if not learnt:
        return terms
    given: Sequence[Tensor] = _SummedGradients.apply(communicator, *learnt)
    summed = {id(x): y for x, y in zip(learnt, given, strict=True)}
    return replace(
        terms,
        sinks=summed.get(id(sinks), sinks),
        alibi_slopes=None if slopes is None else summed.get(id(slopes), slopes),
    )


class _SummedGradients(torch.autograd.Function):
    """Parameters in the dtype of sums, so that no rank's part of a gradient is rounded before it is added."""

    @staticmethod
    def forward(ctx: Any, communicator: Communicator, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.communicator, ctx.dtypes = communicator, [x.dtype for x in parameters]
        return tuple(x.to(accumulation_dtype(x.dtype), copy=True) for x in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = all_reduce(ctx.communicator, torch.cat(grads))
        parts = summed.split([gradient.numel() for gradient in grads])
        return None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))
