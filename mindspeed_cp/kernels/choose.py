"""The choice of a kernel: the first, in order of preference, that can compute the case at hand."""

from collections.abc import Sequence

from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.protocol import BlockCase, BlockKernel
from mindspeed_cp.kernels.reference import ReferenceKernel

KERNELS: tuple[BlockKernel, ...] = (CpuFlashKernel(), ReferenceKernel())
"""All kernels, the preferred first."""


def choose_kernel(case: BlockCase, kernels: Sequence[BlockKernel] = KERNELS) -> BlockKernel:
    """The first of `kernels` that can compute `case`.

    Raises NotImplementedError with every kernel's reasons when none can.
    """
    refusals = []
    for kernel in kernels:
        reasons = kernel.unsupported_reasons(case)
        if not reasons:
            return kernel
        refusals.append(f"  {kernel.name}: {'; '.join(reasons)}")
    raise NotImplementedError("\n".join([f"no attention kernel can compute {case}:", *refusals]))
