"""Parsed flags, as Megatron's own validation hands them on."""

import argparse

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.rules import settled


def config_from_arguments(args: argparse.Namespace) -> ContextParallelConfig:
    """The configuration that they describe. Raises ConfigurationError with all rules that they break."""
    return settled(args).config
