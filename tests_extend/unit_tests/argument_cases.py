"""Parsed flags, as Megatron's own validation hands them on."""

import argparse

import pytest
from packaging.version import Version

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.rules import settled

MODEL = ["--num-attention-heads", "8", "--seq-length", "64", "--attention-dropout", "0", "--hidden-dropout", "0"]
CP4 = [*MODEL, "--context-parallel-size", "4"]

# Options that came with a release later than the oldest supported.
SINCE = {"dataloader_inter_document_masking": "0.19", "flash_attention_version": "0.19"}


def config_from_arguments(args: argparse.Namespace) -> ContextParallelConfig:
    """The configuration that they describe. Raises ConfigurationError with all rules that they break."""
    return settled(args).config


def refusal_of(action, *args):
    """The message of the ConfigurationError that a call raises."""
    with pytest.raises(ConfigurationError) as refusal:
        action(*args)
    return str(refusal.value)


def option_of(flags):
    """Name among Megatron's arguments of the first of these flags."""
    return flags[0].removeprefix("--").replace("-", "_")


def is_known(option):
    """Whether the installed Megatron has this option."""
    import megatron.core

    return Version(megatron.core.__version__) >= Version(SINCE.get(option, "0"))
