"""The compiled index builder of Megatron's datasets."""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_cp.patching import Patch, PatchedCall


def dataset_helper_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.datasets.utils."""
    return (
        Patch(
            target="megatron.core.datasets.utils:compile_helpers",
            kind="around",
            function=_compile_helpers,
            why=(
                "It runs make, which ends training in an installed wheel: the wheel has no Makefile, but the result. "
                "In a checkout, make asks whichever python3 comes first on PATH for pybind11 and for the file's name."
            ),
            remove_when="Megatron looks for the compiled module before it runs make, and tells make which Python runs.",
        ),
    )


def _compile_helpers(call: PatchedCall) -> None:
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        with _own_python_first():
            call.proceed()


@contextmanager
def _own_python_first() -> Iterator[None]:
    """This Python's `python3` before any other on PATH, and the `python3-config` of the one that it was made with."""
    path = os.environ.get("PATH", "")
    folders = (str(Path(sys.executable).parent), sysconfig.get_config_var("BINDIR"), path)
    os.environ["PATH"] = os.pathsep.join(folders)
    try:
        yield
    finally:
        os.environ["PATH"] = path
