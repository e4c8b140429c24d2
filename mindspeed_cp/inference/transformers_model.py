"""Models of transformers whose attention runs over a sharded cache, by transformers' own attention interface.

A model's code stays as it is: it hands queries, keys and values of a layer to a function that is registered by name,
and gets what they have seen. What else a model tells its attention (scale, window, softcap, sinks) comes as arguments;
one that is not known here is refused.

Folders are read from disk alone, see model_folder.py.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.inference.cache import ShardedKVCache
from mindspeed_cp.inference.cached_attention import Decode, Prefill
from mindspeed_cp.inference.interleave import Span
from mindspeed_cp.inference.model_folder import check_folder

NAME = "mindspeed_cp"
"""Of the attention function, in transformers' interface."""

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers that are computed here, and whether they have a window."""

_BESIDE = {"position_ids", "use_cache", "cache_position"}
"""Arguments that say nothing which is not known here."""

_OFF = {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
"""Likewise, where they are False: of others False may say something, as is_causal does."""

_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
"""Rotary embeddings whose frequencies follow the length of the text. transformers finds it anew in each forward pass,
from the positions that it is given: on ranks that have different tokens these are different lengths, and keys in a
cache were turned by earlier ones. So it is set once, for all of a text, see TransformersModel.for_length."""


_OF_THE_PLACE = {"_name_or_path", "transformers_version"}
"""What of a configuration says where it was found, and may differ by rank."""

_SAMPLED = 16
"""Numbers of each parameter, about, by which models are told apart."""


class Heads(NamedTuple):
    """Numbers of query and of key/value heads, and their size."""

    query: int
    kv: int
    size: int


@dataclass(frozen=True)
class TransformersModel:
    """A causal language model of transformers as `Session` takes it, see Model in session.py. Made by `adapt`.

    rotary: embeddings that follow the length of the text, and what transformers calls each of their kinds.
    """

    model: nn.Module
    windows: tuple[int | None, ...]
    rotary: "tuple[tuple[nn.Module, str | dict[str, str]], ...]" = ()
    longest: int | None = None
    """See Model: for models with `rotary` what was given to `for_length`, 0 before."""

    def for_length(self, length: int) -> "TransformersModel":
        """The same model for texts of up to so many positions; earlier ones that it was set for are gone.

        Where rotary embeddings follow the length (dynamic, longrope) they are those of a text of this length, at every
        position: what transformers itself has once it has seen such a text.
        """
        if not self.rotary:
            return self
        for module, kinds in self.rotary:
            layers: tuple[dict[str, str], ...] = ({},)
            if isinstance(kinds, dict):
                layers = tuple({"layer_type": each} for each in kinds)
            module.rope_type = kinds  # type: ignore[assignment]
            x = torch.zeros(1, 1, 1, device=self.device)
            for last in 0, length - 1:  # The first one has it forget what it was set for.
                for layer in layers:
                    module(x, torch.tensor([[last]], device=self.device), **layer)
            # Not of a kind any more that looks at the positions.
            fixed: str | dict[str, str] = {each: "default" for each in kinds} if isinstance(kinds, dict) else "default"
            module.rope_type = fixed  # type: ignore[assignment]
        return replace(self, longest=length)

    @property
    def device(self) -> torch.device:
        """See Model."""
        return next(self.model.parameters()).device

    @property
    def words(self) -> str:
        """See Model: a digest of the configuration, and of some numbers of each parameter."""
        config: Any = self.model.config
        said = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_PLACE}
        flat = (each.detach().reshape(-1) for each in self.model.parameters())
        some = [each[:: max(1, each.numel() // _SAMPLED)].cpu().double().tolist() for each in flat]
        digest = hashlib.blake2b(f"{json.dumps(said, sort_keys=True, default=str)}{some}".encode(), digest_size=8)
        return f"{type(self.model).__name__} ({digest.hexdigest()})"

    @property
    def vocabulary(self) -> int:
        """How many tokens it has an embedding for."""
        model: Any = self.model
        return int(model.get_input_embeddings().num_embeddings)

    @property
    def heads(self) -> Heads:
        """Of a layer's attention."""
        config: Any = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        query = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // query
        return Heads(query, getattr(config, "num_key_value_heads", None) or query, size)

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
    is_causal: bool | None = None,
    cached_attention: Prefill | Decode | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer. query: [B, N, S, D]; key, value: [B, G, S, D]; returns [B, S, N, D].

    Raises ValueError for what it is told and does not know.
    """
    if cached_attention is None:
        raise ValueError(
            f"{type(module).__name__} is not told whose cache its attention by {NAME!r} is over: it is that of a "
            f"Session, and of models that hand their arguments on; elsewhere use set_attn_implementation('sdpa')."
        )
    unknown = {name: said for name, said in others.items() if not _says_nothing(name, said)}
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unknown["is_causal"] = False
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
    return out.transpose(1, 2).contiguous(), None  # There are models that take a view of it.


def _says_nothing(name: str, said: object) -> bool:
    return name in _BESIDE or said is None or (name in _OFF and said is False)


def _spelled(argument: tuple[str, object]) -> str:
    name, said = argument
    return f"{name} {tuple(said.shape)}" if isinstance(said, Tensor) else f"{name}={said!r}"


def adapt(model: Any) -> TransformersModel:
    """A model whose attention runs over a sharded cache from now on.

    model: a PreTrainedModel of transformers with a head for the next token.

    Raises ValueError where layers have no attention, several, or one that the cache cannot serve, and where positions
    do not begin at 0. It is found by two forward passes of a few tokens.
    """
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    windows = layer_windows(config)
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} does not call transformers' attention interface; use a model that does, of the "
            f"Llama, Qwen, Mistral, Gemma or gpt-oss families, say."
        )
    model.config.return_dict = True
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    kinds: list[tuple[nn.Module, Any]] = [(each, getattr(each, "rope_type", None)) for each in model.modules()]
    rotary = tuple((module, kind) for module, kind in kinds if _LENGTH_DEPENDENT_ROPE & _words(kind))
    _try(model.eval(), windows, config)
    return TransformersModel(model, windows, rotary, 0 if rotary else None)


class _Trial(Prefill):
    """Attention of the first tokens of a text, on one rank. Raises ValueError for a layer that comes twice."""

    def __init__(self, windows: tuple[int | None, ...], num_tokens: int, name: str) -> None:
        super().__init__(ShardedKVCache(1, windows), [Span(0, num_tokens)])
        self._seen: set[int] = set()
        self._name = name

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, terms: AttentionTerms) -> Tensor:
        """As Prefill.attend."""
        if layer in self._seen:
            raise ValueError(
                f"{self._name} computes several attentions in layer {layer}, and a sharded cache keeps the keys of "
                f"one; use a model that has one a layer."
            )
        self._seen.add(layer)
        return super().attend(layer, q, k, v, scale, terms)


@torch.no_grad()
def _try(model: Any, windows: tuple[int | None, ...], config: Any) -> None:
    """Raise ValueError for a model that a cache cannot serve, before any prompt: by its answers to a few tokens."""
    name = type(model).__name__
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} looks ahead (is_causal=False in its config.json); use a model that is causal.")
    # Different ones, or positions would not matter where they only turn keys; a padding token may have its own.
    tokens = [token for token in range(4) if token != getattr(config, "pad_token_id", None)][:3]
    try:
        own, given = (
            model(
                input_ids=torch.tensor([tokens], device=model.device),
                use_cache=False,
                cached_attention=_Trial(windows, 3, name),
                **more,
            ).logits
            for more in ({}, {"position_ids": torch.arange(3, device=model.device)[None]})
        )
    except ValueError:
        raise
    except Exception as error:  # It is a model's own code that fails.
        raise ValueError(
            f"{name} fails on three tokens ({type(error).__name__}: {_in_a_line(error)}); look at its config.json, or "
            f"use another model."
        ) from error
    if own.isnan().any():
        raise ValueError(f"{name} gives logits that are no numbers; its weights are broken: get them anew.")
    # The same operations on the same numbers, bit for bit.
    if not torch.allclose(own, given, rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(
            f"{name} numbers positions otherwise than from 0 on, as those of RoBERTa's kind do, and is given these; "
            f"use a model that does."
        )


def _words(kind: object) -> set[str]:
    """The kinds of rotary embeddings of a module: one, or one for each kind of layer."""
    if isinstance(kind, Mapping):
        return set(kind.values())
    return {kind} if isinstance(kind, str) else set()


def _in_a_line(error: Exception) -> str:
    """What it says, up to so many letters."""
    return " ".join((str(error) or type(error).__name__).split())[:_LONGEST_REASON].rstrip(".")


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer, by a PreTrainedConfig.

    Raises ValueError for layers that a cache cannot serve.
    """
    kind = config.model_type
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    if window is not None and window < 1:
        raise ValueError(f"sliding_window={window} of this {kind} model shows no token; get its config.json anew.")
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    for number, layer_type in enumerate(types):
        if layer_type not in _LAYER_TYPES:
            raise ValueError(
                f"layer {number} of this {kind} model is {layer_type}, and a sharded cache serves "
                f"{' and '.join(_LAYER_TYPES)}; use a model of these alone."
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

    Raises ValueError for a folder without config.json, safetensors or tokenizer, whose files are broken or do not fit
    together, or whose code would have to be run.
    """
    from transformers import AutoTokenizer

    check_folder(folder)
    model = _weights(folder, dtype).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_ONLY_WHAT_IS_THERE)
        # Without its files transformers makes one of the model's kind, which knows special tokens alone.
        if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
            raise OSError("no vocabulary")
    except Exception as error:  # The parsers of tokenizers raise no class of their own.
        raise ValueError(
            f"{folder} holds no tokenizer that can be read ({_in_a_line(error)}); add its tokenizer.json."
        ) from error
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")  # The grouped products of others take no fp64.
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{folder}: eos_token_id={ends} of its configuration are no tokens; give their numbers there.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Loaded(adapt(model), tokenizer, frozenset(ends), longest, model.dtype)


_LONGEST_REASON = 300
"""Letters of what a parser says that are passed on."""

_ONLY_WHAT_IS_THERE = {"trust_remote_code": False, "local_files_only": True}


def _weights(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of a folder. Raises ValueError where files are broken, or weights are missing or of other shapes."""
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # They are in the report.
            attn_implementation="eager",  # A config.json may name one to be fetched, with its code.
            output_loading_info=True,
            **_ONLY_WHAT_IS_THERE,
        )
    except Exception as error:  # Parsers of several packages, with classes of their own.
        raise ValueError(
            f"{folder} cannot be loaded by transformers: {_in_a_line(error)}; get its "
            f"config.json and safetensors anew, or use a model that this transformers knows."
        ) from error
    # transformers fills these with random numbers.
    unfit = sorted([*report["missing_keys"], *(str(each[0]) for each in report["mismatched_keys"])])
    if unfit:
        raise ValueError(
            f"{folder}: its safetensors lack {unfit[0]}{f' and {len(unfit) - 1} more' * (len(unfit) > 1)}, or "
            f"have it in another shape than config.json says; get the folder anew."
        )
    strange = sorted(report["unexpected_keys"])
    if strange:
        raise ValueError(
            f"{folder}: its safetensors hold {strange[0]}{f' and {len(strange) - 1} more' * (len(strange) > 1)}, for "
            f"which {type(model).__name__} by config.json has no place; get the folder anew, or, where they are not "
            f"wanted, save the model without them: model.save_pretrained(folder)."
        )
    return model
