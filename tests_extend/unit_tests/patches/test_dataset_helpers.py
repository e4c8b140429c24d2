"""The index builder of Megatron's datasets: compiled only where it is missing, and then for the Python that runs."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from mindspeed_cp.patches.dataset_helpers import dataset_helper_patches


@pytest.fixture
def compiled_with(monkeypatch):
    """The patched function around a stand-in for Megatron's: call it, get the `python3` that make would have found."""
    found = []
    (patch,) = dataset_helper_patches()
    compile_helpers = patch.in_place_of(lambda: found.append(shutil.which("python3")))

    def call(spec):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        compile_helpers()
        return found

    return call


def test_helpers_that_are_compiled_are_left_alone(compiled_with):
    assert compiled_with(object()) == []


def test_helpers_are_compiled_for_the_python_that_runs_and_the_path_is_put_back(compiled_with, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert compiled_with(None) == [str(Path(sys.executable).with_name("python3"))]
    assert os.environ["PATH"] == "/nowhere"
