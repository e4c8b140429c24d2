"""Who sees whom: which tokens of one rank attend to which of another, as rectangles that kernels know.

Everything that depends on it reads `AttentionPlan.tiles`: attention, what travels, bytes, predictions, drawings and
checks. Integers and slices; no torch.
"""

from mindspeed_cp.plan.attention_plan import AttentionPlan
from mindspeed_cp.plan.bands import CAUSAL, FULL, Band, causal_pairs, pairs_seen
from mindspeed_cp.plan.runs import GroupedLayout, Layout, Part, Run, check_runs, joined, total_tokens
from mindspeed_cp.plan.tiles import Tile, band_area, halves, union, within

__all__ = [
    "CAUSAL",
    "FULL",
    "AttentionPlan",
    "Band",
    "GroupedLayout",
    "Layout",
    "Part",
    "Run",
    "Tile",
    "band_area",
    "causal_pairs",
    "check_runs",
    "halves",
    "joined",
    "pairs_seen",
    "total_tokens",
    "union",
    "within",
]
