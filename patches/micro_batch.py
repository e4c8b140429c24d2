"""What goes with one micro-batch through a pipeline stage: its documents, and that its ranks agree on it once."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_WITH_MODEL_TYPE = 5
"""Arguments of a backward step that is told the type of the model."""


def micro_batch_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the passes of one micro-batch through one pipeline stage, virtual ones too.

    All context-parallel ranks of a stage go through them in the same order, so that each begins and ends at the same
    place on all of them. What does not go through them (a schedule of its own, a model that is called directly) agrees
    in every layer.
    """

    why = (
        "All layers of a stage get the tensors of one micro-batch: ranks compare what they have come with once for all "
        "of them (once more where layers differ among themselves, and for a recomputation)."
    )
    remove_when = "Megatron tells its layers which micro-batch they compute."
    return (
        Patch(
            target=f"{_SCHEDULES}:forward_step",
            kind="around",
            function=functools.partial(_forward_step, plugin),
            parameters=("config", "current_microbatch", "vp_stage"),
            why=f"{why} And the documents of a micro-batch are known in the first stage alone.",
            remove_when=remove_when,
        ),
        Patch(
            target=f"{_SCHEDULES}:backward_step",
            kind="wrap",
            function=functools.partial(_wrap_backward_step, plugin),
            why=f"{why} And hybrid_context_parallel_forward_backward of 0.17 and 0.18 gives it the type of the model, "
            "which it takes no longer.",
            remove_when=remove_when,
        ),
    )


def _forward_step(plugin: Plugin, call: PatchedCall) -> Any:
    parts = call["config"].virtual_pipeline_model_parallel_size or 1
    is_first = not call["current_microbatch"]
    with plugin.one_micro_batch(), _documents(plugin, call["vp_stage"] or 0, parts, is_first):
        return call.proceed()


def _wrap_backward_step(plugin: Plugin, original: Callable[..., Any]) -> Callable[..., Any]:
    takes_model_type = "model_type" in inspect.signature(original).parameters

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        if len(args) == _WITH_MODEL_TYPE and not takes_model_type:
            *tensors, _, config = args
            args = (*tensors, config)
        with plugin.one_micro_batch():
            return original(*args, **kwargs)

    return backward_step


def _documents(plugin: Plugin, part: int, num_parts: int, is_first: bool) -> AbstractContextManager[None]:
    if plugin.layer_document_rule is None:
        return nullcontext()
    return plugin.stages.one_micro_batch(part, num_parts, is_first=is_first)
