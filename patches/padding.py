"""Tokens that pad packed streams, as a number in Megatron's log: what is computed and means nothing."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, bind_by_name


def padding_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patch of the function that logs an iteration's losses."""

    def wrap_log(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            count = plugin.padding
            if count is not None and bind_by_name(original, args, kwargs)["iteration"] % count.log_interval == 0:
                said = count.take()
                # Megatron logs on the last rank.
                if dist.get_rank() == dist.get_world_size() - 1:
                    print(said, flush=True)
            return result

        return training_log

    return (
        Patch(
            target="megatron.training.training:training_log",
            kind="wrap",
            function=wrap_log,
            parameters=("iteration",),
            needs=("megatron.training",),
            why="What pads packed streams costs as much as tokens do, and no line says how much of it there is.",
            remove_when="Megatron logs it.",
        ),
    )
