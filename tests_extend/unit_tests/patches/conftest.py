"""Megatron as it is without the plugin, for tests that patch it themselves."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest


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
