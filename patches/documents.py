"""Documents that --reset-attention-mask keeps apart: found in the data, where it is whole, and known in every layer.

No mask is made of them with context parallelism; see packing for the form that they have instead, and stages for their
way to pipeline stages without tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.patches.dynamic_ranks import as_sample
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, bind_by_name


def document_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of Megatron's tokenizer, of the masks that its GPT data sets make, and of the model that is given one."""

    def wrap_build(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _build_tokenizer(*args: Any, **kwargs: Any) -> Any:
            tokenizer = original(*args, **kwargs)
            plugin.end_of_document = _end_of_document(tokenizer)
            return tokenizer

        return _build_tokenizer

    def wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if plugin.stages.at_hand is None and plugin.dynamic is None:
                return original(*args, **kwargs)
            named = bind_by_name(original, args, kwargs)
            if named["attention_mask"] is None:
                # A tensor among the others: a layer that is recomputed gets it again.
                named["attention_mask"] = plugin.stages.at_hand
            if plugin.dynamic is not None:
                named["packed_seq_params"] = as_sample(named["packed_seq_params"])
            return original(**named)

        return forward

    return (
        Patch(
            target="megatron.core.datasets.gpt_dataset:_get_ltor_masks_and_position_ids",
            kind="wrap",
            function=functools.partial(_wrap_masks, plugin),
            parameters=("data", "reset_attention_mask"),
            why="--fix-sub-seq-length makes documents of one length, which Megatron's data sets do not know.",
            remove_when="Documents reach the attention as lengths, and not as a mask, at CP = 1 too.",
        ),
        Patch(
            target="megatron.training.global_vars:_build_tokenizer",
            kind="wrap",
            function=wrap_build,
            needs=("megatron.training",),
            why="Where documents end is read in the tokens, and the tokenizer says which token that is.",
            remove_when="Megatron's data sets give the documents of --reset-attention-mask as lengths.",
        ),
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
            kind="wrap",
            function=wrap_forward,
            parameters=("attention_mask", "packed_seq_params"),
            why="Layers are given the documents in the place of a mask of S x S. And from 0.18 on a document that has "
            "ranks of its own is said to be a packed stream, whose rotary embeddings are those of the static ranks.",
            remove_when="Megatron's data sets give the documents of --reset-attention-mask as lengths.",
        ),
    )


def note_documents(plugin: Plugin, batch: dict[str, Any]) -> None:
    """Find the documents of a batch that has not been cut yet; a later stage's has no tokens."""
    rule = plugin.layer_document_rule
    if rule is not None and batch.get("tokens") is not None:
        plugin.stages.at_hand = rule.find(batch["tokens"], batch["position_ids"], plugin.end_of_document)


def _end_of_document(tokenizer: Any) -> int | None:
    try:
        token: int | None = tokenizer.eod
    except (AttributeError, NotImplementedError):
        return None
    return token


def _wrap_masks(plugin: Plugin, original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(original)
    def _get_ltor_masks_and_position_ids(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        named = bind_by_name(original, args, kwargs)
        length = None if plugin.document_rule is None else plugin.document_rule.length
        if length is None or not named["reset_attention_mask"]:
            return original(*args, **kwargs)
        # These documents are in place of those between the tokens that end one; positions still follow the latter.
        mask, *others = original(**{**named, "reset_attention_mask": False})
        return (mask if mask is None else mask | _apart(mask.size(-1), length), *others)

    return _get_ltor_masks_and_position_ids


def _apart(tokens: int, length: int) -> Tensor:
    """Which tokens are in different documents, [S, S] bool; the last document has what remains."""
    document = torch.arange(tokens) // length
    return document[:, None] != document[None, :]
