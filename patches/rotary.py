"""Rotary embeddings: for as many positions as there are, and by those that this rank's tokens have in their documents.

Shapes: t tokens of this rank, T of the whole stream, N heads, D head size, R rotated part of it.
"""

import functools
from typing import Any

from torch import Tensor

from mindspeed_cp.patches.packing import Packing, is_stream
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall

_EMBEDDINGS = "megatron.core.models.common.embeddings"
_ROPE = f"{_EMBEDDINGS}.rope_utils"
_PASSED_ON = ("rotary_interleaved", "mla_rotary_interleaved", "multi_latent_attention", "mscale")
"""What says how to rotate; one of those in the middle has a new name since 0.18."""


def rotary_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of what apply_rotary_pos_emb does with packed streams, under latent attention and YaRN too, and of how
    many positions there are embeddings for.
    """
    return (
        Patch(
            target=f"{_ROPE}:_apply_rotary_pos_emb_thd",
            kind="around",
            function=functools.partial(_apply_to_stream, plugin),
            aliases=(f"{_EMBEDDINGS}.rotary_pos_embedding:_apply_rotary_pos_emb_thd",),
            parameters=("t", "cu_seqlens", "freqs", "cp_group"),
            why="It takes every document to be cut as a zigzag of its own, in lengths that 2 x CP divides: under "
            "--dataloader-inter-document-masking positions were silently wrong.",
            remove_when="Megatron gives the positions of the tokens at hand.",
        ),
        Patch(
            target=f"{_EMBEDDINGS}.rotary_pos_embedding:RotaryEmbedding.get_rotary_seq_len",
            kind="around",
            function=functools.partial(_num_positions, plugin),
            parameters=("inference_context", "packed_seq_params"),
            why="It takes the other ranks to have as many tokens as this one, and a program's max_seqlen to count what "
            "pads the documents.",
            remove_when="Megatron finds the longest document itself, and takes sequences that 2 x CP does not divide.",
        ),
    )


def _num_positions(plugin: Plugin, call: PatchedCall) -> int:
    packed, length = call["packed_seq_params"], plugin.length
    if call["inference_context"] is None:
        if packed is not None and is_stream(packed):
            return plugin.packing.num_positions(packed)
        if packed is None and length is not None:
            return length
    return int(call.proceed())


def _apply_to_stream(plugin: Plugin, call: PatchedCall) -> Tensor:
    group = call["cp_group"]
    if group is None or group.size() == 1:
        # 0.16 hands on what its batches have, [1, n], and reads one end from it.
        rotated: Tensor = call.proceed(cu_seqlens=call["cu_seqlens"].flatten())
        return rotated
    return _rotated(plugin.packing, call.named)


def _rotated(packing: Packing, named: dict[str, Any]) -> Tensor:
    """This rank's tokens of a stream [t, N, D], rotated by their positions in their documents.

    named: the arguments of _apply_rotary_pos_emb_thd. Raises ValueError where a document has more tokens than there are
    embeddings.
    """
    from megatron.core.models.common.embeddings import rope_utils

    t, freqs, group = named["t"], named["freqs"], named["cp_group"]
    if (longest := packing.longest(named["cu_seqlens"])) > freqs.size(0):
        raise ValueError(
            f"rotary embeddings of {freqs.size(0)} positions, and the longest document has {longest} tokens "
            f"with what pads it; make as many, as Megatron's get_rotary_seq_len says."
        )
    positions = packing.positions(named["cu_seqlens"], group.rank(), group.size(), t, freqs.size(0))
    passed_on = {name: named[name] for name in _PASSED_ON if name in named}
    freqs = freqs.index_select(0, positions)
    rotated: Tensor = rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, **passed_on)
    return rotated.squeeze(1)
