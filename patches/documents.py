"""Documents that --reset-attention-mask keeps apart: found in the data, where it is whole, and known in every layer.

No mask is made of them with context parallelism; see packing for the form that they have instead, and stages for their
way to pipeline stages without tokens.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.patches.dynamic_ranks import as_sample
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall


def document_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of Megatron's tokenizer, of the masks that its GPT data sets make, and of the model that is given one."""
    return (
        Patch(
            target="megatron.core.datasets.gpt_dataset:_get_ltor_masks_and_position_ids",
            kind="around",
            function=functools.partial(_make_masks, plugin),
            parameters=("reset_attention_mask",),
            why="--fix-sub-seq-length makes documents of one length, which Megatron's data sets do not know.",
            remove_when="Documents reach the attention as lengths, and not as a mask, at CP = 1 too.",
        ),
        Patch(
            target="megatron.training.global_vars:_build_tokenizer",
            kind="around",
            function=functools.partial(_build_tokenizer, plugin),
            needs=("megatron.training",),
            why="Where documents end is read in the tokens, and the tokenizer says which token that is.",
            remove_when="Megatron's data sets give the documents of --reset-attention-mask as lengths.",
        ),
        Patch(
            target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
            kind="around",
            function=functools.partial(_forward, plugin),
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


def _build_tokenizer(plugin: Plugin, call: PatchedCall) -> Any:
    tokenizer = call.proceed()
    plugin.end_of_document = _end_of_document(tokenizer)
    return tokenizer


def _forward(plugin: Plugin, call: PatchedCall) -> Any:
    """The forward pass of a GPTModel."""
    if plugin.stages.at_hand is None and plugin.dynamic is None:
        return call.proceed()
    mask, packed = call["attention_mask"], call["packed_seq_params"]
    return call.proceed(
        # A tensor among the others: a layer that is recomputed gets it again.
        attention_mask=plugin.stages.at_hand if mask is None else mask,
        packed_seq_params=packed if plugin.dynamic is None else as_sample(packed),
    )


def _end_of_document(tokenizer: Any) -> int | None:
    try:
        token: int | None = tokenizer.eod
    except (AttributeError, NotImplementedError):
        return None
    return token


def _make_masks(plugin: Plugin, call: PatchedCall) -> tuple[Any, ...]:
    length = None if plugin.document_rule is None else plugin.document_rule.length
    if length is None or not call["reset_attention_mask"]:
        made: tuple[Any, ...] = call.proceed()
        return made
    # These documents are in place of those between the tokens that end one; positions still follow the latter.
    mask, *others = call.proceed(reset_attention_mask=False)
    return (mask if mask is None else mask | _apart(mask.size(-1), length), *others)


def _apart(tokens: int, length: int) -> Tensor:
    """Which tokens are in different documents, [S, S] bool; the last document has what remains."""
    document = torch.arange(tokens) // length
    return document[:, None] != document[None, :]
