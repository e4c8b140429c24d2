"""The attention of some queries over more and more keys, block by block; Note [Merge] in kernels/merge.py says how."""

from collections.abc import Sequence

import torch

from mindspeed_cp.kernels import MERGE_KERNELS, BlockOutput, MergeKernel, choose_merge_kernel


class MergedOutput:
    """The attention of some queries over the keys seen so far, accumulated in fp32 (fp64 for fp64 inputs).

    The blocks may come in any order; the first has to be of all queries.
    """

    def __init__(self, first: BlockOutput, kernels: Sequence[MergeKernel] = MERGE_KERNELS) -> None:
        dtype = accumulator_dtype(first.out.dtype)
        self._out = first.out.to(dtype, copy=True)
        self._lse = first.lse.to(dtype, copy=True)
        self._kernel = choose_merge_kernel(first.out.device.type, first.out.dtype, kernels)

    def merge(self, block: BlockOutput, queries: slice) -> None:
        """Add the attention of `queries` over the keys of one more block."""
        self._kernel.merge_(self._out[:, :, queries], self._lse[:, :, queries], block)

    def result(self, dtype: torch.dtype) -> BlockOutput:
        """Output in `dtype`, rounded once, and log-sum-exp."""
        return BlockOutput(self._out.to(dtype), self._lse)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
