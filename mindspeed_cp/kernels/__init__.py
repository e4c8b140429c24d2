"""Block attention kernels: exact attention of one block of queries over one block of keys, on each device."""

from mindspeed_cp.kernels.choose import KERNELS, KernelRegistry
from mindspeed_cp.kernels.protocol import (
    BlockCase,
    BlockGradients,
    BlockKernel,
    BlockMask,
    BlockOutput,
)
from mindspeed_cp.layout import MaskKind

__all__ = [
    "KERNELS",
    "BlockCase",
    "BlockGradients",
    "BlockKernel",
    "BlockMask",
    "BlockOutput",
    "KernelRegistry",
    "MaskKind",
]
