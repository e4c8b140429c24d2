"""Batches cut for context-parallel ranks: packed streams without TransformerEngine, and documents noted before the cut.

Shapes: B samples, S tokens of a whole sample, T tokens of a whole packed stream.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.patches.any_length import cut_unequal
from mindspeed_cp.patches.documents import note_documents
from mindspeed_cp.patches.dynamic_schedule import cut_document
from mindspeed_cp.patches.packing import cut_samples
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall
from mindspeed_cp.sharding import SequenceLayout

_UTILS = "megatron.core.utils"
_WITHOUT_ENGINE = (
    "Packed streams are cut by an extension of TransformerEngine's, which is CUDA's, and only where the documents' "
    "lengths are multiples of 2 x CP."
)
_DOCUMENTS = "Documents are found in a batch as long as it is whole."
_OLDER_NAMES = tuple(f"megatron.training.{module}:get_batch_on_this_cp_rank" for module in ("utils", "training"))
_REMOVE_WHEN = "Megatron cuts packed streams without TransformerEngine, and gives documents as lengths."


def batch_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the functions of megatron.core.utils that cut batches, which each release has its own of."""

    def patch(
        name: str,
        versions: str,
        cut: Callable[[Plugin, PatchedCall], Any],
        why: str,
        *parameters: str,
        aliases: tuple[str, ...] = (),
    ) -> Patch:
        return Patch(
            target=f"{_UTILS}:{name}",
            kind="around",
            function=functools.partial(cut, plugin),
            parameters=("batch", *parameters),
            aliases=aliases,
            versions=versions,
            why=why,
            remove_when=_REMOVE_WHEN,
        )

    ends = ("cu_seqlens", "cu_seqlens_padded", "cp_size", "cp_rank")
    return (
        patch("get_thd_batch_on_this_cp_rank", "<0.18", _cut_stream_with_params, _WITHOUT_ENGINE, *ends),
        patch("get_batch_on_this_cp_rank", "<0.18", _cut_sample_batch, _DOCUMENTS, "cp_group", aliases=_OLDER_NAMES),
        patch("get_sft_batch_on_this_cp_rank", ">=0.18,<0.19", _cut_stream_batch, _WITHOUT_ENGINE),
        patch("get_pretrain_batch_on_this_cp_rank", ">=0.18,<0.19", _cut_sample_batch, _DOCUMENTS, "cp_group"),
        patch("_get_batch_on_this_cp_rank_per_document_balancing", ">=0.19", _cut_stream_batch, _WITHOUT_ENGINE),
        patch("_get_batch_on_this_cp_rank_per_sequence_balancing", ">=0.19", _cut_sample_batch, _DOCUMENTS, "cp_group"),
    )


def shard_batch(plugin: Plugin, batch: dict[str, Any], cp_group: Any = None) -> dict[str, Any]:
    """This rank's part of a batch; its documents are noted, and reach the layers of its micro-batch.

    batch: Megatron's tensors by name, whole or None: tokens, labels, loss_mask and position_ids [B, S], attention_mask
        [B or 1, N or 1, S, S]; packed streams [1, T] have cu_seqlens, and cu_seqlens_padded if documents are padded.
    cp_group: the ranks that share the one document of the batch, with --hybrid-context-parallel; None for one rank.

    Raises ValueError where cu_seqlens do not end at the stream's length, or 2 x CP does not divide a sample.
    """
    batch = dict(batch)
    if plugin.dynamic is not None:
        if cp_group is not None:
            cut_document(batch, cp_group)
        return batch
    if (cu_seqlens := batch.get("cu_seqlens")) is not None:
        _cut_stream(plugin, batch, cu_seqlens, batch.get("cu_seqlens_padded"))
        return batch
    plugin.note_cut("samples")
    note_documents(plugin, batch)
    rank, size = plugin.place
    if size == 1 or cut_unequal(plugin, batch):
        return batch
    layout = SequenceLayout(size=size)
    cut_samples(batch, lambda tensor, dim: layout.shard(tensor, rank, dim))
    return batch


def _cut_stream(plugin: Plugin, batch: dict[str, Any], cu_seqlens: Tensor, padded: Tensor | None) -> None:
    rank, size = plugin.place
    # A line of the log is about training; what is evaluated in between is not.
    if plugin.padding is not None and torch.is_grad_enabled():
        ends = [plugin.packing.ends(each)[-1] for each in (cu_seqlens, padded) if each is not None]
        plugin.padding.add(ends[-1], ends[-1] - ends[0])
    if size > 1:
        plugin.note_cut("streams")
        plugin.packing.cut(batch, cu_seqlens if padded is None else padded, rank, size)


def _cut_stream_batch(plugin: Plugin, call: PatchedCall) -> dict[str, Any]:
    batch: dict[str, Any] = call["batch"]
    _cut_stream(plugin, batch, batch["cu_seqlens"], batch.get("cu_seqlens_padded"))
    return batch


def _cut_stream_with_params(plugin: Plugin, call: PatchedCall) -> tuple[dict[str, Any], Any]:
    # With one rank it cuts nothing, and says where documents end.
    batch, packed = call.proceed(cp_size=1, cp_rank=0)
    _cut_stream(plugin, batch, call["cu_seqlens"], call["cu_seqlens_padded"])
    return batch, packed


def _cut_sample_batch(plugin: Plugin, call: PatchedCall) -> Any:
    batch: dict[str, Any] = call["batch"]
    if plugin.dynamic is not None:
        cut_document(batch, call["cp_group"])
        return batch
    if batch.get("cu_seqlens") is not None:
        # --dataloader-inter-document-masking: a stream, whose documents may be of any length.
        return _cut_stream_batch(plugin, call)
    plugin.note_cut("samples")
    note_documents(plugin, batch)
    return batch if cut_unequal(plugin, batch) else call.proceed()
