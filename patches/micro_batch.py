"""Ranks agree on the shapes of a micro-batch once, in the first layer that it reaches, and not again in every layer."""

import functools
from collections.abc import Callable
from typing import Any

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"


def micro_batch_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of the passes of one micro-batch through one pipeline stage, virtual ones too.

    All context-parallel ranks of a stage go through them in the same order, so that each begins and ends at the same
    place on all of them. What does not go through them (a schedule of its own, a model that is called directly) agrees
    in every layer.
    """

    def wrap_step(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            with plugin.one_micro_batch():
                return original(*args, **kwargs)

        return step

    return tuple(
        Patch(
            target=f"{_SCHEDULES}:{name}",
            kind="wrap",
            function=wrap_step,
            why="All layers of a stage get the tensors of one micro-batch: ranks compare what they have come with once "
            "for all of them (once more where layers differ among themselves, and for a recomputation).",
            remove_when="Megatron tells its layers which micro-batch they compute.",
        )
        for name in ("forward_step", "backward_step")
    )
