"""Predictions: what each rank sends and how long a pass takes, read off the programs that the ranks play. No torch."""

from mindspeed_cp.planner.attention import (
    AttentionPass,
    AttentionShape,
    all_to_all,
    causal_zigzag,
    unequal_all_to_all,
)
from mindspeed_cp.planner.clock import (
    Compute,
    Event,
    Post,
    Sent,
    Wait,
    busiest_link_seconds,
    predicted_bytes,
    predicted_seconds,
)
from mindspeed_cp.planner.latent import LatentPass, LatentShape
from mindspeed_cp.planner.network import Network
from mindspeed_cp.planner.pieces import best_pieces

__all__ = [
    "AttentionPass",
    "AttentionShape",
    "Compute",
    "Event",
    "LatentPass",
    "LatentShape",
    "Network",
    "Post",
    "Sent",
    "Wait",
    "all_to_all",
    "best_pieces",
    "busiest_link_seconds",
    "causal_zigzag",
    "predicted_bytes",
    "predicted_seconds",
    "unequal_all_to_all",
]
