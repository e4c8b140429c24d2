"""Rotary embeddings of packed streams: by the positions that this rank's tokens have in their documents.

Shapes: t tokens of this rank, T of the whole stream, N heads, D head size, R rotated part of it.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, bind_by_name

_ROPE = "megatron.core.models.common.embeddings.rope_utils"
_PASSED_ON = ("rotary_interleaved", "mla_rotary_interleaved", "multi_latent_attention", "mscale")
"""What says how to rotate; one of those in the middle has a new name since 0.18."""


def rotary_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patch of what apply_rotary_pos_emb does with packed streams, under latent attention and YaRN too."""

    def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def _apply_rotary_pos_emb_thd(*args: Any, **kwargs: Any) -> Tensor:
            named = bind_by_name(original, args, kwargs)
            t, freqs, group = named["t"], named["freqs"], named["cp_group"]
            if group is None or group.size() == 1:
                # 0.16 hands on what its batches have, [1, n], and reads one end from it.
                return original(**{**named, "cu_seqlens": named["cu_seqlens"].flatten()})
            from megatron.core.models.common.embeddings import rope_utils

            rank, size = group.rank(), group.size()
            # Frequencies for each token of the stream are Megatron's second form: positions that do not begin anew.
            positions = plugin.packing.positions(
                named["cu_seqlens"], rank, size, t, over_stream=freqs.size(0) == t.size(0) * size
            )
            passed_on = {name: named[name] for name in _PASSED_ON if name in named}
            freqs = freqs.index_select(0, positions)
            rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **passed_on)
            return rotated.squeeze(1)

        return _apply_rotary_pos_emb_thd

    return (
        Patch(
            target=f"{_ROPE}:_apply_rotary_pos_emb_thd",
            kind="wrap",
            function=wrap,
            aliases=("megatron.core.models.common.embeddings.rotary_pos_embedding:_apply_rotary_pos_emb_thd",),
            parameters=("t", "cu_seqlens", "freqs", "cp_group"),
            why="It takes every document to be cut as a zigzag of its own, in lengths that 2 x CP divides: under "
            "--dataloader-inter-document-masking positions were silently wrong.",
            remove_when="Megatron gives the positions of the tokens at hand.",
        ),
    )
