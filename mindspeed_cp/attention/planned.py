"""Attention by a plan: the one that a call comes with or, on equal shards, that which follows from its tokens.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import functools
from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.attention.call import ContextParallelAttention
from mindspeed_cp.attention.checks import check_plan
from mindspeed_cp.attention.interface import Attention, GridAttention, Source, Told, Wanted
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import Terms, default_scale
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import KERNELS, KernelRegistry
from mindspeed_cp.layouts import PROVEN
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Layout, check_runs
from mindspeed_cp.sharding import SequenceLayout


@dataclass(frozen=True)
class PlannedAttention(Attention):
    """Attention by the plan of a call; without one, of a document that is spread over the ranks in equal shards.

    attention: what computes it. layout, causal: where a call has no plan, who holds what, and whether a query sees only
    itself and earlier keys; else it sees all of them, or what `visible` says. A call is to be in order: that is what
    ContextParallelAttention makes sure of.
    """

    attention: GridAttention
    layout: SequenceLayout
    causal: bool

    @property
    def exchanges_heads(self) -> bool:
        """See Attention."""
        return self.attention.exchanges_heads

    def check(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | None = None) -> None:
        """See Attention. The chunks divide the tokens where there is no plan."""
        if plan is not None:
            check_plan(plan, q, k, self.attention.rank, self.layout.size)
            plan.once("checked", lambda: _check_layouts(plan))
        elif q.size(2) % (chunks := self.layout.chunks_per_rank):
            raise ValueError(
                f"{q.size(2)} tokens a rank are not a multiple of the {chunks} chunks it holds; give "
                f"{q.size(2) // chunks * chunks + chunks}, or "
                f"plan=PackedBatch.from_cu_seqlens(...).plan for any number."
            )
        self.attention.check(q, k, v)

    def check_latent(self) -> None:
        """See Attention."""
        self.attention.check_latent()

    def attend(self, wanted: Wanted, q: Tensor, source: Source, told: Told) -> tuple[Tensor, ...]:
        """See Attention."""
        plan = told.plan
        if plan is None:
            plan = plan_of(self.layout.of(q.size(2)), CAUSAL if self.causal else FULL)
        scale = default_scale(q.size(-1)) if told.scale is None else float(told.scale)
        return self.attention.attend(wanted, q, source, plan, Terms.of(told.terms, scale, told.visible))


def _check_layouts(plan: AttentionPlan) -> None:
    """Raise ValueError where a layout of the caller's own has a token twice, or leaves one out."""
    if type(plan.keys) not in PROVEN:
        check_runs(plan.keys)
    if type(plan.queries) not in PROVEN:
        check_runs(plan.queries, whole=False)


def local_attention(*, causal: bool, kernels: KernelRegistry = KERNELS) -> ContextParallelAttention:
    """Attention of the tokens that one rank has in hand: a ring of one. kernels: what to choose from."""
    config = ContextParallelConfig(attention_mask_type="causal" if causal else "general")
    layout = SequenceLayout(size=1, kind="contiguous")
    return ContextParallelAttention(PlannedAttention(RingAttention(kernels=kernels), layout, causal), config, layout)


@functools.lru_cache(maxsize=64)
def plan_of(layout: Layout, bands: tuple[Band, ...]) -> AttentionPlan:
    """The plan of documents that are held so, all under the same bands; made once for all layers and batches."""
    return AttentionPlan(layout, layout, bands)
