"""Write the ledger of patches from their records: what is changed, why, and when to remove each change.

python scripts/write_ledger.py            # writes patches/LEDGER.md anew
python scripts/write_ledger.py --check    # only says whether it is as the records have it

Importing the adaptor patches Megatron, which therefore has to be installed.
"""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from generated_page import write_or_check
from mindspeed_cp import megatron_adaptor
from mindspeed_cp.patching import Patch, targets_by_module

PAGE = Path(__file__).resolve().parents[1] / "patches" / "LEDGER.md"
HEAD = """# Ledger of patches

What mindspeed_cp changes in Megatron and torch, why, and when to remove each change. `python scripts/write_ledger.py`
writes it from the records in this folder: edit those. `python -m mindspeed_cp` says which are in force on a machine.
"""
SECTIONS = (
    ("On import of mindspeed_cp.megatron_adaptor", megatron_adaptor.registry),
    ("For training on a CPU, with --distributed-backend gloo and no accelerator", megatron_adaptor.cpu_registry),
)


def write_ledger() -> str:
    """The whole page: one entry for all patches of a section that differ in nothing but their targets."""
    lines = [HEAD]
    for title, registry in SECTIONS:
        lines += [f"## {title}", ""]
        groups: dict[tuple[str, ...], list[Patch]] = {}
        for patch in registry.patches:
            groups.setdefault(_facts(patch), []).append(patch)
        for facts, patches in groups.items():
            lines += [*_write_targets(patches), *map(_wrap_fact, facts), ""]
    return "\n".join(lines)


def _facts(patch: Patch) -> tuple[str, ...]:
    """All that a record says beside its target, a line each."""
    versions = f"{patch.package} {patch.versions}" if patch.versions else "all that are supported"
    facts = [f"why: {patch.why}", f"remove when: {patch.remove_when}", f"versions: {versions}"]
    if patch.needs:
        facts.append(f"only where there is: {', '.join(patch.needs)}")
    if patch.upstream:
        facts.append(f"upstream: <{patch.upstream}>")
    return tuple(facts)


def _write_targets(patches: Sequence[Patch]) -> list[str]:
    lines = []
    for module, attributes in targets_by_module(patches).items():
        listed = f"- **{module}**: {', '.join(f'`{attribute}`' for attribute in attributes)}"
        lines += textwrap.wrap(listed, 120, subsequent_indent="  ", break_on_hyphens=False)
    return lines


def _wrap_fact(fact: str) -> str:
    return textwrap.fill(
        fact, 120, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )


def main() -> int:
    """Read the command line and write; the exit status."""
    return write_or_check(PAGE, lambda _: write_ledger(), script=Path(__file__).name, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
