"""Process groups: built when Megatron builds its own, gone when Megatron destroys them."""

import functools
from datetime import timedelta
from typing import Any

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall

PARALLEL_STATE = "megatron.core.parallel_state"

_OF_MEGATRON = {
    "cp": "get_context_parallel_group",
    "dp": "get_data_parallel_group",
    "tp": "get_tensor_model_parallel_group",
}
"""Who gives Megatron's group along an axis, by the name that the axis has among a layer's process groups."""


def process_group_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of megatron.core.parallel_state."""
    return (
        Patch(
            target=f"{PARALLEL_STATE}:initialize_model_parallel",
            kind="around",
            function=functools.partial(_initialize_model_parallel, plugin),
            parameters=("context_parallel_size", "distributed_timeout_minutes"),
            why="The grid's groups have to be built by all ranks at once, over the ranks that Megatron chose.",
            remove_when="Megatron takes a hook that runs after its groups are made.",
        ),
        Patch(
            target=f"{PARALLEL_STATE}:destroy_model_parallel",
            kind="around",
            function=functools.partial(_destroy_model_parallel, plugin),
            aliases=("megatron.training.training:destroy_model_parallel",),
            why="Groups that outlive Megatron's would be used by the next model that is built.",
            remove_when="initialize_model_parallel needs no patch.",
        ),
    )


def _initialize_model_parallel(plugin: Plugin, call: PatchedCall) -> None:
    _check_size(plugin, call["context_parallel_size"])
    call.proceed()
    # Taken from Megatron, never recomputed: the order of the axes is an argument of its own.
    from megatron.core import parallel_state

    timeout = timedelta(minutes=call["distributed_timeout_minutes"])
    plugin.build_groups(parallel_state.get_context_parallel_group(), timeout)
    if plugin.dynamic is not None:
        plugin.dynamic.build(parallel_state.get_data_parallel_group(with_context_parallel=True), timeout)
    plugin.join_pipeline(parallel_state.get_pipeline_model_parallel_group())


def _destroy_model_parallel(plugin: Plugin, call: PatchedCall) -> None:
    plugin.drop_groups()
    call.proceed()


def _check_size(plugin: Plugin, context_parallel_size: int) -> None:
    configured = 1 if plugin.config is None else plugin.config.context_parallel_size
    if context_parallel_size > 1 and plugin.config is None:
        raise ConfigurationError(
            f"initialize_model_parallel(context_parallel_size={context_parallel_size}) before mindspeed_cp was "
            f"configured; call mindspeed_cp.megatron_adaptor.configure("
            f"context_parallel_size={context_parallel_size}, ...) first."
        )
    if context_parallel_size != configured:
        raise ConfigurationError(
            f"initialize_model_parallel(context_parallel_size={context_parallel_size}) after mindspeed_cp was "
            f"configured with context_parallel_size={configured}; give both the same."
        )


def layer_group(pg_collection: Any, axis: str) -> Any:
    """A layer's own group along an axis where it was given one, else Megatron's.

    pg_collection: the layer's process groups, or None. axis: "cp", "dp" or "tp".
    """
    group = getattr(pg_collection, axis, None)
    if group is None:
        from megatron.core import parallel_state

        group = getattr(parallel_state, _OF_MEGATRON[axis])()
    return group
