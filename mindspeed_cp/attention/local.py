"""Attention of the tokens that one rank has in hand: a ring of one.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T key tokens, D key head size, V value head size.
"""

from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.attention.call import default_scale
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.layouts import EqualChunks
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan


@dataclass(frozen=True)
class LocalAttention:
    """Attention within one rank.

    causal: whether a query sees only itself and earlier keys; else it sees all of them, or what `visible` says.
    kernels: what to choose from.
    """

    causal: bool
    kernels: KernelRegistry = KERNELS

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """See Attention."""
        queries, keys = (EqualChunks(1, x.size(2), "contiguous") for x in (q, k))
        plan = AttentionPlan(queries, keys, CAUSAL if self.causal else FULL)
        terms = Terms(default_scale(q) if scale is None else scale, visible)
        return RingAttention(kernels=self.kernels)(q, k, v, plan, terms)
