"""Attention over the ranks of a group, on plain tensors: no Megatron, no arguments, no globals."""

from mindspeed_cp.attention.build import build_attention, compose_attention
from mindspeed_cp.attention.call import ContextParallelAttention
from mindspeed_cp.attention.interface import Attention
from mindspeed_cp.attention.latent import Latent, LatentHeads
from mindspeed_cp.attention.planned import PlannedAttention, local_attention
from mindspeed_cp.attention.recomputation import Recomputation
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.attention.terms import AttentionTerms
from mindspeed_cp.attention.ulysses import UlyssesAttention
from mindspeed_cp.comm import RingCommunicators
from mindspeed_cp.kernels import Dropout

__all__ = [
    "Attention",
    "AttentionTerms",
    "ContextParallelAttention",
    "Dropout",
    "Latent",
    "LatentHeads",
    "PlannedAttention",
    "Recomputation",
    "RingAttention",
    "RingCommunicators",
    "UlyssesAttention",
    "build_attention",
    "compose_attention",
    "local_attention",
]
