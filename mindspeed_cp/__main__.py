"""`python -m mindspeed_cp` prints what is here; `python -m mindspeed_cp script.py <flags>` runs a script patched."""

import argparse
import platform
import runpy
import sys
import textwrap
from pathlib import Path

USAGE = "python -m mindspeed_cp [script.py [flags of the script]]"


def main() -> None:
    """Run the script named on the command line with Megatron patched, or print a report where none is named."""
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{__doc__}")
    elif len(sys.argv) > 1:
        run_script(sys.argv[1], sys.argv[1:])
    else:
        print(report())


def run_script(script: str, argv: list[str]) -> None:
    """Run `script` as the main program, as `python script` would, but with Megatron patched beforehand."""
    parser = argparse.ArgumentParser(prog="mindspeed_cp", usage=USAGE)
    if not Path(script).is_file():
        parser.error(f"there is no script {script!r}")
    sys.argv = argv
    # Python put the working directory first because of -m; a script expects its own, where a checkout's megatron lies.
    # Under -P it did not.
    sys.path[: 0 if getattr(sys.flags, "safe_path", False) else 1] = [str(Path(script).resolve().parent)]
    from mindspeed_cp.patching import PatchError

    try:
        import mindspeed_cp.megatron_adaptor  # noqa: F401
    except (ImportError, PatchError) as error:
        parser.error(str(error))
    runpy.run_path(script, run_name="__main__")


def report() -> str:
    """Versions, device, kernels, and every patch with its state, reason and target; those of one reason together."""
    import torch

    from mindspeed_cp import __version__
    from mindspeed_cp.device import accelerator
    from mindspeed_cp.kernels import KERNELS, BlockCase, MaskKind
    from mindspeed_cp.patching import Patch, PatchError, targets_by_module

    device, capability = accelerator() or "cpu", None
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
    sizes = dict(num_heads=8, num_kv_heads=2, num_queries=4096, num_keys=4096, head_size=128, value_head_size=128)
    case = BlockCase(device, torch.bfloat16, MaskKind.TRIANGLE, **sizes, compute_capability=capability)
    lines = [
        f"mindspeed_cp {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device       {device}",
        f"kernels      {', '.join(KERNELS.names)}",
        f"example      {KERNELS.explain(case)}",
    ]
    try:
        from mindspeed_cp import megatron_adaptor
    except (ImportError, PatchError) as error:
        return "\n".join([*lines, f"patches      none: {error}"])
    lines.append(f"megatron     {megatron_adaptor.megatron_version()}")
    cpu_note = "only with --distributed-backend gloo on a machine without an accelerator"
    for title, registry in (
        ("patches", megatron_adaptor.registry),
        (f"patches for training on a CPU, {cpu_note}", megatron_adaptor.cpu_registry),
    ):
        lines += ["", title]
        groups: dict[tuple[str, str], list[Patch]] = {}
        for patch, state in registry.status():
            groups.setdefault((state, patch.why), []).append(patch)
        for (state, why), patches in groups.items():
            reason = f"[{state}] {why}"
            # A flag or an all-to-all stays in one piece, so that it can be searched for.
            lines += textwrap.wrap(reason, 114, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            for module, attributes in targets_by_module(patches).items():
                listed = f"{module}: {', '.join(attributes)}"
                lines += textwrap.wrap(listed, 114, initial_indent="      ", subsequent_indent="          ")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
