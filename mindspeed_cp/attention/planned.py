"""Attention on equal shards: the plan of a call follows from the number of its tokens.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import functools
from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.attention.call import default_scale, refuse_mask_of_causal
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms
from mindspeed_cp.attention.ulysses import UlyssesAttention
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan
from mindspeed_cp.sharding import SequenceLayout


@dataclass(frozen=True)
class PlannedAttention:
    """Attention of one document that is spread over the ranks in equal shards.

    attention: what computes it. layout: who holds what. causal: whether a query sees only itself and earlier keys; else
    it sees all of them, or what `visible` says.
    """

    attention: RingAttention | UlyssesAttention
    layout: SequenceLayout
    causal: bool

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """See Attention. The chunks divide the tokens."""
        if q.size(2) % self.layout.chunks_per_rank:
            raise ValueError(
                f"{q.size(2)} tokens a rank are not a multiple of the {self.layout.chunks_per_rank} chunks it holds."
            )
        if isinstance(self.attention, UlyssesAttention):
            self.attention.check(q, k, v)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """See Attention. Raises ValueError where a causal attention is given a mask."""
        return self.attention(q, k, v, *self._told(q, scale, visible))

    def with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Attention. Raises ValueError where a causal attention is given a mask."""
        return self.attention.with_lse(q, k, v, *self._told(q, scale, visible))

    def _told(self, q: Tensor, scale: float | None, visible: Tensor | None) -> tuple[AttentionPlan, Terms]:
        refuse_mask_of_causal(visible, self.causal)
        plan = plan_of(self.layout, q.size(2), self.causal)
        return plan, Terms(default_scale(q) if scale is None else scale, visible)


def local_attention(*, causal: bool, kernels: KernelRegistry = KERNELS) -> PlannedAttention:
    """Attention of the tokens that one rank has in hand: a ring of one. kernels: what to choose from."""
    return PlannedAttention(RingAttention(kernels=kernels), SequenceLayout(size=1, kind="contiguous"), causal)


@functools.lru_cache(maxsize=256)
def plan_of(layout: SequenceLayout, num_tokens: int, causal: bool) -> AttentionPlan:
    """The plan of equal shards of so many tokens each, made once for all layers and batches."""
    shards = layout.of(num_tokens)
    return AttentionPlan(shards, shards, CAUSAL if causal else FULL)
