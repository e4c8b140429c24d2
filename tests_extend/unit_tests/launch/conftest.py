"""What tests of launches have in common."""

import argparse

import pytest

from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry


@pytest.fixture(scope="module")
def parser():
    """Megatron's parser with the plugin's flags."""
    megatron_arguments = pytest.importorskip("megatron.training.arguments")
    with PatchRegistry(argument_patches(Plugin(), print)).applied():
        return megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
