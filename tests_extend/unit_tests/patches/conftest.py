"""Megatron as it is without the plugin, for tests that patch it themselves."""

import argparse
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mindspeed_cp.patches import rules
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry


@pytest.fixture(scope="module")
def adaptor() -> Iterator[ModuleType]:
    """The adaptor, with its patches taken back; after the module's tests they are as they were before."""
    was_imported = "mindspeed_cp.megatron_adaptor" in sys.modules
    from mindspeed_cp import megatron_adaptor

    registries = (megatron_adaptor.registry, megatron_adaptor.cpu_registry)
    was_applied = [was_imported and any(state == "applied" for _, state in each.status()) for each in registries]
    for registry in reversed(registries):
        registry.restore()
    yield megatron_adaptor
    for registry in reversed(registries):
        registry.restore()
    for registry, applied in zip(registries, was_applied, strict=True):
        if applied:
            registry.apply()


@pytest.fixture(scope="module")
def megatron_arguments(adaptor: ModuleType) -> ModuleType:
    """Megatron's module, which not every wheel holds."""
    module: ModuleType = pytest.importorskip("megatron.training.arguments")
    return module


@pytest.fixture(scope="module")
def parser(megatron_arguments: ModuleType) -> argparse.ArgumentParser:
    """Megatron's parser, built while the argument patches are in force."""
    with PatchRegistry(argument_patches(Plugin(), print)).applied():
        parser: argparse.ArgumentParser = megatron_arguments.add_megatron_arguments(
            argparse.ArgumentParser(allow_abbrev=False)
        )
    return parser


@pytest.fixture
def ampere_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an Ampere GPU, one rank, and the environment that Megatron wants."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(rules, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.fixture
def validation():
    """The patched validate_args around a stand-in for Megatron's: call it, then look at what was called."""
    calls, plugin = [], Plugin()
    patches = {patch.target: patch for patch in argument_patches(plugin, lambda: calls.append("use_cpu"))}

    def validate_args(args, defaults):
        calls.append(("validate_args", args, defaults, plugin.config))
        return "validated"

    patched = patches["megatron.training.arguments:validate_args"].in_place_of(validate_args)
    return SimpleNamespace(validate=patched, calls=calls, plugin=plugin)
