"""Torch's norms under sequence parallelism, for machines without TransformerEngine and apex."""

import copy
from typing import Any

from mindspeed_cp.patching import Patch, PatchedCall


def torch_norm_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.transformer.torch_norm."""
    return (
        Patch(
            target="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            kind="around",
            function=_new_norm,
            parameters=("config", "hidden_size", "eps"),
            why="--sequence-parallel needs TransformerEngine's or apex's norms otherwise, and neither runs on a CPU.",
            remove_when="Megatron's WrappedTorchNorm takes sequence_parallel itself.",
            upstream="https://github.com/NVIDIA/Megatron-LM/issues/1448",
        ),
    )


def _new_norm(call: PatchedCall) -> Any:
    config = call["config"]
    if not config.sequence_parallel:
        return call.proceed()
    # Megatron refuses the flag here because nobody marks the weights; a copy without it gets past that.
    config = copy.copy(config)
    config.sequence_parallel = False
    norm = call.proceed(config=config)
    for parameter in norm.parameters():
        # Each tensor-parallel rank norms its own tokens only: Megatron sums the gradients of marked weights.
        parameter.sequence_parallel = True
    return norm
