"""The choice of a kernel: the first, in order of preference, that can compute the case at hand."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.merge import MergeKernel, TorchMerge
from mindspeed_cp.kernels.protocol import BlockCase, BlockKernel
from mindspeed_cp.kernels.reference import ReferenceKernel
from mindspeed_cp.kernels.triton_merge import TritonMerge

KERNELS: tuple[BlockKernel, ...] = (CpuFlashKernel(), ReferenceKernel())
"""All kernels, the preferred first."""

MERGE_KERNELS: tuple[MergeKernel, ...] = (TritonMerge(), TorchMerge())
"""All kernels that merge, the preferred first."""


def choose_kernel(case: BlockCase, kernels: Sequence[BlockKernel] = KERNELS) -> BlockKernel:
    """The first of `kernels` that can compute `case`.

    Raises NotImplementedError with every kernel's reasons when none can.
    """
    return _first(kernels, lambda kernel: kernel.unsupported_reasons(case), f"no attention kernel can compute {case}")


def choose_merge_kernel(
    device_type: str, dtype: torch.dtype, kernels: Sequence[MergeKernel] = MERGE_KERNELS
) -> MergeKernel:
    """The first of `kernels` that can merge blocks of this dtype on this device.

    Raises NotImplementedError with every kernel's reasons when none can.
    """
    return _first(
        kernels,
        lambda kernel: kernel.unsupported_reasons(device_type, dtype),
        f"no kernel can merge blocks of {dtype} on {device_type}",
    )


_Kernel = TypeVar("_Kernel", BlockKernel, MergeKernel)


def _first(kernels: Sequence[_Kernel], reasons_of: Callable[[_Kernel], list[str]], refusal: str) -> _Kernel:
    refusals: list[str] = []
    for kernel in kernels:
        reasons = reasons_of(kernel)
        if not reasons:
            return kernel
        refusals.append(f"  {kernel.name}: {'; '.join(reasons)}")
    raise NotImplementedError("\n".join([f"{refusal}:", *refusals]))
