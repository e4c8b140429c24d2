"""Importing this module patches Megatron: put `import mindspeed_cp.megatron_adaptor` at the top of a training script.

Scripts that must stay as they are run under `torchrun ... -m mindspeed_cp script.py <flags>` instead. Programs that use
megatron.core without Megatron's argument parser call `configure` after the import.
"""

import os
import warnings
from dataclasses import fields
from typing import Any, get_args

from packaging.version import Version

from mindspeed_cp.batch import LayoutName
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.kernels import KERNELS
from mindspeed_cp.messages import or_list
from mindspeed_cp.patches import batches
from mindspeed_cp.patches.any_length import any_length_patches, if_unequal, refuse_short
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.attention import attention_patches
from mindspeed_cp.patches.cpu_device import cpu_device_patches
from mindspeed_cp.patches.dataset_helpers import dataset_helper_patches
from mindspeed_cp.patches.documents import document_patches
from mindspeed_cp.patches.dropout import dropout_patches
from mindspeed_cp.patches.dynamic_schedule import dynamic_schedule_patches
from mindspeed_cp.patches.expert_losses import expert_loss_patches
from mindspeed_cp.patches.latent_attention import latent_attention_patches
from mindspeed_cp.patches.latent_travel import latent_travel_patches
from mindspeed_cp.patches.losses import loss_patches
from mindspeed_cp.patches.micro_batch import micro_batch_patches
from mindspeed_cp.patches.packing import Packing
from mindspeed_cp.patches.padding import padding_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.process_groups import process_group_patches
from mindspeed_cp.patches.recomputation import recomputation_patches
from mindspeed_cp.patches.rotary import rotary_patches
from mindspeed_cp.patches.rules import asks_for_cpu
from mindspeed_cp.patches.sft_data import sft_data_patches
from mindspeed_cp.patches.torch_norm import torch_norm_patches
from mindspeed_cp.patching import PatchRegistry

OLDEST_MEGATRON, NEWEST_MEGATRON = "0.16", "0.19"
"""The oldest and the newest release of megatron-core that the patches were tried on."""


def megatron_version() -> str:
    """Version of the megatron.core that is imported, from a wheel or a checkout.

    Raises ImportError where there is none, or one that is too old.
    """
    try:
        from megatron.core.package_info import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"mindspeed_cp.megatron_adaptor patches Megatron, and megatron.core cannot be imported ({error}); install "
            f"megatron-core>={OLDEST_MEGATRON}, or put a Megatron-LM checkout on PYTHONPATH. The attention alone is "
            f"mindspeed_cp.attention."
        ) from error
    if Version(version) < Version(OLDEST_MEGATRON):
        raise ImportError(
            f"megatron-core {version} is too old for mindspeed_cp; install megatron-core>={OLDEST_MEGATRON}."
        )
    return str(version)


def warn_of_newer(version: str) -> None:
    """Say on the first rank that nobody has tried this Megatron yet."""
    if Version(version).release[:2] > Version(NEWEST_MEGATRON).release and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"megatron-core {version} is newer than {NEWEST_MEGATRON}, the newest that mindspeed_cp was tried on; "
            f"compare the losses with those of --context-parallel-size 1 first.",
            stacklevel=2,
        )


def configure(
    *,
    distributed_backend: str = "nccl",
    seed: int = 1234,
    packed_sequence_layout: LayoutName = "zigzag_by_document",
    seq_length: int | None = None,
    **flags: Any,
) -> ContextParallelConfig:
    """Set what the flags set, for programs without Megatron's argument parser.

    To be called before `initialize_model_parallel`. No algorithm is chosen: where none is named, it is Ulysses.
    Documents come as PackedSeqParams.

    distributed_backend: "gloo" on a machine without an accelerator asks for training on the CPU.
    seed: of attention dropout. packed_sequence_layout: how packed streams are dealt to ranks.
    seq_length: tokens of a whole sample, where 2 x CP does not divide them; batches are then cut by shard_batch.
    flags: fields of ContextParallelConfig, which are the flags with underscores:
        `configure(context_parallel_size=4, context_parallel_algo="ulysses_cp_algo")`.

    Raises ValueError where a rule is broken or a name is none of these (ConfigurationError), or a kernel is not there.
    """
    known = [field.name for field in fields(ContextParallelConfig)]
    if unknown := next((name for name in flags if name not in known), None):
        raise ConfigurationError(f"configure() knows no {unknown}; of the flags it takes {or_list(known)}.")
    if packed_sequence_layout not in (layouts := get_args(LayoutName)):
        raise ConfigurationError(
            f"packed_sequence_layout={packed_sequence_layout!r} is unknown; give {or_list(layouts)}."
        )
    config = ContextParallelConfig(**flags)
    if seq_length is not None:
        refuse_short(seq_length, config.context_parallel_size)
    KERNELS.only(config.context_parallel_kernels)
    if asks_for_cpu(distributed_backend):
        use_cpu()
    for sentence in config.ineffective_flags():
        warnings.warn(sentence, stacklevel=2)
    plugin.configure(config, seed=seed, packing=Packing(packed_sequence_layout), length=if_unequal(seq_length, config))
    return config


def shard_batch(batch: dict[str, Any], cp_group: Any = None) -> dict[str, Any]:
    """This rank's part of a batch, for training scripts that do not call Megatron's get_batch_on_this_cp_rank.

    See mindspeed_cp.patches.batches.shard_batch.
    """
    return batches.shard_batch(plugin, batch, cp_group)


def use_cpu() -> None:
    """Let Megatron train on the CPU, see mindspeed_cp.patches.cpu_device."""
    import torch

    cpu_registry.apply()
    # Fused functions of Megatron's are compiled for a GPU; eagerly they run anywhere.
    torch.compiler.set_stance("force_eager")


warn_of_newer(megatron_version())
plugin = Plugin()
cpu_registry = PatchRegistry(cpu_device_patches())
registry = PatchRegistry(
    (
        *argument_patches(plugin, use_cpu),
        *process_group_patches(plugin),
        *attention_patches(plugin),
        *dropout_patches(),
        *latent_attention_patches(),
        *latent_travel_patches(),
        *loss_patches(plugin),
        *micro_batch_patches(plugin),
        *recomputation_patches(plugin),
        *document_patches(plugin),
        *batches.batch_patches(plugin),
        *dynamic_schedule_patches(plugin),
        *rotary_patches(plugin),
        *padding_patches(plugin),
        *any_length_patches(plugin),
        *expert_loss_patches(plugin),
        *sft_data_patches(),
        *torch_norm_patches(),
        *dataset_helper_patches(),
    ),
    in_use=plugin.reason_to_stay,
)
registry.apply()
