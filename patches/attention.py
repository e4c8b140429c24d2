"""Megatron's attention layers: with context parallelism above 1 they compute what `mindspeed_cp.attention` computes.

Shapes: S tokens of this rank, B batch, N heads of this tensor-parallel rank, G K/V heads of it, D head size,
V head size of the values (D but in latent attention).
"""

import copy
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms, ContextParallelAttention, build_attention
from mindspeed_cp.attention.terms import default_scale
from mindspeed_cp.config import OF_ONE_RANK, ConfigurationError, ContextParallelConfig, MaskType
from mindspeed_cp.documents import Window
from mindspeed_cp.kernels.bias import geometric_slopes
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.dropout import LayerDropout
from mindspeed_cp.patches.latent_attention import take_head_sizes
from mindspeed_cp.patches.latent_travel import UpProjection
from mindspeed_cp.patches.packing import CAUSAL_WINDOW, FULL_WINDOW, Packing, plan_of_documents, plan_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.process_groups import layer_group
from mindspeed_cp.patches.unsupported import WATCHING, refuse_unsupported
from mindspeed_cp.patching import Patch, bind_by_name
from mindspeed_cp.plan import AttentionPlan, Band
from mindspeed_cp.sharding import SequenceLayout

LOCAL_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
TE_ATTENTION = "megatron.core.extensions.transformer_engine:TEDotProductAttention"

WITHOUT_MASK: dict[str, MaskType] = {"causal": "causal", "no_mask": "general", "padding": "general"}
"""What a layer's mask type, by Megatron's name, means where no mask comes: what the local spec's own attention computes
at CP = 1. The others (arbitrary, padding_causal, causal_bottom_right) say nothing without one there."""

WINDOWED: dict[str, Window] = {
    "causal": CAUSAL_WINDOW,
    "padding_causal": CAUSAL_WINDOW,
    "no_mask": FULL_WINDOW,
    "padding": FULL_WINDOW,
}
"""What a query sees of its document, by the layer's mask type; where that is causal, the layer may have a window."""


def attention_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the local layer spec's attention, and of the TransformerEngine spec's where that is installed."""
    return (
        *_class_patches(
            LOCAL_ATTENTION,
            functools.partial(_wrap_init, plugin, is_ours_alone=_asked_for_or_watched),
            functools.partial(_wrap_forward, alone=functools.partial(_attention_alone, plugin)),
        ),
        *_class_patches(
            TE_ATTENTION,
            functools.partial(_wrap_init, plugin, is_ours_alone=_asked_for, adjust=_agree_with_environment),
            _wrap_forward,
            needs=("transformer_engine",),
        ),
    )


def _class_patches(
    target: str,
    wrap_init: Callable[[Callable[..., None]], Callable[..., None]],
    wrap_forward: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
    needs: tuple[str, ...] = (),
) -> tuple[Patch, Patch]:
    return (
        Patch(
            target=f"{target}.__init__",
            kind="wrap",
            function=wrap_init,
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
            kind="wrap",
            function=wrap_forward,
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
    window: what a query of a causal layer sees of its document, (tokens before it, tokens after it), -1 being all.
    packing: how packed streams are dealt to ranks. apart_by: the flag that keeps documents apart; None where none does.
    latent: how keys and values are made of a payload, which a key then is; None where they are given.
    length: tokens of a whole sample where ranks have unequal shards of it.
    dropout: of the layer in training. watches_scores: whether the largest score of each head is asked for.
    slopes: ALiBi's, of this tensor-parallel rank's heads; None where scores do not fall with the distance.
    """

    causal: ContextParallelAttention
    general: ContextParallelAttention | None
    mask_type: str
    scale: float
    size: int
    window: Window = CAUSAL_WINDOW
    packing: Packing = field(default_factory=Packing)
    apart_by: str | None = None
    latent: UpProjection | None = None
    length: int | None = None
    dropout: LayerDropout | None = None
    watches_scores: bool = False
    slopes: tuple[float, ...] | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        mask_type: str | None = None,
        packed: Any = None,
        sinks: Tensor | None = None,
        is_training: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens over those of all ranks, [S, B, N * V].

        query: [S, B, N, D]; key: [S, B, G, D]; value: [S, B, G, V]; attention_mask: [B or 1, N or 1, S, T] bool, True
        where masked (as Megatron has it), with T the tokens of all ranks, or the documents that packing describes.
        mask_type: overrides the layer's own. packed: Megatron's PackedSeqParams; tensors are then [S, N, D], [S, G, D]
        and [S, G, V], and the result is [S, N * V]. sinks: a score for each head that has no value, N floating numbers;
        its gradient is this rank's part, which data-parallel reducers add up. is_training: whether dropout drops.
        watch: told the largest score of each head, [N] in the dtype of sums; -inf for those this rank has not computed.

        Raises ValueError, on all ranks, where nothing says who sees whom, for a mask of another shape or dtype, for
        documents that do not fit the tokens, and for inference.
        """
        if query.size(0) != key.size(0):
            self.refuse(
                f"{query.size(0)} queries over {key.size(0)} keys a rank: inference with context parallelism is not "
                f"available; use --context-parallel-size 1.",
                query,
            )
        mask_type = mask_type or self.mask_type
        call = functools.partial(self._attend, terms=self._terms(sinks, is_training, query.device), watch=watch)
        if packed is not None:
            q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (query, key, value))
            out = call(self.causal, q, k, v, plan=self._plan_of_stream(query, packed, mask_type))
            return out[0].transpose(0, 1).flatten(1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            plan = self._planned(query, mask_type, lambda window: plan_of_documents(attention_mask, self.size, window))
            out = call(self.causal, q, k, v, plan=plan)
        elif self.apart_by is not None and (attention_mask is None or self.general is None):
            self.refuse(
                f"{self.apart_by}, and this layer was not told where documents end; import "
                f"mindspeed_cp.megatron_adaptor before megatron, and let Megatron's get_batch_on_this_cp_rank or "
                f"mindspeed_cp.megatron_adaptor.shard_batch cut the batch.",
                query,
            )
        elif self.window != CAUSAL_WINDOW or self.length is not None:
            if attention_mask is not None and self.general is not None:
                self.refuse(
                    "--window-size and a mask tensor: each says who sees whom; use --attention-mask-type causal.", query
                )
            plan = self._planned(query, mask_type, functools.partial(self._plan_of_samples, query))
            out = call(self.causal, q, k, v, plan=plan)
        elif self.general is None:
            if mask_type != "causal":
                self.refuse(_other_mask_type(mask_type), query)
            out = call(self.causal, q, k, v)
        elif attention_mask is not None:
            self._check_mask(query, attention_mask)
            out = call(self.general, q, k, v, visible=~attention_mask)
        elif mask_type in WITHOUT_MASK:
            attention = self.causal if WITHOUT_MASK[mask_type] == "causal" else self.general
            out = call(attention, q, k, v)
        else:
            self.refuse(
                f"a layer with the mask type {mask_type} was given no attention_mask, and without one nothing says who "
                f"sees whom; give it one, or build it with the mask type causal or no_mask.",
                query,
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def of_latents(self, up: UpProjection) -> "LayerAttention":
        """The same where keys are payloads, of which keys and values are made."""
        return replace(self, latent=up)

    def _terms(self, sinks: Tensor | None, is_training: bool, device: torch.device) -> AttentionTerms | None:
        dropout = self.dropout.draw() if self.dropout is not None and is_training else None
        if sinks is None and dropout is None and self.slopes is None:
            return None
        return AttentionTerms(
            sinks=None if sinks is None else sinks.flatten(),
            alibi_slopes=None if self.slopes is None else _on_device(self.slopes, device),
            dropout=dropout,
        )

    def _attend(
        self,
        attention: ContextParallelAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        terms: AttentionTerms | None,
        watch: Callable[[Tensor], None] | None,
        plan: AttentionPlan | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        if self.latent is not None:
            return self.latent.attend(attention, q, k, scale=self.scale, visible=visible, plan=plan, terms=terms)
        if watch is None:
            return attention(q, k, v, scale=self.scale, visible=visible, plan=plan, terms=terms)
        out, largest = attention.with_largest(q, k, v, scale=self.scale, visible=visible, plan=plan, terms=terms)
        watch(largest)
        return out

    def refuse(self, reason: str, query: Tensor) -> NoReturn:
        """Raise ValueError on all ranks; see ContextParallelAttention.refuse."""
        self.causal.refuse(reason, query)

    def _plan_of_samples(self, query: Tensor, window: Window) -> AttentionPlan:
        if self.length is not None:
            return plan_of_length(self.length, self.size, window)
        return _plan_of_window(query.size(0), self.size, window)

    def _plan_of_stream(self, query: Tensor, packed: Any, mask_type: str) -> AttentionPlan:
        tokens = query.size(0) * self.size
        return self._planned(query, mask_type, lambda window: self.packing.plan(packed, tokens, self.size, window))

    def _planned(self, query: Tensor, mask_type: str, plan: Callable[[Window], AttentionPlan]) -> AttentionPlan:
        """The plan under this layer's window. Raises ValueError on all ranks where it cannot be made."""
        if mask_type not in WINDOWED:
            self.refuse(
                f"a layer with the mask type {mask_type} and documents or a window: only {or_list([*WINDOWED])} say "
                f"who sees whom in them; build it with one of these.",
                query,
            )
        try:
            return plan(self.window if WINDOWED[mask_type] == CAUSAL_WINDOW else WINDOWED[mask_type])
        except ValueError as error:
            self.refuse(str(error), query)

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


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _on_device(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once for all layers."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _plan_of_window(num_tokens: int, num_ranks: int, window: Window) -> AttentionPlan:
    """Who sees whom in samples without documents. num_tokens: of a sample on each rank."""
    shards = SequenceLayout(size=num_ranks).of(num_tokens)
    behind, ahead = (None if each == -1 else each for each in window)
    return AttentionPlan(shards, shards, (Band(behind, ahead),))


def _agree_with_environment(config: Any) -> None:
    """Change a layer's configuration so that TransformerEngine's class accepts it whatever NVTE_* variables there are.

    The class compares both with the variables that its kernels read, and none of its kernels runs.
    """
    config.deterministic_mode = False
    config.apply_query_key_layer_scaling = bool(int(os.environ.get("NVTE_APPLY_QK_LAYER_SCALING", "0")))


def _wrap_init(
    plugin: Plugin,
    original: Callable[..., None],
    *,
    adjust: Callable[[Any], None] = lambda config: None,
    is_ours_alone: Callable[[Plugin, Any], bool] = lambda plugin, config: False,
) -> Callable[..., None]:
    """The constructor `original`, which makes a context-parallel layer where its configuration asks for one.

    is_ours_alone: whether the attention of one rank is ours too, by its configuration.
    adjust: changes the copy of the configuration that such a layer's original constructor is shown.
    """

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        head_sizes = take_head_sizes(original, kwargs)
        named = bind_by_name(original, (self, *args), kwargs)
        config = named["config"]
        is_ours = config.context_parallel_size > 1 or is_ours_alone(plugin, config)
        if not is_ours and head_sizes is None:
            original(self, *args, **kwargs)
            return
        # Megatron's own constructor sets everything else; it is shown a copy of the configuration that it can honour.
        named["config"] = copy.copy(config)
        if head_sizes is not None:
            head_sizes.fit(named)
        layer_attention = None
        if is_ours:
            layer_attention = _build_layer_attention(plugin, named)
            named["config"].context_parallel_size = 1
            adjust(named["config"])
        original(**named)
        self.config = config
        self.context_parallel_attention = layer_attention
        if layer_attention is not None and layer_attention.watches_scores:
            self.current_max_attn_logits = None

    return __init__


def _wrap_forward(
    original: Callable[..., Tensor], *, alone: Callable[[Any], LayerAttention] | None = None
) -> Callable[..., Tensor]:
    """The forward pass `original`, which is ours where the layer is context-parallel.

    alone: makes what is to compute a packed stream without context parallelism, where the class itself cannot.
    """

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        attention: LayerAttention | None = getattr(self, "context_parallel_attention", None)
        if attention is None and alone is None:
            return original(self, *args, **kwargs)
        named = bind_by_name(original, (self, *args), kwargs)
        packed = named["packed_seq_params"]
        if attention is None:
            if alone is None or packed is None:
                return original(self, *args, **kwargs)
            attention = alone(self)
        if named["attention_bias"] is not None:
            attention.refuse(
                "attention_bias with context parallelism: attention biases are not available yet; use "
                "--context-parallel-size 1.",
                named["query"],
            )
        mask_type = named.get("attn_mask_type")
        return attention(
            named["query"],
            named["key"],
            named["value"],
            named["attention_mask"],
            mask_type=None if mask_type is None else mask_type.name,
            packed=packed,
            # Megatron's name for them: zeros with --softmax-type off-by-one, a parameter with learnable.
            sinks=getattr(self, "softmax_offset", None),
            is_training=self.training,
            watch=functools.partial(_keep_largest, self) if attention.watches_scores and self.training else None,
        )

    return forward


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
    pg_collection = named.get("pg_collection")
    config, groups = _of_one_rank(plugin.config), None
    if layer_config.context_parallel_size > 1:
        groups = plugin.groups_over(layer_group(pg_collection, "cp"))
        assert plugin.config is not None, "groups_over has a configuration or raises"
        config = plugin.config
        refuse_unsupported(layer_config, config, defaults=_field_defaults(layer_config))
        config.check_model(
            num_attention_heads=layer_config.num_attention_heads,
            num_query_groups=layer_config.num_query_groups,
            tensor_model_parallel_size=layer_config.tensor_model_parallel_size,
        )
    _check_layer(named, config)
    head_size = named.get("k_channels") or layer_config.kv_channels
    scale = named["softmax_scale"]
    if config.context_parallel_cache_interval and not config.keeps_in(named["layer_number"]):
        config = replace(config, context_parallel_kv_cache_policy=None, context_parallel_cache_interval=0)
    reads_mask = config.attention_mask_type == "general"
    recomputation = plugin.recomputation if config.context_parallel_keep_outputs else None
    return LayerAttention(
        causal=build_attention(replace(config, attention_mask_type="causal"), groups, recomputation=recomputation),
        general=build_attention(config, groups, recomputation=recomputation) if reads_mask else None,
        mask_type=named["attn_mask_type"].name,
        # --apply-query-key-layer-scaling divides here and multiplies again in the softmax: on the whole it is nothing.
        scale=default_scale(head_size) if scale is None else scale,
        size=config.context_parallel_size,
        window=_window(layer_config, named),
        packing=plugin.packing,
        apart_by=plugin.apart_by,
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
    """The attention of a layer of Megatron's local class without context parallelism, for packed streams."""
    return LayerAttention(
        causal=build_attention(replace(_of_one_rank(plugin.config), attention_mask_type="causal")),
        general=None,
        mask_type=layer.attn_mask_type.name,
        scale=layer.softmax_scale * (layer.layer_number if layer.config.apply_query_key_layer_scaling else 1),
        size=1,
        window=_window(layer.config, vars(layer)),
        packing=plugin.packing,
        dropout=_dropout(
            plugin,
            layer.config,
            {"layer_number": layer.layer_number, "attention_dropout": layer.attention_dropout.p},
            getattr(layer, "pg_collection", None),
        ),
    )


def _window(layer_config: Any, named: Mapping[str, Any]) -> Window:
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


def _check_layer(named: dict[str, Any], config: ContextParallelConfig) -> None:
    if named["attention_type"] != "self":
        raise ConfigurationError(
            f"a layer of attention type {named['attention_type']!r} with --context-parallel-size "
            f"{config.context_parallel_size}: only self-attention is available; use --context-parallel-size 1."
        )
    if config.attention_mask_type == "causal" and (mask_type := named["attn_mask_type"].name) != "causal":
        raise ConfigurationError(_other_mask_type(mask_type))


def _other_mask_type(mask_type: str) -> str:
    return (
        f"a layer with the mask type {mask_type} and --attention-mask-type causal: they differ; "
        f"use --attention-mask-type general."
    )
