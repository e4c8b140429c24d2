"""`python -m mindspeed_cp`: a report, a check of a launch script, or a training script run with Megatron patched."""

import argparse
import contextlib
import difflib
import logging
import os
import platform
import runpy
import sys
import textwrap
import types
import typing
import warnings
from pathlib import Path

USAGE = """python -m mindspeed_cp                                  versions, device, kernels, terms, patches
       python -m mindspeed_cp check FILE [argument ...]        what becomes of each flag of a launch script
       python -m mindspeed_cp check --flag ...                 the same of flags; nothing is started
       python -m mindspeed_cp script.py [--flag ...]           run a training script with Megatron patched
       python -m mindspeed_cp --help | --version"""


def main() -> None:
    """Do what the first word of the command line says; print a report where there is none."""
    first, *rest = [*sys.argv[1:], ""]
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version" and rest[:-1]:
        _fail(f"--version takes no argument, and is given {' '.join(rest[:-1])!r}; leave it out.")
    elif first == "--version":
        from mindspeed_cp import __version__

        print(f"mindspeed_cp {__version__}")
    elif first == "check":
        run_check(rest[:-1])
    elif first:
        run_script(first, sys.argv[1:])
    else:
        with _silence():
            text = report()
        print(text)


def help_text() -> str:
    """How the program is used, and the flags that it adds to a training script's."""
    from mindspeed_cp.patches.flags import add_context_parallel_arguments

    parser = argparse.ArgumentParser(prog="mindspeed_cp", usage=USAGE, description=__doc__, add_help=False)
    add_context_parallel_arguments(parser)
    others = "--context-parallel-size and all others are Megatron's: python -m mindspeed_cp script.py --help"
    return f"{parser.format_help()}\n{others}"


def run_check(words: list[str]) -> None:
    """Print what becomes of each flag. The status is 1 where something is blocked, 2 where nothing can be checked."""
    # What follows a script's name is the script's.
    of_flags = words if words and words[0].startswith("-") else []
    if not words or {"-h", "--help"} & {*of_flags}:
        print(f"usage: {USAGE}", file=sys.stdout if words else sys.stderr)
        raise SystemExit(0 if words else 2)
    with _silence():
        parser = _megatron_parser()
        from mindspeed_cp.launch.check import CheckError, check

        try:
            text, is_blocked = check(words, parser, os.environ)
        except CheckError as error:
            _fail(str(error))
    print(text)
    raise SystemExit(int(is_blocked))


@contextlib.contextmanager
def _silence() -> typing.Iterator[None]:
    """No warnings and no logs: the report says what is to be said, of a job that does not run here."""
    threshold = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(threshold)


def _megatron_parser() -> argparse.ArgumentParser:
    """Megatron's parser, with all flags that the adaptor adds."""
    _patch_megatron()
    try:
        from megatron.training.arguments import add_megatron_arguments
    except ImportError as error:
        _fail(f"check reads flags as megatron.training does, which cannot be imported: {error}.")
    parser: argparse.ArgumentParser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser


def _patch_megatron() -> None:
    from mindspeed_cp.patching import PatchError

    try:
        import mindspeed_cp.megatron_adaptor  # noqa: F401
    except (ImportError, PatchError) as error:
        _fail(str(error))


def _fail(message: str) -> typing.NoReturn:
    """End with status 2 and one line."""
    print(f"mindspeed_cp: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_script(script: str, argv: list[str]) -> None:
    """Run `script` as the main program, as `python script` would, but with Megatron patched beforehand."""
    if not Path(script).is_file():
        near = difflib.get_close_matches(script, ["check", "--help", "--version"], n=1)
        _fail(
            f"there is no script {script!r}; " + (f"did you mean {near[0]}?" if near else "--help says what there is.")
        )
    sys.argv = argv
    # Python put the working directory first because of -m; a script expects its own, where a checkout's megatron lies.
    # Under -P it did not.
    sys.path[: 0 if getattr(sys.flags, "safe_path", False) else 1] = [str(Path(script).resolve().parent)]
    _patch_megatron()
    runpy.run_path(script, run_name="__main__")


def report() -> str:
    """Versions, device, kernels, terms, and every patch with state, reason and target; those of one reason together."""
    import torch

    from mindspeed_cp import __version__
    from mindspeed_cp.device import accelerator
    from mindspeed_cp.kernels import KERNELS, TileCase
    from mindspeed_cp.kernels.protocol import TRIANGLE
    from mindspeed_cp.kernels.taken import table_of_terms
    from mindspeed_cp.patching import PatchError

    device, capability = accelerator() or "cpu", None
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
    case = TileCase(device, torch.bfloat16, TRIANGLE, 8, 2, 4096, 4096, 128, 128, capability)
    lines = [
        f"mindspeed_cp {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device       {device}",
        f"kernels      {', '.join(KERNELS.names)}",
        f"example      {KERNELS.explain(case)}",
        "terms        on every algorithm and transport; by kernels that take them as they are:",
        textwrap.indent(table_of_terms(), "  "),
    ]
    try:
        from mindspeed_cp import megatron_adaptor
    except (ImportError, PatchError) as error:
        return "\n".join([*lines, f"patches      none: {error}"])
    return "\n".join([*lines, f"megatron     {megatron_adaptor.megatron_version()}", *_patch_lines(megatron_adaptor)])


def _patch_lines(adaptor: types.ModuleType) -> typing.Iterator[str]:
    """The patches of the adaptor's registries by state and reason."""
    from mindspeed_cp.patching import Patch, targets_by_module

    cpu_note = "only with --distributed-backend gloo on a machine without an accelerator"
    for title, registry in (
        ("patches", adaptor.registry),
        (f"patches for training on a CPU, {cpu_note}", adaptor.cpu_registry),
    ):
        yield from ("", title)
        groups: dict[tuple[str, str], list[Patch]] = {}
        for patch, state in registry.status():
            groups.setdefault((state, patch.why), []).append(patch)
        for (state, why), patches in groups.items():
            reason = f"[{state}] {why}"
            # A flag or an all-to-all stays in one piece, so that it can be searched for.
            yield from textwrap.wrap(reason, 114, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            for module, attributes in targets_by_module(patches).items():
                listed = f"{module}: {', '.join(attributes)}"
                yield from textwrap.wrap(listed, 114, initial_indent="      ", subsequent_indent="          ")


if __name__ == "__main__":
    main()
