"""Kernels on each device: exact attention of one tile, and the merging of partial results."""

from mindspeed_cp.kernels.choose import KERNELS, MERGE_KERNELS, KernelRegistry, choose_merge_kernel
from mindspeed_cp.kernels.merge import MergeKernel, add_
from mindspeed_cp.kernels.philox import Dropout
from mindspeed_cp.kernels.protocol import (
    Term,
    TileCase,
    TileGradients,
    TileKernel,
    TileOutput,
    TileTerms,
    Window,
)

__all__ = [
    "KERNELS",
    "MERGE_KERNELS",
    "Dropout",
    "KernelRegistry",
    "MergeKernel",
    "Term",
    "TileCase",
    "TileGradients",
    "TileKernel",
    "TileOutput",
    "TileTerms",
    "Window",
    "add_",
    "choose_merge_kernel",
]
