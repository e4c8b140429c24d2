"""What parsed arguments come to: the configuration that they describe, the rules that they break, and notes on them."""

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from mindspeed_cp.choice import Choice
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.device import accelerator
from mindspeed_cp.messages import divisors, or_list
from mindspeed_cp.patches.algorithm import choose_algorithm, dynamic_start_line, start_line
from mindspeed_cp.patches.any_length import refuse_length, sample_length
from mindspeed_cp.patches.blockers import (
    Blocker,
    UnknownValueError,
    blockers_of,
    found_by,
    none_for_unknown,
    raise_for,
)
from mindspeed_cp.patches.defaults import check_transformer_impl
from mindspeed_cp.patches.dynamic_rules import as_documents, dynamic_blockers, num_dynamic_ranks, over_all
from mindspeed_cp.patches.kernel_forecast import check_kernels, kernel_names, kernel_notes
from mindspeed_cp.patches.latent_travel import latent_blockers, latent_notes
from mindspeed_cp.patches.recomputation import refuse_kept_outputs, refuse_recomputed_biases
from mindspeed_cp.patches.unsupported import (
    difference_notes,
    note_on_windows_across_documents,
    refuse_dropout_rate,
    refuse_lost_documents,
    refuse_mask_beside_window,
    refuse_unloadable_optimizer,
    refuse_unwatched_scores,
    unsupported,
)


class Settled(NamedTuple):
    """The configuration that parsed arguments describe, and why it has its algorithm where they name none.

    dynamic: of a document that has all ranks, where each document has ranks of its own.
    """

    config: ContextParallelConfig
    choice: Choice | None
    dynamic: ContextParallelConfig | None = None

    def start_lines(self, args: argparse.Namespace) -> list[str]:
        """What a job says at its start of how its attention is computed; nothing where it is Megatron's own."""
        if self.dynamic is not None:
            return [dynamic_start_line(self.dynamic, self.choice, kernel_names(args, self.dynamic, _device(args)))]
        if self.config.context_parallel_size == 1:
            return []
        return [start_line(self.config, self.choice, kernel_names(args, self.config, _device(args)))]


def settled(
    args: argparse.Namespace, defaults: Mapping[str, object] = MappingProxyType({}), *, at_start: bool = False
) -> Settled:
    """The configuration that parsed arguments describe; the algorithm that was chosen is written into them.

    defaults: see unsupported. at_start: whether the job starts on this machine now.

    Raises ConfigurationError with all rules that they break.
    """
    found, blockers = examine_arguments(args, defaults, at_start=at_start)
    raise_for(blockers)
    assert found is not None, "there is a configuration, or a rule that it breaks"
    args.context_parallel_algo = found.config.context_parallel_algo
    args.ulysses_degree_in_cp = found.config.ulysses_degree_in_cp
    return found


def examine_arguments(
    args: argparse.Namespace, defaults: Mapping[str, object] = MappingProxyType({}), *, at_start: bool = False
) -> tuple[Settled | None, list[Blocker]]:
    """The configuration that parsed arguments describe, and all that stands in its way; None where it has no form.

    defaults: see unsupported. at_start: whether the job starts on this machine now.
    """
    if broken := _broken_sizes(args):
        return None, broken
    of_ranks = found_by(
        lambda: _check_world_size(args), lambda: _check_connections(args), lambda: check_transformer_impl(args)
    )
    if at_start:
        of_ranks += found_by(lambda: asks_for_cpu(args.distributed_backend))
    of_options = found_by(
        lambda: raise_for(unsupported(none_for_unknown(args), args.context_parallel_size, defaults)),
        lambda: raise_for(dynamic_blockers(none_for_unknown(args), defaults)),
    )
    try:
        found = _described(args)
    except ConfigurationError as error:
        return None, [*blockers_of(error), *of_options, *of_ranks]
    except UnknownValueError:
        return None, [*of_options, *of_ranks]
    of_model = _blockers_of_static(args, found.config)
    if found.dynamic is not None:
        of_model = _blockers_of_dynamic(args, found.config, found.dynamic)
    return found, [*of_options, *of_model, *of_ranks]


def _described(args: argparse.Namespace) -> Settled:
    """The configuration that parsed arguments describe.

    Raises ConfigurationError where it breaks a rule of its own, UnknownValueError where a value is not known.
    """
    values, number = _configured(args), num_dynamic_ranks(args)
    choice = choose_algorithm(args, number or args.context_parallel_size)
    if choice is not None:
        values |= {"context_parallel_algo": choice.algorithm, "ulysses_degree_in_cp": choice.degree}
    elif args.context_parallel_algo is None:
        del values["context_parallel_algo"]
    config = ContextParallelConfig(**values)
    return Settled(config, choice, None if number is None else over_all(config, number))


def _blockers_of_static(args: argparse.Namespace, config: ContextParallelConfig) -> list[Blocker]:
    """What the model and the rest of the command line do not allow, where all samples have the same ranks."""
    return found_by(
        lambda: refuse_length(none_for_unknown(args), config),
        lambda: _check_model(args, config),
        lambda: raise_for(latent_blockers(args, config)),
        lambda: check_kernels(args, config, _device(args)),
        lambda: refuse_lost_documents(args, config, installed_release()),
        lambda: refuse_unloadable_optimizer(args, config),
        lambda: refuse_unwatched_scores(args, config),
        lambda: refuse_dropout_rate(args, config),
        lambda: refuse_mask_beside_window(args, config),
        lambda: refuse_recomputed_biases(none_for_unknown(args), config),
        lambda: refuse_kept_outputs(none_for_unknown(args), config),
    )


def _blockers_of_dynamic(
    args: argparse.Namespace, config: ContextParallelConfig, dynamic: ContextParallelConfig
) -> list[Blocker]:
    """The same where each document has ranks of its own; what else they rule out is in dynamic_rules.py."""
    return found_by(
        lambda: _check_model_over_all(args, dynamic),
        lambda: check_kernels(args, dynamic, _device(args)),
        lambda: refuse_unloadable_optimizer(args, config),
        lambda: refuse_dropout_rate(args, dynamic),
        lambda: refuse_unwatched_scores(args, dynamic),
        lambda: refuse_recomputed_biases(none_for_unknown(args), dynamic),
        lambda: refuse_kept_outputs(none_for_unknown(args), dynamic),
    )


def knows_inner_ring(args: argparse.Namespace) -> bool:
    """Whether the value of --cp-window-size is known, as in every job, but not in every script that is only read."""
    return none_for_unknown(args).cp_window_size is not None


def _configured(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration, as parsed arguments have them."""
    names = [option.name for option in fields(ContextParallelConfig)]
    if not knows_inner_ring(args):
        # No rule reads it but those about itself, which say nothing of the default.
        names.remove("cp_window_size")
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values["context_parallel_kernels"] = tuple(values["context_parallel_kernels"])
    return values


_SIZES = (
    "context_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_attention_heads",
    "num_query_groups",
    "hidden_size",
    "kv_channels",
    "seq_length",
    "encoder_seq_length",
)


def _broken_sizes(args: argparse.Namespace) -> list[Blocker]:
    """Sizes below 1, with which no other rule can be looked at."""
    sizes = none_for_unknown(args)
    given = {flag(name): getattr(sizes, name) for name in _SIZES}
    return [
        Blocker(name, f"{name} {value} is below 1; use 1 or more.")
        for name, value in given.items()
        if value is not None and value < 1
    ]


def _check_model(args: argparse.Namespace, config: ContextParallelConfig) -> None:
    if args.num_attention_heads is None:
        return
    config.check_model(
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        num_layers=args.num_layers,
    )


def _check_model_over_all(args: argparse.Namespace, dynamic: ContextParallelConfig) -> None:
    try:
        _check_model(args, dynamic)
    except ConfigurationError as error:
        raise as_documents(error, dynamic.context_parallel_size) from None


def _check_world_size(args: argparse.Namespace) -> None:
    """Say before Megatron does, with a way out, that the ranks cannot be split as configured."""
    names = ("context_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    size, *others = (getattr(args, name) for name in names)
    ranks, beside = getattr(args, "world_size", None), math.prod(others)
    if size == 1 or ranks is None or ranks % (size * beside) == 0:
        return
    spelled = " * ".join(f"{flag(name)} {getattr(args, name)}" for name in names)
    fitting = [] if ranks % beside else divisors(ranks // beside)
    sizes = f"a --context-parallel-size of {or_list(fitting)}, or " if fitting else ""
    needed = size * beside
    raise ConfigurationError(
        f"{spelled} = {needed} does not divide the {ranks} ranks; use {sizes}a multiple of {needed} ranks."
    )


def _check_connections(args: argparse.Namespace) -> None:
    """Say before Megatron does, in one line, that it wants CUDA_DEVICE_MAX_CONNECTIONS=1."""
    sizes = {
        name: getattr(args, name)
        for name in ("context_parallel_size", "tensor_model_parallel_size")
        if getattr(args, name) > 1
    }
    if not sizes or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" or not _wants_one_connection(args):
        return
    spelled = " ".join(f"{flag(name)} {size}" for name, size in sizes.items())
    raise ConfigurationError(
        f"{spelled}: Megatron needs the environment variable CUDA_DEVICE_MAX_CONNECTIONS set to 1 here; "
        f"export CUDA_DEVICE_MAX_CONNECTIONS=1."
    )


def _wants_one_connection(args: argparse.Namespace) -> bool:
    """Whether Megatron will ask for it: not on Blackwell GPUs, nor beside features that need more connections."""
    if any(getattr(args, name, False) for name in ("use_torch_fsdp2", "use_megatron_fsdp")):
        return False
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        return False
    return accelerator() != "cuda" or torch.cuda.get_device_properties(0).major < 10


def asks_for_cpu(distributed_backend: str) -> bool:
    """Whether training is to run on the CPU: the user said gloo, and there is no accelerator.

    Raises ConfigurationError where there is none and the user did not say so.
    """
    if accelerator() is not None:
        return False
    if distributed_backend != "gloo":
        raise ConfigurationError(
            f"--distributed-backend {distributed_backend} needs an accelerator, and neither torch.cuda nor torch.npu "
            f"finds one; use --distributed-backend gloo to train on the CPU."
        )
    return True


def _device(args: argparse.Namespace) -> str | None:
    """Where attention will be computed; None where that takes an accelerator, and this machine has none."""
    return accelerator() or ("cpu" if args.distributed_backend == "gloo" else None)


def installed_release() -> str:
    """Version of megatron.core."""
    from megatron.core import __version__

    return str(__version__)


def notes_on_arguments(
    args: argparse.Namespace, config: ContextParallelConfig, defaults: Mapping[str, object]
) -> list[str]:
    """A sentence for each flag that has no effect, or another one than with one rank, and for slow kernels."""
    return [
        *config.ineffective_flags(),
        *_ineffective_megatron_flags(args, config),
        *_ineffective_document_flags(args),
        *latent_notes(args, config),
        *difference_notes(args, config, defaults),
        *note_on_windows_across_documents(args, config),
        *kernel_notes(args, config, _device(args)),
    ]


def _ineffective_megatron_flags(args: argparse.Namespace, config: ContextParallelConfig) -> list[str]:
    """A sentence for each flag of Megatron's that is set and chooses among algorithms that are not in force."""
    if config.context_parallel_size == 1:
        return []
    two_levels = args.cp_comm_type is not None and "a2a+p2p" in args.cp_comm_type
    given = {
        "hierarchical_context_parallel_sizes": args.hierarchical_context_parallel_sizes is not None and not two_levels,
        "attention_backend": args.attention_backend.name != "auto",
        "flash_attention_version": getattr(args, "flash_attention_version", None) is not None,
    }
    ours = "--context-parallel-algo and --context-parallel-kernels are in force"
    return [f"{flag(name)} has no effect: it is TransformerEngine's, and {ours}." for name in given if given[name]]


def _ineffective_document_flags(args: argparse.Namespace) -> list[str]:
    if args.fix_sub_seq_length <= 0 or fixed_document_length(args) is not None:
        return []
    reason = "it is above --seq-length" if args.reset_attention_mask else "it needs --reset-attention-mask"
    return [f"--fix-sub-seq-length {args.fix_sub_seq_length} has no effect: {reason}."]


def fixed_document_length(args: argparse.Namespace) -> int | None:
    """Tokens of each document, where the flags say how many."""
    length: int = args.fix_sub_seq_length
    return length if args.reset_attention_mask and 0 < length <= (sample_length(args) or 0) else None
