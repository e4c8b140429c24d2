"""Mistakes about packed data, windows and dropout, planted in the library of a process that trains.

Each is made on all ranks alike, as a mistake in the source text would be. Who compares the losses with those of a run
without it sees whether they notice.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_LABELS = ("labels", "loss_mask")


def _ends_off_by_one(without_empty: Callable[[list[int]], tuple[int, ...]]) -> Callable[[list[int]], tuple[int, ...]]:
    def moved(given: list[int]) -> tuple[int, ...]:
        ends = without_empty(given)
        for number in range(1, len(ends) - 1):
            if ends[number + 1] - ends[number] > 1:
                return (*ends[:number], ends[number] + 1, *ends[number + 1 :])
        return ends

    return moved


def _running_on(positions: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of streams: as if a rank's tokens were one stretch; within the positions that there are embeddings for."""

    def run_on(*args: Any) -> Tensor:
        right = positions(*args)
        return (right[0] + torch.arange(len(right), device=right.device)) % (right.max() + 1)

    return run_on


def _cut_as_one_stretch(cut: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Rotary embeddings of samples: those that follow a rank's first."""

    @functools.wraps(cut)
    def run_on(pos_emb: Tensor, seq_dim: int, cp_group: Any) -> Tensor:
        mine = cut(pos_emb, seq_dim, cp_group)
        chunk = pos_emb.size(seq_dim) // (2 * cp_group.size())
        return pos_emb.narrow(seq_dim, cp_group.rank() * chunk, mine.size(seq_dim))

    return run_on


def _embedded_as_one_stretch(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Learned positions: those that follow a rank's first."""

    @functools.wraps(forward)
    def run_on(self: Any, input_ids: Tensor, position_ids: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        following = position_ids[:, :1] + torch.arange(position_ids.size(1), device=position_ids.device)
        return forward(self, input_ids, following.remainder(self.max_sequence_length), *rest, **kwargs)

    return run_on


def _labelled_across(batch: dict[str, Any], ends: list[list[int]]) -> None:
    """The last token of a document is given the label, and its weight, of the next one's first.

    ends: of each sample's documents.
    """
    for name in _LABELS:
        if batch.get(name) is not None:
            whole = batch[name].clone()
            for sample, each in enumerate(ends):
                for end in each[1:-1]:
                    if end < whole.size(1):
                        whole[sample, end - 1] = whole[sample, end]
            batch[name] = whole


def _labelling_streams(cut: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(cut)
    def across(packing: Any, batch: dict[str, Any], cu_seqlens: Tensor, *rest: Any, **kwargs: Any) -> None:
        _labelled_across(batch, [[*packing.ends(cu_seqlens)]])
        cut(packing, batch, cu_seqlens, *rest, **kwargs)

    return across


def _labelling_samples(note: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(note)
    def across(plugin: Any, batch: dict[str, Any]) -> None:
        note(plugin, batch)
        if plugin.stages.at_hand is not None:
            _labelled_across(batch, plugin.stages.at_hand.tolist())

    return across


def _another_seed(draw: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda layer: replace(dropout := draw(layer), seed=dropout.seed + 1)


def _one_token_short(window: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
    def short(*args: Any) -> tuple[int, int]:
        behind, ahead = window(*args)
        return (behind - 1 if behind > 0 else behind), ahead

    return short


def _everybody_has_a_next(has_next: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.ones_like(has_next(*args))


PLANTED: dict[str, tuple[tuple[str, Callable[..., Any]], ...]] = {
    "a document boundary off by one": (("mindspeed_cp.patches.packing._without_empty", _ends_off_by_one),),
    "a window one token short": (("mindspeed_cp.patches.attention._window", _one_token_short),),
    "another dropout seed": (("mindspeed_cp.patches.dropout.LayerDropout.draw", _another_seed),),
    "positions that run on": (
        ("mindspeed_cp.patches.packing._positions", _running_on),
        *(
            (f"megatron.core.models.common.embeddings.{module}.get_pos_emb_on_this_cp_rank", _cut_as_one_stretch)
            for module in ("rotary_pos_embedding", "yarn_rotary_pos_embedding")
        ),
        (
            "megatron.core.models.common.embeddings.language_model_embedding.LanguageModelEmbedding.forward",
            _embedded_as_one_stretch,
        ),
    ),
    "a label shifted across a boundary": (
        ("mindspeed_cp.patches.packing.Packing.cut", _labelling_streams),
        ("mindspeed_cp.patches.batches.note_documents", _labelling_samples),
    ),
    "a second prediction across a boundary": (("mindspeed_cp.patches.losses.has_next", _everybody_has_a_next),),
}
"""By name: what is replaced, and what makes the wrong one of the right one."""


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Within it the library makes that mistake."""
    import mindspeed_cp.megatron_adaptor  # noqa: F401  (the patches take what is there when they are applied)

    with contextlib.ExitStack() as stack:
        for target, wrong in PLANTED[name]:
            module, _, attribute = target.rpartition(".")
            stack.enter_context(mock.patch(target, wrong(getattr(_resolved(module), attribute))))
        yield


def _resolved(path: str) -> Any:
    """A module, or a class of one."""
    import pkgutil

    return pkgutil.resolve_name(path)
