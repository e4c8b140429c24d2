"""Attention over the ranks of a group, on plain tensors: no Megatron, no arguments, no globals."""

from mindspeed_cp.attention.build import build_attention, unavailable_reason
from mindspeed_cp.attention.local import Attention, LocalAttention
from mindspeed_cp.attention.ulysses import UlyssesAttention

__all__ = ["Attention", "LocalAttention", "UlyssesAttention", "build_attention", "unavailable_reason"]
