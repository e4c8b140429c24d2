"""Megatron's attention layers: with context parallelism above 1 they compute what `mindspeed_cp.attention` computes.

Shapes: S tokens of this rank, B batch, N heads of this tensor-parallel rank, G K/V heads of it, D head size,
V head size of the values (D but in latent attention).
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import Attention, build_attention
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.latent_attention import take_head_sizes
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.unsupported import refuse_unsupported
from mindspeed_cp.patching import Patch, bind_by_name

LOCAL_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
TE_ATTENTION = "megatron.core.extensions.transformer_engine:TEDotProductAttention"


def attention_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the local layer spec's attention, and of the TransformerEngine spec's where that is installed."""
    return (
        *_class_patches(plugin, LOCAL_ATTENTION),
        *_class_patches(plugin, TE_ATTENTION, needs=("transformer_engine",)),
    )


def _class_patches(plugin: Plugin, target: str, needs: tuple[str, ...] = ()) -> tuple[Patch, Patch]:
    return (
        Patch(
            target=f"{target}.__init__",
            kind="wrap",
            function=functools.partial(_wrap_init, plugin),
            parameters=("config", "attn_mask_type", "attention_type", "attention_dropout", "softmax_scale"),
            why="The local class refuses context parallelism and the two head sizes of latent attention; "
            "TransformerEngine's needs an NVIDIA GPU.",
            remove_when="Megatron's layer specs take the class of the core attention as an option.",
            needs=needs,
            upstream="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/6120",
        ),
        Patch(
            target=f"{target}.forward",
            kind="wrap",
            function=_wrap_forward,
            parameters=("query", "key", "value", "attention_mask", "attention_bias", "packed_seq_params"),
            why="Attention has to reach the keys that other ranks hold.",
            remove_when="The patch of __init__ is gone.",
            needs=needs,
        ),
    )


@dataclass(frozen=True)
class LayerAttention:
    """The context-parallel attention of one layer, in Megatron's terms.

    attention: what computes it.
    scale: factor on the scores.
    uses_mask: whether the batch's mask says who sees whom; else each token sees itself and what came before.
    """

    attention: Attention
    scale: float
    uses_mask: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attention of this rank's tokens over those of all ranks, [S, B, N * V].

        query: [S, B, N, D]; key: [S, B, G, D]; value: [S, B, G, V]; attention_mask: [B or 1, 1, S, T] bool, True where
        masked (as Megatron has it), with T the tokens of all ranks.
        """
        if query.size(0) != key.size(0):
            raise NotImplementedError(
                f"{query.size(0)} queries over {key.size(0)} keys a rank: inference with context parallelism is not "
                f"available; use --context-parallel-size 1."
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible = ~attention_mask if self.uses_mask and attention_mask is not None else None
        out = self.attention(q, k, v, scale=self.scale, visible=visible)
        return out.permute(2, 0, 1, 3).flatten(2)


def _wrap_init(plugin: Plugin, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        head_sizes = take_head_sizes(original, kwargs)
        named = bind_by_name(original, (self, *args), kwargs)
        config = named["config"]
        if config.context_parallel_size == 1 and head_sizes is None:
            original(self, *args, **kwargs)
            return
        # Megatron's own constructor sets everything else; it is shown a copy of the configuration that it can honour.
        named["config"] = copy.copy(config)
        if head_sizes is not None:
            head_sizes.fit(named)
        layer_attention = None
        if config.context_parallel_size > 1:
            layer_attention = _build_layer_attention(plugin, named)
            named["config"].context_parallel_size = 1
        original(**named)
        self.config = config
        self.context_parallel_attention = layer_attention

    return __init__


def _wrap_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        attention: LayerAttention | None = getattr(self, "context_parallel_attention", None)
        if attention is None:
            return original(self, *args, **kwargs)
        named = bind_by_name(original, (self, *args), kwargs)
        for argument, what in (("packed_seq_params", "packed sequences"), ("attention_bias", "attention biases")):
            if named[argument] is not None:
                raise NotImplementedError(
                    f"{argument} with context parallelism: {what} are not available yet; use --context-parallel-size 1."
                )
        mask_type = named.get("attn_mask_type")
        if mask_type is not None:
            _check_mask_type(mask_type.name, uses_mask=attention.uses_mask)
        return attention(named["query"], named["key"], named["value"], named["attention_mask"])

    return forward


def _build_layer_attention(plugin: Plugin, named: dict[str, Any]) -> LayerAttention:
    """The attention of a layer whose constructor was called with the arguments `named`."""
    layer_config = named["config"]
    group = _context_parallel_group(named.get("pg_collection"))
    groups = plugin.groups_over(group)
    config = plugin.config
    assert config is not None, "groups_over has a configuration or raises"
    refuse_unsupported(layer_config, config)
    config.check_model(
        num_attention_heads=layer_config.num_attention_heads,
        num_query_groups=layer_config.num_query_groups,
        tensor_model_parallel_size=layer_config.tensor_model_parallel_size,
    )
    _check_layer(named, config)
    head_size = named.get("k_channels") or layer_config.kv_channels
    scale = named["softmax_scale"]
    return LayerAttention(
        attention=build_attention(config, groups),
        # --apply-query-key-layer-scaling divides here and multiplies again in the softmax: on the whole it is nothing.
        scale=1.0 / math.sqrt(head_size) if scale is None else scale,
        uses_mask=config.attention_mask_type == "general",
    )


def _context_parallel_group(pg_collection: Any) -> dist.ProcessGroup:
    """The layer's own group where it was given one, else Megatron's."""
    group: dist.ProcessGroup | None = getattr(pg_collection, "cp", None)
    if group is None:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
    return group


def _check_layer(named: dict[str, Any], config: ContextParallelConfig) -> None:
    if named["attention_type"] != "self":
        raise ConfigurationError(
            f"a layer of attention type {named['attention_type']!r} with --context-parallel-size "
            f"{config.context_parallel_size}: only self-attention is available; use --context-parallel-size 1."
        )
    if named["attention_dropout"]:
        raise ConfigurationError(
            f"a layer with attention_dropout {named['attention_dropout']} with --context-parallel-size "
            f"{config.context_parallel_size}: attention dropout is not available yet; give it 0."
        )
    _check_mask_type(named["attn_mask_type"].name, uses_mask=config.attention_mask_type == "general")


def _check_mask_type(mask_type: str, *, uses_mask: bool) -> None:
    if mask_type != "causal" and not uses_mask:
        raise ConfigurationError(
            f"a layer with the mask type {mask_type} and --attention-mask-type causal: they differ; "
            f"use --attention-mask-type general."
        )
