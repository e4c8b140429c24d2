"""Megatron's schedule of documents that each have ranks of their own: what its data loader and its steps lose.

Shapes: L tokens of a document.
"""

import functools
from collections import Counter
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from mindspeed_cp.patches.losses import summed_reports
from mindspeed_cp.patches.packing import cut_samples, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall
from mindspeed_cp.sharding import shard

_WRAPPER = "megatron.core.datasets.data_schedule:HybridCPDataLoaderWrapper"


def dynamic_schedule_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of what --hybrid-context-parallel goes through, beside the cut of the batch (patches/batches.py)."""
    return (
        Patch(
            target=f"{_WRAPPER}.__next__",
            kind="around",
            function=_next_documents,
            why="It drops where a document ends: tensor-parallel ranks wait for a length that the first does not send, "
            "and from 0.18 on get_batch tells no layer the document's own ranks, and wants a batch dimension.",
            remove_when="HybridCPDataLoaderWrapper gives each document its cu_seqlens and max_seqlen.",
        ),
        Patch(
            target=f"{_WRAPPER}.__iter__",
            kind="around",
            function=_iterate,
            why="A training step asserts that its iterator can be replayed, unless --rerun-mode disabled.",
            remove_when="train() wraps it as it does other iterators.",
        ),
        Patch(
            target="megatron.core.pipeline_parallel.hybrid_cp_schedule:hybrid_context_parallel_forward_backward",
            kind="around",
            function=functools.partial(_run_schedule, plugin),
            parameters=("forward_only", "collect_non_loss_data"),
            aliases=("megatron.core.pipeline_parallel.schedules:hybrid_context_parallel_forward_backward",),
            why="Evaluation with --sft is a mean of ranks' means of their parts of documents: each weighs the same, "
            "however many tokens it has.",
            remove_when="Megatron's evaluation divides by the tokens of all ranks with --sft too.",
        ),
        Patch(
            target="megatron.training.training:evaluate",
            kind="around",
            function=functools.partial(_evaluate, plugin),
            parameters=("data_iterator", "config"),
            needs=("megatron.training",),
            why="Megatron schedules the documents of training data alone, and evaluates by the schedule all the same.",
            remove_when="Megatron wraps the iterators of validation and test data too.",
        ),
    )


def _next_documents(call: PatchedCall) -> tuple[Any, Any]:
    documents, who = call.proceed()
    if documents is None:
        return documents, who
    from megatron.core import __version__

    with_batch_dim = Version(__version__) >= Version("0.18")
    num_ranks = Counter(number for group in who for numbers in group for number in numbers)
    whole = {
        number: _whole(_padded(document, num_ranks[number]), with_batch_dim) for number, document in documents.items()
    }
    return _Documents(whole), who


def _iterate(call: PatchedCall) -> Any:
    from megatron.core.rerun_state_machine import RerunDataIterator

    wrapper = call.instance
    if isinstance(wrapper.data_iterator, RerunDataIterator):
        # It would keep all batches for a replay: nobody tells it which steps are over.
        wrapper.data_iterator = wrapper.data_iterator.iterable
    return RerunDataIterator(call.proceed())


def _run_schedule(plugin: Plugin, call: PatchedCall) -> tuple[Any, Any]:
    reports, total_num_tokens = call.proceed()
    if call["forward_only"] and not call["collect_non_loss_data"] and plugin.dynamic is not None:
        reports = [summed_reports(reports, plugin.dynamic.everyone)]
    return reports, total_num_tokens


def _evaluate(plugin: Plugin, call: PatchedCall) -> Any:
    if plugin.dynamic is None:
        return call.proceed()
    from megatron.core.datasets.data_schedule import HybridCPDataLoaderWrapper

    return call.proceed(data_iterator=HybridCPDataLoaderWrapper(call["data_iterator"], call["config"]))


class _Documents(dict[int, dict[str, Tensor]]):
    """Documents by number. Whoever takes one gets a copy, as get_batch writes what it has cut into it: a step that is
    replayed takes the same again."""

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return dict(super().__getitem__(number))


def cut_document(batch: dict[str, Any], group: Any) -> None:
    """Replace what lies along a document by this rank's tokens.

    batch: see packing.cut_samples. group: the ranks that share the document.
    """
    length = next(tensor.size(1) for tensor in (batch.get("tokens"), batch.get("labels")) if tensor is not None)
    layout = layout_of_length(length, group.size())
    cut_samples(batch, lambda tensor, dim: shard(tensor, layout, group.rank(), dim))


def _padded(document: dict[str, Tensor], num_ranks: int) -> dict[str, Tensor]:
    """A document [L] that has a token for each of its ranks: what is added counts in no loss, and nobody sees it.

    A short one may have many ranks where others would have nothing to do, and Megatron's layers take no empty shard.
    """
    missing = num_ranks - document["tokens"].size(0)
    if missing <= 0:
        return document
    padded = {name: torch.cat([tensor, tensor[-1:].expand(missing)]) for name, tensor in document.items()}
    padded["loss_mask"][-missing:] = 0
    padded["position_ids"][-missing:] += torch.arange(1, missing + 1, device=padded["position_ids"].device)
    return padded


def _whole(document: dict[str, Tensor], with_batch_dim: bool) -> dict[str, Tensor]:
    """A document [L] with where it ends, as get_batch has that of samples: cu_seqlens [1, 2] and max_seqlen [1]."""
    tokens = document["tokens"]
    length = tokens.new_tensor([tokens.size(0)], dtype=torch.int32)
    if with_batch_dim:
        document = {name: tensor[None] for name, tensor in document.items()}
    return document | {"cu_seqlens": torch.cat([torch.zeros_like(length), length])[None], "max_seqlen": length}
