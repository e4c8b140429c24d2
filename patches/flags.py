"""The context-parallel flags in Megatron's parser: one for each field of the configuration, and those of documents."""

import argparse
import typing
from dataclasses import Field, fields
from typing import Any

from mindspeed_cp.config import CHOICES, ConfigurationError, ContextParallelConfig, flag
from mindspeed_cp.kernels import KERNELS


def add_context_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of ContextParallelConfig that Megatron does not have.

    Raises ConfigurationError where one is there already.
    """
    own = [option for option in fields(ContextParallelConfig) if option.name != "context_parallel_size"]
    if taken := [name for option in own if (name := flag(option.name)) in parser._option_string_actions]:
        raise ConfigurationError(
            f"{', '.join(taken)}: another plugin has added them to Megatron's parser already; "
            f"import either mindspeed_cp or that one (MindSpeed?), not both."
        )
    group = parser.add_argument_group(title="context parallel attention (mindspeed_cp)")
    hints = typing.get_type_hints(ContextParallelConfig)
    for option in own:
        group.add_argument(flag(option.name), **_argparse_options(option, hints[option.name]))


def add_document_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where documents end and how they are dealt to ranks: of data, not of attention."""
    group = parser.add_argument_group(title="documents within a sequence (mindspeed_cp)")
    group.add_argument(
        "--fix-sub-seq-length",
        type=int,
        default=-1,
        help="With --reset-attention-mask: every document has so many tokens, whatever the data says, the last of a "
        "sequence what remains. 0 or less, or above --seq-length: documents are those of the data.",
    )
    group.add_argument(
        "--packed-sequence-layout",
        choices=["zigzag_by_document", "balanced"],
        default="zigzag_by_document",
        help="How packed streams (--sft, --dataloader-inter-document-masking) are dealt to the context-parallel ranks: "
        "an early and a late stretch of each document, or documents whole or cut, so that all compute as much.",
    )


def _argparse_options(option: "Field[Any]", hint: Any) -> dict[str, Any]:
    default, text = option.default, option.metadata["help"]
    if option.name == "context_parallel_algo":  # Where none is named, one is chosen.
        default = None
        text += " By default what --cp-comm-type asks for, else Ulysses where the heads allow it, a hybrid or the ring."
    shared = {"help": text, "default": default}
    if hint is bool:
        return {**shared, "action": "store_true"}
    if option.name in CHOICES:
        meanings = {"type": _algorithm} if option.name == "context_parallel_algo" else {}
        return {**shared, **meanings, "choices": CHOICES[option.name]}
    if typing.get_origin(hint) is tuple:
        return {**shared, "nargs": "+", "choices": KERNELS.names}
    return {**shared, "type": int}


def _algorithm(text: str) -> str:
    """A value of --context-parallel-algo: argparse says which there are, and not what they mean."""
    if text not in CHOICES["context_parallel_algo"]:
        raise argparse.ArgumentTypeError(
            f"{text} is unknown; use ulysses_cp_algo, megatron_cp_algo (the ring and the double ring), hybrid_cp_algo "
            f"(Ulysses inside, a ring outside) or kvallgather_cp_algo (all K/V gathered at once)"
        )
    return text
