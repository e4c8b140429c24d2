"""Tokens that pad packed streams, as a number in Megatron's log: what is computed and means nothing."""

import functools
from typing import Any

import torch.distributed as dist

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall


def padding_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patch of the function that logs an iteration's losses."""
    return (
        Patch(
            target="megatron.training.training:training_log",
            kind="around",
            function=functools.partial(_training_log, plugin),
            parameters=("iteration",),
            needs=("megatron.training",),
            why="What pads packed streams costs as much as tokens do, and no line says how much of it there is.",
            remove_when="Megatron logs it.",
        ),
    )


def _training_log(plugin: Plugin, call: PatchedCall) -> Any:
    result, count = call.proceed(), plugin.padding
    if count is not None and call["iteration"] % count.log_interval == 0:
        said = count.take()
        # Megatron logs on the last rank.
        if dist.get_rank() == dist.get_world_size() - 1:
            print(said, flush=True)
    return result
