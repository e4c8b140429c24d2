"""The oracle: dense attention in plain torch with autograd, which uses nothing of the library.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """Attention's output [B, N, S, V], its log-sum-exp [B, N, S], and the gradients of its inputs."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, visible: Tensor | None = None, scale: float | None = None
) -> Result:
    """Attention in the dtype of its inputs; rows that see nothing give out 0, lse -inf and gradients 0.

    q: [B, N, S, D]; k: [B, G, T, D]; v: [B, G, T, V]; dout: [B, N, S, V]; visible: bool, broadcasts to [B, N, S, T].
    """
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    repeats = q.size(1) // k.size(1)
    keys, values = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ keys.transpose(2, 3) * (1 / math.sqrt(q.size(3)) if scale is None else scale)
    visible = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand_as(scores)
    scores = scores.masked_fill(~visible, -torch.inf)
    dead = ~visible.any(dim=-1, keepdim=True)
    out = scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0) @ values
    return Result(out.detach(), scores.detach().logsumexp(dim=-1), *torch.autograd.grad(out, (q, k, v), dout))


def causal_mask(length: int) -> Tensor:
    """[S, S]: query i sees keys 0 to i."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def assert_equal_to(exact: NamedTuple, actual: NamedTuple) -> None:
    """Each field of `actual`, all fp64, is within 1e-12 of the field of that name in `exact`."""
    for name, value in actual._asdict().items():
        torch.testing.assert_close(
            value, getattr(exact, name), rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_as_accurate_as(dense: NamedTuple, exact: NamedTuple, actual: NamedTuple) -> None:
    """The error of each field of `actual` is at most twice the error of dense attention in the same dtype."""
    for name, value in actual._asdict().items():
        error, allowed = _error(value, getattr(exact, name)), 2 * _error(getattr(dense, name), getattr(exact, name))
        assert error <= allowed, f"{name}: error {error:.2e}, and twice that of dense attention is {allowed:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference; infinite where one is infinite or NaN and the other is not."""
    assert torch.equal(value.isinf(), exact.isinf()), "infinite in other places"
    difference = (value.double() - exact).masked_fill(exact.isinf(), 0.0)
    return difference.norm().nan_to_num(torch.inf).item()
