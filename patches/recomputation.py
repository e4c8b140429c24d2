"""Megatron's activation checkpoints: with --context-parallel-keep-outputs they do not run attention again."""

import argparse
import functools
from typing import Any

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall


def recomputation_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """The patch of the checkpoint that layers and their attention are recomputed in, fully and selectively."""
    return (
        Patch(
            target="megatron.core.tensor_parallel.random:checkpoint",
            aliases=("megatron.core.tensor_parallel:checkpoint",),
            kind="around",
            function=functools.partial(_checkpoint, plugin),
            why="A recomputed layer would send all of its attention again.",
            remove_when="Megatron's checkpoint takes a policy that says what is kept.",
        ),
    )


def _checkpoint(plugin: Plugin, call: PatchedCall) -> Any:
    keeps = plugin.config is not None and plugin.config.context_parallel_keep_outputs
    checkpoint = plugin.recomputation.around(call.original) if keeps else call.original
    return checkpoint(*call.args, **call.kwargs)


def refuse_kept_outputs(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where outputs are to be kept for a recomputation that does not come to attention."""
    if not config.context_parallel_keep_outputs or config.context_parallel_size == 1:
        return
    granularity, modules = recomputed(args)
    if granularity == "full" or (granularity == "selective" and "core_attn" in modules):
        return
    given = "no --recompute-granularity" if granularity is None else f"--recompute-modules {' '.join(modules)}"
    raise ConfigurationError(
        f"--context-parallel-keep-outputs with {given}: no attention is recomputed, and nothing would be kept for it; "
        f"use --recompute-granularity full, or selective with core_attn among --recompute-modules, or leave it out."
    )


def refuse_recomputed_biases(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    """Raise ConfigurationError where Megatron's checkpoint of an MLP would run itself again without end.

    The checkpoint gives the bias itself as a result, which makes its gradient that of the checkpoint: the backward pass
    of the MLP that is run again comes to the bias, and so to the checkpoint.
    """
    granularity, modules = recomputed(args)
    if not config.computes_attention or granularity != "selective" or "mlp" not in modules or not args.add_bias_linear:
        return
    frequency = getattr(args, "moe_layer_freq", 1)
    all_experts = frequency == 1 or (isinstance(frequency, list) and all(frequency))
    if (getattr(args, "num_experts", None) and all_experts) or getattr(args, "fp8", None) or getattr(args, "fp4", None):
        return  # No layer has an MLP of its own, or the checkpoint is TransformerEngine's.
    raise ConfigurationError(
        f"--recompute-modules {' '.join(modules)} with biases: Megatron's checkpoint of an MLP gives its bias away, "
        f"whose gradient then runs the checkpoint again without end, at CP = 1 too; add --disable-bias-linear, or "
        f"leave mlp out of --recompute-modules."
    )


def recomputed(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Whether layers are recomputed in full or some of their modules, and which; as validate_args will have it."""
    granularity = "selective" if getattr(args, "recompute_activations", False) else args.recompute_granularity
    return granularity, getattr(args, "recompute_modules", None) or ["core_attn"]
