"""Megatron's attention layers: with context parallelism above 1 they compute what `mindspeed_cp.attention` computes.

Shapes: S tokens of this rank, B batch, N heads of this tensor-parallel rank, G K/V heads of it, D head size,
V head size of the values (D but in latent attention).
"""

import copy
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import ContextParallelAttention, build_attention
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, MaskType
from mindspeed_cp.patches.latent_attention import take_head_sizes
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.unsupported import refuse_unsupported
from mindspeed_cp.patching import Patch, bind_by_name

LOCAL_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
TE_ATTENTION = "megatron.core.extensions.transformer_engine:TEDotProductAttention"

WITHOUT_MASK: dict[str, MaskType] = {"causal": "causal", "no_mask": "general", "padding": "general"}
"""What a layer's mask type, by Megatron's name, means where no mask comes: what the local spec's own attention computes
at CP = 1. The others (arbitrary, padding_causal, causal_bottom_right) say nothing without one there."""


def attention_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the local layer spec's attention, and of the TransformerEngine spec's where that is installed."""
    return (
        *_class_patches(LOCAL_ATTENTION, functools.partial(_wrap_init, plugin)),
        *_class_patches(
            TE_ATTENTION,
            functools.partial(_wrap_init, plugin, adjust=_agree_with_environment),
            needs=("transformer_engine",),
        ),
    )


def _class_patches(
    target: str, wrap_init: Callable[[Callable[..., None]], Callable[..., None]], needs: tuple[str, ...] = ()
) -> tuple[Patch, Patch]:
    return (
        Patch(
            target=f"{target}.__init__",
            kind="wrap",
            function=wrap_init,
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

    causal: each token sees itself and what came before.
    general: the batch's mask says who sees whom, or without one all see all; None with --attention-mask-type causal,
        where the batch's mask is not read.
    mask_type: Megatron's name of who sees whom in this layer where no mask comes; Megatron gives one to the pipeline
        stages that have a batch, which are the first and the last.
    scale: factor on the scores.
    size: context-parallel ranks.
    """

    causal: ContextParallelAttention
    general: ContextParallelAttention | None
    mask_type: str
    scale: float
    size: int

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        mask_type: str | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens over those of all ranks, [S, B, N * V].

        query: [S, B, N, D]; key: [S, B, G, D]; value: [S, B, G, V]; attention_mask: [B or 1, N or 1, S, T] bool, True
        where masked (as Megatron has it), with T the tokens of all ranks. mask_type: overrides the layer's own.

        Raises ValueError, on all ranks, where nothing says who sees whom, for a mask of another shape or dtype, and for
        inference.
        """
        if query.size(0) != key.size(0):
            self.refuse(
                f"{query.size(0)} queries over {key.size(0)} keys a rank: inference with context parallelism is not "
                f"available; use --context-parallel-size 1.",
                query,
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask_type = mask_type or self.mask_type
        if self.general is None:
            if mask_type != "causal":
                self.refuse(_other_mask_type(mask_type), query)
            out = self.causal(q, k, v, scale=self.scale)
        elif attention_mask is not None:
            self._check_mask(query, attention_mask)
            out = self.general(q, k, v, scale=self.scale, visible=~attention_mask)
        elif mask_type in WITHOUT_MASK:
            attention = self.causal if WITHOUT_MASK[mask_type] == "causal" else self.general
            out = attention(q, k, v, scale=self.scale)
        else:
            self.refuse(
                f"a layer with the mask type {mask_type} was given no attention_mask, and without one nothing says who "
                f"sees whom; give it one, or build it with the mask type causal or no_mask.",
                query,
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def refuse(self, reason: str, query: Tensor) -> NoReturn:
        """Raise ValueError on all ranks; see ContextParallelAttention.refuse."""
        self.causal.refuse(reason, query)

    def _check_mask(self, query: Tensor, mask: Tensor) -> None:
        tokens, batch, heads, _ = query.shape
        keys = tokens * self.size
        fits = mask.dim() == 4 and mask.size(0) in (1, batch) and mask.size(1) in (1, heads)
        if not fits or mask.shape[2:] != (tokens, keys) or mask.dtype != torch.bool:
            self.refuse(
                f"attention_mask is {list(mask.shape)} of {mask.dtype}, and this rank's {tokens} queries of {keys} "
                f"tokens need [{batch} or 1, {heads} or 1, {tokens}, {keys}] of torch.bool, True where masked; "
                f"Megatron's get_batch_on_this_cp_rank gives each rank the rows of its own tokens.",
                query,
            )


def _agree_with_environment(config: Any) -> None:
    """Change a layer's configuration so that TransformerEngine's class accepts it whatever NVTE_* variables there are.

    The class compares both with the variables that its kernels read, and none of its kernels runs.
    """
    config.deterministic_mode = False
    config.apply_query_key_layer_scaling = bool(int(os.environ.get("NVTE_APPLY_QK_LAYER_SCALING", "0")))


def _wrap_init(
    plugin: Plugin, original: Callable[..., None], *, adjust: Callable[[Any], None] = lambda config: None
) -> Callable[..., None]:
    """The constructor `original`, which makes a context-parallel layer where its configuration asks for one.

    adjust: changes the copy of the configuration that such a layer's original constructor is shown.
    """

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
            adjust(named["config"])
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
                attention.refuse(
                    f"{argument} with context parallelism: {what} are not available yet; "
                    f"use --context-parallel-size 1.",
                    named["query"],
                )
        mask_type = named.get("attn_mask_type")
        return attention(
            named["query"],
            named["key"],
            named["value"],
            named["attention_mask"],
            mask_type=None if mask_type is None else mask_type.name,
        )

    return forward


def _build_layer_attention(plugin: Plugin, named: dict[str, Any]) -> LayerAttention:
    """The attention of a layer whose constructor was called with the arguments `named`."""
    layer_config = named["config"]
    group = _context_parallel_group(named.get("pg_collection"))
    groups = plugin.groups_over(group)
    config = plugin.config
    assert config is not None, "groups_over has a configuration or raises"
    refuse_unsupported(layer_config, config, defaults=_field_defaults(layer_config))
    config.check_model(
        num_attention_heads=layer_config.num_attention_heads,
        num_query_groups=layer_config.num_query_groups,
        tensor_model_parallel_size=layer_config.tensor_model_parallel_size,
    )
    _check_layer(named, config)
    head_size = named.get("k_channels") or layer_config.kv_channels
    scale = named["softmax_scale"]
    reads_mask = config.attention_mask_type == "general"
    return LayerAttention(
        causal=build_attention(replace(config, attention_mask_type="causal"), groups),
        general=build_attention(config, groups) if reads_mask else None,
        mask_type=named["attn_mask_type"].name,
        # --apply-query-key-layer-scaling divides here and multiplies again in the softmax: on the whole it is nothing.
        scale=1.0 / math.sqrt(head_size) if scale is None else scale,
        size=config.context_parallel_size,
    )


def _field_defaults(layer_config: Any) -> dict[str, object]:
    """Defaults of the fields of a TransformerConfig."""
    return {name: field.default for name, field in getattr(layer_config, "__dataclass_fields__", {}).items()}


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
    if config.attention_mask_type == "causal" and (mask_type := named["attn_mask_type"].name) != "causal":
        raise ConfigurationError(_other_mask_type(mask_type))


def _other_mask_type(mask_type: str) -> str:
    return (
        f"a layer with the mask type {mask_type} and --attention-mask-type causal: they differ; "
        f"use --attention-mask-type general."
    )
