"""Which kernel takes which term of the scores, as the kernels themselves say it."""

import torch

from mindspeed_cp.kernels.choose import KERNELS, KernelRegistry
from mindspeed_cp.kernels.protocol import EVERYTHING, Term, TileCase, TileKernel

_DEVICES = ("cuda", "npu", "cpu")


def takes(kernel: TileKernel, term: Term) -> bool:
    """Whether the kernel has no reason against a term, on whichever device it runs."""
    plain = (TileCase(device, torch.bfloat16, EVERYTHING, 4, 4, 128, 128, 64, 64) for device in _DEVICES)
    return all(
        kernel.unsupported_reasons(case._replace(terms=frozenset({term}))) == kernel.unsupported_reasons(case)
        for case in plain
    )


def table_of_terms(kernels: KernelRegistry = KERNELS) -> str:
    """A row for each term, a column for each kernel, in Markdown."""
    rows = [
        ["term", *kernels.names],
        ["---"] * (1 + len(kernels.names)),
        *([term.value, *("yes" if takes(kernel, term) else "no" for kernel in kernels.kernels)] for term in Term),
    ]
    return "\n".join(f"| {' | '.join(row)} |".replace(" --- ", "---") for row in rows)
