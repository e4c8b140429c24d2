"""Megatron's fine-tuning data set (--sft): packs that are the same whatever the context-parallel size."""

import copy

from mindspeed_cp.patching import Patch, PatchedCall


def sft_data_patches() -> tuple[Patch, ...]:
    """Patch of megatron.training.datasets.sft_dataset."""
    return (
        Patch(
            target="megatron.training.datasets.sft_dataset:SFTDataset.__init__",
            kind="around",
            function=_init,
            parameters=("config",),
            needs=("megatron.training",),
            why="It pads each document to a multiple of 2 x CP and cuts what is too long after that, so that a pack "
            "holds other tokens than with one rank. Documents are cut here in any length.",
            remove_when="Megatron cuts documents of any length.",
        ),
    )


def _init(call: PatchedCall) -> None:
    config = copy.copy(call["config"])
    config.context_parallel_size = 1
    call.proceed(config=config)
