"""Torch's norms under sequence parallelism, for machines without TransformerEngine and apex."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from mindspeed_cp.patching import Patch, bind_by_name


def torch_norm_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.transformer.torch_norm."""

    def wrap_new(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __new__(*args: Any, **kwargs: Any) -> Any:
            named = bind_by_name(original, args, kwargs)
            config = named["config"]
            if not config.sequence_parallel:
                return original(*args, **kwargs)
            # Megatron refuses the flag here because nobody marks the weights; a copy without it gets past that.
            named["config"] = copy.copy(config)
            named["config"].sequence_parallel = False
            norm = original(**named)
            for parameter in norm.parameters():
                # Each tensor-parallel rank norms its own tokens only: Megatron sums the gradients of marked weights.
                parameter.sequence_parallel = True
            return norm

        return __new__

    return (
        Patch(
            target="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            kind="wrap",
            function=wrap_new,
            parameters=("config", "hidden_size", "eps"),
            why="--sequence-parallel needs TransformerEngine's or apex's norms otherwise, and neither runs on a CPU.",
            remove_when="Megatron's WrappedTorchNorm takes sequence_parallel itself.",
            upstream="https://github.com/NVIDIA/Megatron-LM/issues/1448",
        ),
    )
