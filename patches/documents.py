"""Documents of one length, whatever the tokens say: --fix-sub-seq-length with --reset-attention-mask."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, bind_by_name


def document_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the masks that Megatron's GPT data sets make."""
    return (
        Patch(
            target="megatron.core.datasets.gpt_dataset:_get_ltor_masks_and_position_ids",
            kind="wrap",
            function=functools.partial(_wrap_masks, plugin),
            parameters=("data", "reset_attention_mask"),
            why="--fix-sub-seq-length makes documents of one length, which Megatron's data sets do not know.",
            remove_when="Documents reach the attention as lengths, and not as a mask.",
        ),
    )


def _wrap_masks(plugin: Plugin, original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    @functools.wraps(original)
    def _get_ltor_masks_and_position_ids(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        named = bind_by_name(original, args, kwargs)
        if plugin.document_length is None or not named["reset_attention_mask"]:
            return original(*args, **kwargs)
        # These documents are in place of those between the tokens that end one; positions still follow the latter.
        mask, *others = original(**{**named, "reset_attention_mask": False})
        return (mask if mask is None else mask | _apart(mask.size(-1), plugin.document_length), *others)

    return _get_ltor_masks_and_position_ids


def _apart(tokens: int, length: int) -> Tensor:
    """Which tokens are in different documents, [S, S] bool; the last document has what remains."""
    document = torch.arange(tokens) // length
    return document[:, None] != document[None, :]
