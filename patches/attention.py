"""Megatron's attention layers: what `mindspeed_cp.attention` computes, where ranks share tokens or flags ask for it."""

import copy
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.attention import build_attention
from mindspeed_cp.attention.terms import default_scale
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.config import OF_ONE_RANK, ConfigurationError, ContextParallelConfig
from mindspeed_cp.documents import WindowSize
from mindspeed_cp.kernels.bias import geometric_slopes
from mindspeed_cp.patches.blockers import raise_for
from mindspeed_cp.patches.defaults import TRANSFORMER_ENGINE
from mindspeed_cp.patches.dropout import LayerDropout, drawing_number
from mindspeed_cp.patches.dynamic_attention import DynamicAttention
from mindspeed_cp.patches.latent_attention import take_head_sizes
from mindspeed_cp.patches.layer_attention import LayerAttention, other_mask_type, way_out
from mindspeed_cp.patches.packing import CAUSAL_WINDOW
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.process_groups import layer_group
from mindspeed_cp.patches.unsupported import WATCHING, refuse_unsupported, refused_options
from mindspeed_cp.patching import Patch, PatchedCall

LOCAL_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
TE_ATTENTION = "megatron.core.extensions.transformer_engine:TEDotProductAttention"


def attention_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the local layer spec's attention, and of the TransformerEngine spec's where that is installed."""
    return (
        *_class_patches(
            LOCAL_ATTENTION,
            functools.partial(_init, plugin, is_ours_alone=_asked_for_or_watched),
            functools.partial(_forward, alone=functools.partial(_attention_alone, plugin)),
        ),
        *_class_patches(
            TE_ATTENTION,
            functools.partial(_init, plugin, is_ours_alone=_asked_for, adjust=_agree_with_environment),
            _forward,
            needs=(TRANSFORMER_ENGINE,),
        ),
    )


def _class_patches(
    target: str,
    init: Callable[[PatchedCall], None],
    forward: Callable[[PatchedCall], Tensor],
    needs: tuple[str, ...] = (),
) -> tuple[Patch, Patch]:
    return (
        Patch(
            target=f"{target}.__init__",
            kind="around",
            function=init,
            parameters=(
                "config",
                "layer_number",
                "attn_mask_type",
                "attention_type",
                "attention_dropout",
                "softmax_scale",
            ),
            why="The local class refuses context parallelism and the two head sizes of latent attention; "
            "TransformerEngine's needs an NVIDIA GPU.",
            remove_when="Megatron's layer specs take the class of the core attention as an option.",
            needs=needs,
            upstream="https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/6120",
        ),
        Patch(
            target=f"{target}.forward",
            kind="around",
            function=forward,
            parameters=("query", "key", "value", "attention_mask", "attention_bias", "packed_seq_params"),
            why="Attention has to reach the keys that other ranks hold.",
            remove_when="The patch of __init__ is gone.",
            needs=needs,
        ),
    )


def _agree_with_environment(config: Any) -> None:
    """Change a layer's configuration so that TransformerEngine's class accepts it whatever NVTE_* variables there are.

    The class compares both with the variables that its kernels read, and none of its kernels runs.
    """
    config.deterministic_mode = False
    config.apply_query_key_layer_scaling = bool(int(os.environ.get("NVTE_APPLY_QK_LAYER_SCALING", "0")))


def _init(
    plugin: Plugin,
    call: PatchedCall,
    *,
    adjust: Callable[[Any], None] = lambda config: None,
    is_ours_alone: Callable[[Plugin, Any], bool] = lambda plugin, config: False,
) -> None:
    """A layer's constructor: its attention is ours where ranks share tokens, or where it is asked for.

    is_ours_alone: whether the attention of one rank is ours too, by its configuration.
    adjust: changes the copy of the configuration that such a layer's original constructor is shown.
    """
    head_sizes = take_head_sizes(call.original, call.kwargs)
    named, config = call.named, call["config"]
    is_dynamic = plugin.dynamic is not None
    is_ours = is_dynamic or config.context_parallel_size > 1 or is_ours_alone(plugin, config)
    if not is_ours and head_sizes is None:
        call.proceed()
        return
    # Megatron's own constructor sets everything else; it is shown a copy of the configuration that it can honour.
    named["config"] = copy.copy(config)
    if head_sizes is not None:
        head_sizes.fit(named)
    layer_attention: LayerAttention | DynamicAttention | None = None
    if is_ours:
        layer_attention = (_build_dynamic_attention if is_dynamic else _build_layer_attention)(plugin, named)
        named["config"].context_parallel_size = 1
        adjust(named["config"])
    call.proceed(**named)
    layer = call.instance
    layer.config = config
    layer.context_parallel_attention = layer_attention
    if layer_attention is not None and layer_attention.watches_scores:
        layer.current_max_attn_logits = None


def _forward(call: PatchedCall, *, alone: Callable[[Any], LayerAttention] | None = None) -> Tensor:
    """A layer's forward pass, which is ours in a layer that was made so.

    alone: makes what is to compute a packed stream in another layer, where the class itself cannot.
    """
    layer = call.instance
    attention: LayerAttention | DynamicAttention | None = getattr(layer, "context_parallel_attention", None)
    if attention is None and (alone is None or call["packed_seq_params"] is None):
        of_megatron: Tensor = call.proceed()
        return of_megatron
    packed = call["packed_seq_params"]
    if isinstance(attention, DynamicAttention):
        attention, packed = attention.of_document(packed), None
    if attention is None:
        assert alone is not None, "without it, and an attention of ours, the layer computes"
        attention = alone(layer)
    if call["attention_bias"] is not None:
        attention.refuse(
            f"attention_bias: nothing of Megatron's says which of its rows a rank holds; "
            f"{attention.way_out}, or call the library's attention, which takes one.",
            call["query"],
        )
    mask_type = call.named.get("attn_mask_type")
    return attention(
        call["query"],
        call["key"],
        call["value"],
        call["attention_mask"],
        mask_type=None if mask_type is None else mask_type.name,
        packed=packed,
        # Megatron's name for them: zeros with --softmax-type off-by-one, a parameter with learnable.
        sinks=getattr(layer, "softmax_offset", None),
        is_training=layer.training,
        watch=functools.partial(_keep_largest, layer) if attention.watches_scores and layer.training else None,
    )


def _keep_largest(layer: Any, largest: Tensor) -> None:
    """Where Megatron's clip_qk looks for it after a step; over its micro-batches."""
    known = layer.current_max_attn_logits
    layer.current_max_attn_logits = largest if known is None else torch.maximum(known, largest)


def _asked_for(plugin: Plugin, layer_config: Any) -> bool:
    """Whether the configuration asks for it: --attention-on-one-rank, --use-alibi."""
    return plugin.config is not None and plugin.config.computes_on_one_rank


def _asked_for_or_watched(plugin: Plugin, layer_config: Any) -> bool:
    """Or its scores are watched, which Megatron's local class does not know."""
    return _asked_for(plugin, layer_config) or _watches_scores(layer_config)


def _watches_scores(layer_config: Any) -> bool:
    """Whether --qk-clip or --log-max-attention-logit asks for the largest score of each head."""
    return any(getattr(layer_config, name, False) for name in WATCHING)


def _build_layer_attention(plugin: Plugin, named: dict[str, Any]) -> LayerAttention:
    """The attention of a layer whose constructor was called with the arguments `named`."""
    layer_config = named["config"]
    config, groups = _of_one_rank(plugin.config), None
    if layer_config.context_parallel_size > 1:
        groups = plugin.groups_over(layer_group(named.get("pg_collection"), "cp"))
        assert plugin.config is not None, "groups_over has a configuration or raises"
        config = plugin.config
        refuse_unsupported(layer_config, config, defaults=_field_defaults(layer_config))
        _check_heads(layer_config, config)
    _check_layer(named, config, f"--context-parallel-size {config.context_parallel_size}")
    return _layer_attention(plugin, named, _of_layer(config, named), groups)


def _build_dynamic_attention(plugin: Plugin, named: dict[str, Any]) -> DynamicAttention:
    """The same where each document has ranks of its own, which comes without a mask."""
    ranks = plugin.dynamic
    assert ranks is not None, "documents have ranks of their own"
    raise_for(refused_options(named["config"], ranks.spelled, _field_defaults(named["config"])))
    _check_heads(named["config"], ranks.config)
    _check_layer(named, ranks.config, ranks.spelled, is_dynamic=True)
    config = replace(_of_layer(ranks.config, named), attention_mask_type="causal")
    alone = _layer_attention(plugin, named, config.over(1), None)
    return DynamicAttention(
        ranks,
        # A document is a sample here, which is cut as one.
        replace(alone, is_dynamic=True, apart_by=None, cuts_streams_alone=lambda: False),
        functools.partial(build_attention, recomputation=alone.by_plan.recomputation),
        config,
    )


def _check_heads(layer_config: Any, config: ContextParallelConfig) -> None:
    config.check_model(
        num_attention_heads=layer_config.num_attention_heads,
        num_query_groups=layer_config.num_query_groups,
        tensor_model_parallel_size=layer_config.tensor_model_parallel_size,
    )


def _of_layer(config: ContextParallelConfig, named: dict[str, Any]) -> ContextParallelConfig:
    """What of a configuration is in force in a layer: not all of them keep K/V."""
    if not config.context_parallel_cache_interval or config.keeps_in(named["layer_number"]):
        return config
    return replace(config, context_parallel_kv_cache_policy=None, context_parallel_cache_interval=0)


def _layer_attention(
    plugin: Plugin, named: dict[str, Any], config: ContextParallelConfig, groups: ContextParallelGroups | None
) -> LayerAttention:
    layer_config, pg_collection, scale = named["config"], named.get("pg_collection"), named["softmax_scale"]
    head_size = named.get("k_channels") or layer_config.kv_channels
    reads_mask = config.attention_mask_type == "general"
    recomputation = plugin.recomputation if config.context_parallel_keep_outputs else None
    return LayerAttention(
        by_plan=build_attention(replace(config, attention_mask_type="causal"), groups, recomputation=recomputation),
        by_mask=build_attention(config, groups, recomputation=recomputation) if reads_mask else None,
        mask_type=named["attn_mask_type"].name,
        # --apply-query-key-layer-scaling divides here and multiplies again in the softmax: on the whole it is nothing.
        scale=default_scale(head_size) if scale is None else scale,
        window=_window(layer_config, named),
        packing=plugin.packing,
        apart_by=plugin.apart_by,
        cuts_streams_alone=plugin.cuts_streams_alone,
        was_cut_as_samples=plugin.was_cut_as_samples,
        length=plugin.length,
        dropout=_dropout(plugin, layer_config, named, pg_collection),
        watches_scores=_watches_scores(layer_config),
        slopes=_slopes(layer_config, pg_collection) if config.use_alibi else None,
    )


def _of_one_rank(config: ContextParallelConfig | None) -> ContextParallelConfig:
    """What of the job's configuration is about a layer without context parallelism."""
    given = config or ContextParallelConfig()
    return ContextParallelConfig(**{name: getattr(given, name) for name in OF_ONE_RANK})


def _dropout(plugin: Plugin, layer_config: Any, named: Mapping[str, Any], pg_collection: Any) -> LayerDropout | None:
    """named: holds the layer's number and its rate, the configuration's where it is None."""
    rate = named["attention_dropout"]
    rate = layer_config.attention_dropout if rate is None else rate
    if not rate:
        return None
    num_heads = layer_config.num_attention_heads // layer_config.tensor_model_parallel_size
    return LayerDropout.of_layer(rate, plugin.seed, named["layer_number"], num_heads, pg_collection)


def _slopes(layer_config: Any, pg_collection: Any) -> tuple[float, ...]:
    """ALiBi's slopes of the heads that this tensor-parallel rank has."""
    group = layer_group(pg_collection, "tp")
    slopes = geometric_slopes(layer_config.num_attention_heads)
    share = len(slopes) // group.size()
    return tuple(slopes[group.rank() * share : (group.rank() + 1) * share])


def _attention_alone(plugin: Plugin, layer: Any) -> LayerAttention:
    """The attention of a layer of Megatron's local class without context parallelism, for packed streams.

    Made for the first of them, and kept on the layer: a compiled function may make none.
    """
    kept: LayerAttention | None = getattr(layer, "attention_of_streams", None)
    if kept is not None:
        return kept
    layer.attention_of_streams = made = LayerAttention(
        by_plan=build_attention(replace(_of_one_rank(plugin.config), attention_mask_type="causal")),
        by_mask=None,
        mask_type=layer.attn_mask_type.name,
        scale=layer.softmax_scale * (layer.layer_number if layer.config.apply_query_key_layer_scaling else 1),
        window=_window(layer.config, vars(layer)),
        packing=plugin.packing,
        dropout=_dropout(
            plugin,
            layer.config,
            {"layer_number": drawing_number(layer), "attention_dropout": layer.attention_dropout.p},
            getattr(layer, "pg_collection", None),
        ),
    )
    return made


def _window(layer_config: Any, named: Mapping[str, Any]) -> WindowSize:
    """What a query of a causal layer sees: all that came before it, or --window-size.

    named: holds the layer's number, which --window-attn-skip-freq goes by.
    """
    if getattr(layer_config, "window_size", None) is None:
        return CAUSAL_WINDOW
    from megatron.core.transformer.utils import is_layer_window_attention

    if not is_layer_window_attention(
        layer_config.window_size, layer_config.window_attn_skip_freq, named["layer_number"]
    ):
        return CAUSAL_WINDOW
    behind, ahead = layer_config.window_size
    return behind, ahead


def _field_defaults(layer_config: Any) -> dict[str, object]:
    """Defaults of the fields of a TransformerConfig."""
    return {name: field.default for name, field in getattr(layer_config, "__dataclass_fields__", {}).items()}


def _check_layer(
    named: dict[str, Any], config: ContextParallelConfig, spelled: str, *, is_dynamic: bool = False
) -> None:
    """Raise ConfigurationError for a layer that is not one of self-attention, or has another mask than the flag's.

    spelled: what has several ranks share a sequence, for messages. is_dynamic: see LayerAttention.
    """
    if named["attention_type"] != "self":
        raise ConfigurationError(
            f"a layer of attention type {named['attention_type']!r} with {spelled}: only self-attention is available; "
            f"{way_out(config.context_parallel_size, is_dynamic=is_dynamic)}."
        )
    if config.attention_mask_type == "causal" and (mask_type := named["attn_mask_type"].name) != "causal":
        raise ConfigurationError(other_mask_type(mask_type))
