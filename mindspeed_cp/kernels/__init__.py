"""Kernels on each device: exact attention of one block of queries over one block of keys, and the merging of blocks."""

from mindspeed_cp.kernels.choose import KERNELS, MERGE_KERNELS, KernelRegistry, choose_merge_kernel
from mindspeed_cp.kernels.merge import MergeKernel, add_
from mindspeed_cp.kernels.philox import Dropout
from mindspeed_cp.kernels.protocol import (
    BlockCase,
    BlockGradients,
    BlockKernel,
    BlockOutput,
    Term,
    TileTerms,
    Window,
)

__all__ = [
    "KERNELS",
    "MERGE_KERNELS",
    "BlockCase",
    "BlockGradients",
    "BlockKernel",
    "BlockOutput",
    "Dropout",
    "KernelRegistry",
    "MergeKernel",
    "Term",
    "TileTerms",
    "Window",
    "add_",
    "choose_merge_kernel",
]
