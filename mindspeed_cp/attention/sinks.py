"""Attention sinks: a score for each head that takes part in every row's softmax, and has no value.

Note [Sinks]
    With a score s beside the keys, a row's log-sum-exp becomes lse' = log(exp(lse) + exp(s)), and its output
    out' = out * exp(lse - lse'). So it is enough to do that once, on the output that has been merged over all keys. The
    gradients of q, k and v are those of kernels that are given out' and lse': exp(score - lse') is the probability
    beside the sink, and dout . out' the mean over all keys and the sink. That of s is the sink's own share of it,

        ds = - sum over rows of exp(s - lse') * (dout . out').

    s = 0, fixed, is off-by-one softmax.

Shapes: B batch, N query heads, S queries, V value head size.

Sources: StreamingLLM arXiv:2309.17453; gpt-oss; Miller, Attention is off by one (2023).
"""

import torch
from torch import Tensor

from mindspeed_cp.kernels import TileOutput


def with_sinks(merged: TileOutput, sinks: Tensor | float | None) -> TileOutput:
    """Output and log-sum-exp over all keys, with sinks [N] or of one score beside them; see Note [Sinks]."""
    if sinks is None:
        return merged
    out, lse, state = merged
    both = torch.logaddexp(lse, _for_rows(sinks, lse))
    share = torch.exp(lse - both).masked_fill(lse == -torch.inf, 0.0)
    return TileOutput(out * share.unsqueeze(-1), both, state)


def sinks_gradient(sinks: Tensor | float | None, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor | None:
    """The part of these rows [B, N, S] of the gradient of sinks, [N]; None where they are no tensor.

    out, lse: with sinks; see Note [Sinks].
    """
    if not isinstance(sinks, Tensor):
        return None
    shares = torch.exp(_for_rows(sinks, lse) - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(shares * (dout.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)).sum(dim=(0, 2))


def _for_rows(sinks: Tensor | float, lse: Tensor) -> Tensor:
    """[N] or a number as [N or 1, 1], in the dtype of lse."""
    sinks = sinks if isinstance(sinks, Tensor) else lse.new_tensor([sinks])
    return sinks.to(lse.dtype)[:, None]
