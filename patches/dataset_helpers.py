"""The compiled index builder of Megatron's datasets."""

import functools
import importlib.util
from collections.abc import Callable

from mindspeed_cp.patching import Patch


def dataset_helper_patches() -> tuple[Patch, ...]:
    """Patches of megatron.core.datasets.utils."""

    def wrap_compile(original: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(original)
        def compile_helpers() -> None:
            if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
                original()

        return compile_helpers

    return (
        Patch(
            target="megatron.core.datasets.utils:compile_helpers",
            kind="wrap",
            function=wrap_compile,
            why="It runs make, which ends training in an installed wheel: the wheel has no Makefile, but the result.",
            remove_when="Megatron looks for the compiled module before it runs make.",
        ),
    )
