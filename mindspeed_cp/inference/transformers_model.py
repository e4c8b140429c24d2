"""Models of transformers whose attention runs over a sharded cache, by transformers' own attention interface.

A model's code stays as it is: it hands queries, keys and values of a layer to a function that is registered by name,
and gets what they have seen. What else a model tells its attention (scale, window, softcap, sinks) comes as arguments;
one that is not known here is refused.

Folders are read from disk alone: config.json, safetensors, a tokenizer. No pickle is loaded, and no code of a folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.inference.cached_attention import Decode, Prefill

NAME = "mindspeed_cp"
"""Of the attention function, in transformers' interface."""

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers that are computed here, and whether they have a window."""

_BESIDE = {"position_ids", "use_cache", "cache_position"}
"""Arguments that say nothing which is not known here."""

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies follow the length: keys in a cache would have been turned by others."""


@dataclass(frozen=True)
class TransformersModel:
    """A causal language model of transformers as `Session` takes it, see Model in session.py. Made by `adapt`."""

    model: nn.Module
    windows: tuple[int | None, ...]

    @property
    def device(self) -> torch.device:
        """See Model."""
        return next(self.model.parameters()).device

    def __call__(self, tokens: Tensor, positions: Tensor, attention: Prefill | Decode, rows: Tensor) -> Tensor:
        """See Model."""
        logits: Tensor = self.model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=rows,
            cached_attention=attention,
        ).logits
        return logits


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cached_attention: Prefill | Decode | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer. query: [B, N, S, D]; key, value: [B, G, S, D]; returns [B, S, N, D].

    Raises ValueError for what it is told and does not know.
    """
    if cached_attention is None:
        raise ValueError(f"attention by {NAME!r} is that of a Session; elsewhere use set_attn_implementation('sdpa').")
    unknown = {name: said for name, said in others.items() if not (name in _BESIDE or said is None or said is False)}
    if attention_mask is not None:
        unknown["attention_mask"] = attention_mask
    if dropout:
        unknown["dropout"] = dropout
    if unknown:
        raise ValueError(
            f"{type(module).__name__} tells its attention {', '.join(map(_spelled, unknown.items()))}, which is not "
            f"computed over a sharded cache; use a model without it."
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    cached_attention.refuse_window(layer, sliding_window)
    out = cached_attention.attend(layer, query, key, value, scale, AttentionTerms(sinks=s_aux, softcap=softcap))
    return out.transpose(1, 2), None


def _spelled(argument: tuple[str, object]) -> str:
    name, said = argument
    return f"{name} {tuple(said.shape)}" if isinstance(said, Tensor) else f"{name}={said!r}"


def adapt(model: Any) -> TransformersModel:
    """A model whose attention runs over a sharded cache from now on.

    model: a PreTrainedModel of transformers with a head for the next token.

    Raises ValueError where layers have no attention, or one that the cache cannot serve.
    """
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    windows = layer_windows(config)
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} does not call transformers' attention interface; use a model that does, of the "
            f"Llama, Qwen, Mistral, Gemma or gpt-oss families, say."
        )
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    return TransformersModel(model.eval(), windows)


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer, by a PreTrainedConfig.

    Raises ValueError for layers, or rotary embeddings, that a cache cannot serve.
    """
    kind = config.model_type
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    for number, layer_type in enumerate(types):
        if layer_type not in _LAYER_TYPES:
            raise ValueError(
                f"layer {number} of this {kind} model is {layer_type}, and a sharded cache serves "
                f"{' and '.join(_LAYER_TYPES)}; use a model of these alone."
            )
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for each in (rotary, *rotary.values()):
        rope = each.get("rope_type") if isinstance(each, Mapping) else None
        if rope in _LENGTH_DEPENDENT_ROPE:
            raise ValueError(
                f"rope_type={rope!r} of this {kind} model turns tokens by how long the sequence is, and keys in a "
                f"cache were turned before that was known; use one of another, 'yarn' or 'llama3', say."
            )
    return tuple(window if _LAYER_TYPES[each] else None for each in types)


class Loaded(NamedTuple):
    """What a folder holds.

    tokenizer: of transformers. ends: tokens that end a sequence. longest: positions of the model; None where open.
    """

    model: TransformersModel
    tokenizer: Any
    ends: frozenset[int]
    longest: int | None
    dtype: torch.dtype


def load(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Loaded:
    """A model and its tokenizer from a folder. dtype: of the weights; what the folder says by default.

    Raises ValueError for a folder without config.json, safetensors or tokenizer, or whose code would have to be run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_folder(folder)
    only_what_is_there = {"trust_remote_code": False, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto" if dtype is None else dtype, use_safetensors=True, **only_what_is_there
    ).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **only_what_is_there)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {folder} holds no tokenizer that can be read; add its tokenizer.json.") from error
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # The grouped products of others take no fp64.
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Loaded(adapt(model), tokenizer, frozenset(ends), longest, model.dtype)


def check_folder(folder: Path) -> None:
    """Raise ValueError unless a folder holds a model that can be loaded without running anything of it."""
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"--model {folder} holds no config.json; give the folder of a Hugging Face model.")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        found = f"{pickles[0]}, a pickle, which may run code" if pickles else "no weights"
        raise ValueError(
            f"--model {folder} holds {found}, and only safetensors are loaded; get it as safetensors, or convert it "
            f"where you trust it: model.save_pretrained(folder)."
        )
    said: dict[str, Any] = json.loads(config.read_text())
    if "auto_map" in said:
        raise ValueError(
            f"--model {folder} comes with code of its own (auto_map in config.json), which is not run; use a model "
            f"whose code is in transformers."
        )
