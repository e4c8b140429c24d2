"""Defaults of Megatron's that fail for want of a package, and what takes their place on a machine without it.

Megatron asks for TransformerEngine's layers and for fused functions of TransformerEngine and apex unless it is told
otherwise. Where they are missing that ends in a traceback while the model is built, at any context-parallel size.
These defaults are set on the parser itself, so that a value that the user names is never replaced, however it is spelt.
A YAML configuration says everything itself and is left alone.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.device import accelerator
from mindspeed_cp.patching import can_be_imported

TRANSFORMER_ENGINE = "transformer_engine.pytorch"
"""What Megatron imports of it; the package itself can be imported where that part does not load."""

_COMPILED = "torch.compile"


class _Default(NamedTuple):
    """A default that takes the place of Megatron's.

    flag: what the user would write. dest, value: what that means among the arguments.
    needs: what Megatron's own default needs, any of these: modules, or "torch.compile", which compiles for NVIDIA GPUs
        what Megatron has for it, and on a CPU runs it eagerly.
    """

    flag: str
    dest: str
    value: Any
    needs: tuple[str, ...]


_DEFAULTS = (
    _Default("--transformer-impl local", "transformer_impl", "local", (TRANSFORMER_ENGINE,)),
    # Torch's norms refuse the persistent kernel; apex's and TransformerEngine's have it or go without.
    _Default("--no-persist-layer-norm", "no_persist_layer_norm", True, (TRANSFORMER_ENGINE, "apex")),
    # The output layer is Megatron's own even beside TransformerEngine's layers, and knows apex's extension alone.
    _Default(
        "--no-gradient-accumulation-fusion",
        "gradient_accumulation_fusion",
        False,
        ("fused_weight_gradient_mlp_cuda",),
    ),
    # TransformerEngine's attention never asks for it.
    _Default(
        "--no-masked-softmax-fusion",
        "masked_softmax_fusion",
        False,
        (TRANSFORMER_ENGINE, "scaled_upper_triang_masked_softmax_cuda"),
    ),
    _Default("--no-rope-fusion", "apply_rope_fusion", False, (TRANSFORMER_ENGINE,)),
    # Compiled by torch. The fused GELU is its tanh approximation, so that an NPU computes another one than a GPU.
    _Default("--no-bias-gelu-fusion", "bias_gelu_fusion", False, (_COMPILED,)),
    _Default("--no-bias-swiglu-fusion", "bias_swiglu_fusion", False, (_COMPILED,)),
    _Default("--no-bias-dropout-fusion", "bias_dropout_fusion", False, (_COMPILED,)),
)

_NEED_TRANSFORMER_ENGINE = ("transformer_engine", "inference_optimized")
"""Values of --transformer-impl."""


def is_here(need: str) -> bool:
    """Whether a module can be imported, or torch compiles for this machine's accelerator."""
    if need == _COMPILED:
        return accelerator() in ("cuda", None)
    return can_be_imported(need)


def _replaced(parser: argparse.ArgumentParser, here: Callable[[str], bool]) -> list[_Default]:
    """The defaults that this machine needs, of those that this release's parser has."""
    known = parser._option_string_actions
    return [each for each in _DEFAULTS if each.flag.split()[0] in known and not any(map(here, each.needs))]


def set_defaults(parser: argparse.ArgumentParser, here: Callable[[str], bool] = is_here) -> None:
    """Give Megatron's parser the defaults with which this machine can train."""
    parser.set_defaults(**{each.dest: each.value for each in _replaced(parser, here)})


def note_on_defaults(
    parser: argparse.ArgumentParser, argv: Sequence[str], here: Callable[[str], bool] = is_here
) -> list[str]:
    """One sentence that lists the defaults that took the place of Megatron's; none where all were named in `argv`."""
    named = {word.partition("=")[0] for word in argv}
    flags = [each.flag for each in _replaced(parser, here) if each.flag.split()[0] not in named]
    if not flags or "--yaml-cfg" in named:
        return []
    of_gelu = ", but for GELU, of which the fused one is an approximation" * ("--no-bias-gelu-fusion" in flags)
    return [
        f"Megatron's defaults that need TransformerEngine, apex or torch.compile give way on this machine to "
        f"{' '.join(flags)}; results are the same{of_gelu}."
    ]


def check_transformer_impl(args: argparse.Namespace, here: Callable[[str], bool] = is_here) -> None:
    """Raise ConfigurationError where layers of TransformerEngine are named, and it cannot be imported."""
    if args.transformer_impl in _NEED_TRANSFORMER_ENGINE and not here(TRANSFORMER_ENGINE):
        raise ConfigurationError(
            f"--transformer-impl {args.transformer_impl} needs TransformerEngine, which cannot be imported; "
            f"use --transformer-impl local, the default without it."
        )
