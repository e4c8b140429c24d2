"""Megatron's fine-tuning data set (--sft): packs that are the same whatever the context-parallel size."""

import copy
import functools
from collections.abc import Callable
from typing import Any

from mindspeed_cp.patching import Patch, bind_by_name


def sft_data_patches() -> tuple[Patch, ...]:
    """Patch of megatron.training.datasets.sft_dataset."""

    def wrap_init(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(*args: Any, **kwargs: Any) -> None:
            named = bind_by_name(original, args, kwargs)
            named["config"] = copy.copy(named["config"])
            named["config"].context_parallel_size = 1
            original(**named)

        return __init__

    return (
        Patch(
            target="megatron.training.datasets.sft_dataset:SFTDataset.__init__",
            kind="wrap",
            function=wrap_init,
            parameters=("config",),
            needs=("megatron.training",),
            why="It pads each document to a multiple of 2 x CP and cuts what is too long after that, so that a pack "
            "holds other tokens than with one rank. Documents are cut here in any length.",
            remove_when="Megatron cuts documents of any length.",
        ),
    )
