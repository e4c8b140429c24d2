"""Multi-latent attention over context-parallel ranks of which the latent travels, with --context-parallel-latent.

Megatron's layer makes the keys and values of all its heads before its core attention is called. Here it hands on a key
of one head instead, which is the latent and the rotated part of the keys, and the core attention has the up projection:
keys and values are made where they are read (latent), or queries and outputs are multiplied by it (absorbed).

Shapes: S tokens of this rank, B batch, N heads of this tensor-parallel rank, L, R, U, V as in attention/latent.py.
"""

import argparse
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, Latent, LatentHeads
from mindspeed_cp.attention.interface import OUTPUT, Told
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, LatentForm, flag
from mindspeed_cp.patches.blockers import Blocker
from mindspeed_cp.patches.recomputation import recomputed
from mindspeed_cp.patches.unsupported import WATCHING
from mindspeed_cp.patching import Patch, PatchedCall

_MLA = "megatron.core.transformer.multi_latent_attention:MLASelfAttention"


@dataclass(frozen=True)
class UpProjection:
    """How a layer's keys and values are made of what travels. linear: Megatron's; its weight is [N * (U + V), L]."""

    linear: torch.nn.Module
    num_heads: int
    heads: LatentHeads
    form: LatentForm

    def attend(self, attention: ContextParallelAttention, q: Tensor, payload: Tensor, told: Told) -> Tensor:
        """Output [B, N, S, V] of queries [B, N, S, U + R]. payload: [B, 1, S, L + R]."""
        weight, payload = self.linear.get_parameter("weight"), payload.squeeze(1)
        up = weight.view(self.num_heads, -1, weight.size(1))
        if self.form == "latent":
            (out,) = attention.attend(OUTPUT, q, Latent(payload, self.heads.expand, (up,)), told)
            return out
        absorbed = Latent(payload, self.heads.absorbed)
        (of_latents,) = attention.attend(OUTPUT, self.heads.absorb(q, up), absorbed, told)
        return self.heads.values(of_latents, up)


def latent_travel_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.transformer.multi_latent_attention."""
    return (
        Patch(
            target=f"{_MLA}.get_query_key_value_tensors",
            kind="around",
            function=_query_key_value,
            why="It makes the keys and values of all heads, and with --context-parallel-latent their latent travels.",
            remove_when="Never: the form that travels is the plugin's own flag.",
        ),
    )


def give_up_projection(layer: Any) -> None:
    """Let the core attention of a new layer have the up projection, where the latent is to travel.

    Raises ConfigurationError where that is not a linear layer alone.
    """
    attention = getattr(layer.core_attention, "context_parallel_attention", None)
    if attention is None or attention.size == 1 or attention.by_plan.config.context_parallel_latent == "expanded":
        return
    from megatron.core.tensor_parallel import ColumnParallelLinear

    linear, config, form = layer.linear_kv_up_proj, layer.config, attention.by_plan.config.context_parallel_latent
    if type(linear) is not ColumnParallelLinear or linear.bias is not None:
        raise ConfigurationError(
            f"--context-parallel-latent {form} with a layer whose linear_kv_up_proj is {type(linear).__name__}: the "
            f"weight alone is to make keys and values of a latent; use --transformer-impl local, or expanded."
        )
    heads = LatentHeads(latent=config.kv_lora_rank, unshared=config.qk_head_dim)
    up = UpProjection(linear, layer.num_attention_heads_per_partition, heads, form)
    layer.core_attention.context_parallel_attention = attention.of_latents(up)
    # Nobody reads what it would make; its hooks, by which parameters are gathered, are called as ever.
    linear.forward = functools.partial(_nothing_made, linear.weight.size(0), _gathered_times(layer))


def _gathered_times(layer: Any) -> int:
    """How many times as many tokens the up projection has as it is given."""
    return int(layer.tp_group.size()) if layer.config.sequence_parallel else 1


def _nothing_made(width: int, times: int, latent: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Zeros in the shape of what an up projection makes of a latent [S, ..., L], one number in memory."""
    return latent.new_zeros(()).expand(latent.size(0) * times, *latent.shape[1:-1], width), None


def _query_key_value(call: PatchedCall) -> tuple[Any, ...]:
    """What get_query_key_value_tensors gives; where the latent travels, the payload in the place of the keys."""
    layer = call.instance
    query, key, value, *rest = call.proceed()
    attention = getattr(layer.core_attention, "context_parallel_attention", None)
    if attention is None or attention.latent is None:
        return query, key, value, *rest
    # The last is the normed latent, as the up projection is given it; all heads have the same rotated part.
    latent, rotated = _for_all_heads(layer, rest[-1]), key[..., :1, layer.config.qk_head_dim :]
    payload = torch.cat([latent.unsqueeze(-2), rotated], dim=-1)
    # Of the queries' size, so that no release pads it.
    return query, payload, payload.new_zeros((*query.shape[:-2], 1, query.size(-1))), *rest


def _for_all_heads(layer: Any, latent: Tensor) -> Tensor:
    """All tokens of a latent, whose gradient is summed over the heads of all tensor-parallel ranks."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    if layer.tp_group.size() == 1:
        return latent
    if layer.config.sequence_parallel:
        gathered: Tensor = gather_from_sequence_parallel_region(latent, group=layer.tp_group)
        return gathered
    copied: Tensor = copy_to_tensor_model_parallel_region(latent, group=layer.tp_group)
    return copied


def latent_blockers(args: argparse.Namespace, config: ContextParallelConfig) -> list[Blocker]:
    """What stands in the way of the form that is to travel."""
    form = config.context_parallel_latent
    if config.context_parallel_size == 1 or form == "expanded" or not args.multi_latent_attention:
        return []
    spelled = f"--context-parallel-latent {form}"
    reasons = []
    granularity, modules = recomputed(args)
    if "mla_up_proj" in modules and granularity == "selective":
        reasons.append("--recompute-modules mla_up_proj: nothing is up-projected there; leave one of the two out")
    if getattr(args, "apply_rope_fusion", False):
        reasons.append("fused rotary embeddings, which split the up projection's output; add --no-rope-fusion")
    reasons += [
        f"{flag(option)}: the largest scores are not collected there; use expanded"
        for option in WATCHING
        if getattr(args, option, False)
    ]
    if args.transformer_impl != "local":
        reasons.append(
            f"--transformer-impl {args.transformer_impl}, which norms the latent in the up projection; use local, or "
            f"expanded"
        )
    return [Blocker("--context-parallel-latent", f"{spelled} with {reason}.") for reason in reasons]


def latent_notes(args: argparse.Namespace, config: ContextParallelConfig) -> list[str]:
    """A sentence where the flag has no effect."""
    form = config.context_parallel_latent
    if config.context_parallel_size == 1 or form == "expanded" or args.multi_latent_attention:
        return []
    return [f"--context-parallel-latent {form} has no effect without --multi-latent-attention."]
