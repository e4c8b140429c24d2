"""Sequence-parallel inference of language models: partial states, prefill, decode, and what each way costs.

Functions on plain tensors, for authors of engines; ../../docs/inference.md says which is for what.
"""

from mindspeed_cp.inference.cache import ShardedKVCache, Slab
from mindspeed_cp.inference.chunks import Shared, chunked_attention, shared_prefix_attention
from mindspeed_cp.inference.costs import (
    Coefficients,
    DecodeCase,
    PrefixCase,
    Rates,
    Sample,
    agreed_rates,
    choose_pass,
    decode_sent,
    fit_coefficients,
    measure_rates,
    pass_kv_bytes,
    pass_q_bytes,
)
from mindspeed_cp.inference.decode import decode_attention
from mindspeed_cp.inference.interleave import Interleaved, Span, local_length, owner, slot
from mindspeed_cp.inference.local import attention_state
from mindspeed_cp.inference.prefill import (
    agreement_of,
    prefix_attention,
    ring_pass_kv_attention,
    ring_pass_q_attention,
)
from mindspeed_cp.inference.sampling import Choice, Sampling
from mindspeed_cp.inference.sequences import Spans, decode_plan, prefill_plan, put, take
from mindspeed_cp.inference.session import Model, Progress, Session, Step
from mindspeed_cp.inference.states import State, all_reduce_state, merge_state, merge_states, reduce_scatter_state

__all__ = [
    "Choice",
    "Coefficients",
    "DecodeCase",
    "Interleaved",
    "Model",
    "PrefixCase",
    "Progress",
    "Rates",
    "Sample",
    "Sampling",
    "Session",
    "ShardedKVCache",
    "Shared",
    "Slab",
    "Span",
    "Spans",
    "State",
    "Step",
    "agreed_rates",
    "agreement_of",
    "all_reduce_state",
    "attention_state",
    "choose_pass",
    "chunked_attention",
    "decode_attention",
    "decode_plan",
    "decode_sent",
    "fit_coefficients",
    "local_length",
    "measure_rates",
    "merge_state",
    "merge_states",
    "owner",
    "pass_kv_bytes",
    "pass_q_bytes",
    "prefill_plan",
    "prefix_attention",
    "put",
    "reduce_scatter_state",
    "ring_pass_kv_attention",
    "ring_pass_q_attention",
    "shared_prefix_attention",
    "slot",
    "take",
]
