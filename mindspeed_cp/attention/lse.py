"""The gradient of the log-sum-exp, by kernels that know only that of the output.

Note [Gradient of lse]
    The gradient of a score is p * (dout . v - dout . out + dlse), and kernels compute the middle term themselves, from
    the out and dout that they are given. With one more column in which v is 0, dout is 1 and out is -dlse, that term
    becomes dout . out - dlse, and nothing else changes but a column of dv that is thrown away.

Shapes: B batch, N query heads, G key/value heads, S queries, T keys, D key head size, V value head size.
"""

import torch.nn.functional as F
from torch import Tensor

ROOM = 8
"""Columns that are added to the values for the gradient of lse: fused kernels read 16 bytes at once."""


def with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, S, D], k [B, G, T, D] and v [B, G, T, V + ROOM]; kernels that want one head size still get one."""
    if q.size(3) == v.size(3):
        q, k = F.pad(q, (0, ROOM)), F.pad(k, (0, ROOM))
    return q, k, F.pad(v, (0, ROOM))


def with_gradient_of_lse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """dout and out with which a kernel gives the gradients for `dlse` too, see Note [Gradient of lse].

    dout, out: [B, N, S, V + ROOM]; dlse: [B, N, S].
    """
    place = out.size(3) - ROOM
    dout, out = dout.clone(), out.clone()
    dout[..., place] = 1.0
    out[..., place] = -dlse
    return dout, out
