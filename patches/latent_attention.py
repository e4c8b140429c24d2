"""Multi-latent attention without TransformerEngine: its two head sizes, and its gradients under tensor parallelism.

Shapes: S tokens, B batch, L rank of the latent that keys and values are made of, R size of the rotary part of the keys,
D head size of queries and keys, V head size of values.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.attention.terms import default_scale
from mindspeed_cp.patches.defaults import TRANSFORMER_ENGINE
from mindspeed_cp.patches.latent_travel import give_up_projection
from mindspeed_cp.patching import Patch, PatchedCall


class HeadSizes(NamedTuple):
    """Head sizes of a layer, by Megatron's names: k_channels is D, v_channels is V; None is the configuration's."""

    k_channels: int | None = None
    v_channels: int | None = None

    def fit(self, named: dict[str, Any]) -> None:
        """Change a constructor's arguments so that a class with one head size does what these two ask for.

        named: its arguments by name. Their `config` is changed too: it must be a copy.
        """
        config = named["config"]
        # The class takes its head size for two things: the scale, where none is given, and the width of its output.
        if named["softmax_scale"] is None:
            named["softmax_scale"] = default_scale(self.k_channels or config.kv_channels)
        config.kv_channels = self.v_channels or config.kv_channels


def take_head_sizes(constructor: Callable[..., Any], keywords: dict[str, Any]) -> HeadSizes | None:
    """Remove from `keywords` the head sizes that the constructor has no parameters for; None where there are none."""
    parameters = inspect.signature(constructor).parameters
    names = [name for name in HeadSizes._fields if name in keywords and name not in parameters]
    return HeadSizes(**{name: keywords.pop(name) for name in names}) if names else None


def latent_attention_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.transformer.multi_latent_attention."""
    return (
        Patch(
            target="megatron.core.transformer.multi_latent_attention:MLASelfAttention.__init__",
            kind="around",
            function=_init,
            why="All heads share the rotary part of the keys, and without TransformerEngine nobody sums its gradients "
            "over the tensor-parallel ranks.",
            remove_when="Megatron sums it itself: NVIDIA/Megatron-LM#1699.",
        ),
        Patch(
            target="megatron.core.transformer.multi_latent_attention:TELinear",
            kind="replace",
            function=_NothingOfThatClass,
            unless=(TRANSFORMER_ENGINE,),
            versions="<0.17",
            why="Without TransformerEngine no class is there, and layers are asked whether they are of it.",
            remove_when="Megatron 0.16 is no longer supported.",
        ),
    )


def _init(call: PatchedCall) -> None:
    call.proceed()
    layer = call.instance
    give_up_projection(layer)
    if layer.tp_group.size() > 1:
        layer.linear_kv_down_proj.register_forward_hook(functools.partial(_gather_latent, layer))


class _NothingOfThatClass:
    """Stands for a class that is not installed, in questions for it."""


def _gather_latent(
    attention: Any, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The latent and the rotary part of the keys, gathered so that the gradients of both are sums over all heads.

    output: what the down projection gives: [S, B, (L + R) / ranks], and its bias.

    Returns [S, B, L + R]; with sequence parallelism this rank's tokens of it, which is what TransformerEngine's layer
    gives, and what Megatron gathers again where it needs all tokens. What is that wide already is left alone.
    """
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_tensor_model_parallel_region,
        scatter_to_sequence_parallel_region,
    )

    part, bias = output
    config, group = attention.config, attention.tp_group
    sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
    if part.size(-1) == sum(sizes):
        return output
    whole = gather_from_tensor_model_parallel_region(part, group=group)
    if config.sequence_parallel:
        return scatter_to_sequence_parallel_region(whole, group=group), bias
    # The up projection sums the gradient of the latent; nobody does that for the rotary part.
    latent, rotary = whole.split(sizes, dim=-1)
    return torch.cat([latent, copy_to_tensor_model_parallel_region(rotary, group=group)], dim=-1), bias
