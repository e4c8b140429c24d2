"""Block attention kernels: exact attention of one block of queries over one block of keys, on each device."""

from mindspeed_cp.kernels.bnsd import BnsdKernel
from mindspeed_cp.kernels.choose import KERNELS, choose_kernel
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
    "BnsdKernel",
    "MaskKind",
    "choose_kernel",
]
