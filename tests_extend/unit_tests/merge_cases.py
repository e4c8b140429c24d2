"""Merges of a block into what was seen before, for every kernel that merges, also in a process of its own.

Shapes: B batch, N query heads, S query tokens, V value head size.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from mindspeed_cp.attention.sums import MergedOutput
from mindspeed_cp.kernels import MergeKernel, TileOutput
from mindspeed_cp.kernels.places import in_all_samples
from mindspeed_cp.kernels.triton_merge import TritonMerge

MARGIN = 3
"""Tokens and values that the result has beside those that are merged."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One merge. memory, lse_memory: order of the dims in memory, outermost first, of the results and of the block.

    skipped: tokens of the result before those that are merged. expanded: whether all rows of the block are one row.
    """

    batch: int = 2
    heads: int = 3
    queries: int = 70
    head_size: int = 40
    dtype: torch.dtype = torch.bfloat16
    memory: str = "BNSV"
    lse_memory: str = "BNS"
    skipped: int = 0
    expanded: bool = False


class Merged(NamedTuple):
    """What was seen so far, out [B, N, S, V] and lse [B, N, S], after a merge."""

    out: Tensor
    lse: Tensor


def interpret(rank: int, folder: str) -> None:
    """Make Triton run kernels on the CPU in this process."""
    assert "triton" not in sys.modules, "Triton reads the variable when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"


def merge(kernel: MergeKernel, case: Case, dtype: torch.dtype = torch.float32) -> tuple[Merged, Merged]:
    """Results in `dtype` before and after a merge, both with their margins."""
    results, block = inputs(case, dtype)
    before = Merged(*(x.clone() for x in results))
    kernel.merge_(*merged_part(case, results), block)
    return before, results


def merged_part(case: Case, results: Merged) -> Merged:
    """Views of what is merged, without the margins."""
    tokens = slice(case.skipped, case.skipped + case.queries)
    return Merged(results.out[:, :, tokens, : case.head_size], results.lse[:, :, tokens])


def inputs(case: Case, dtype: torch.dtype) -> tuple[Merged, TileOutput]:
    """Results with margins, and a block.

    One of the first three queries is dead so far, one in the block, one in both; so are some others.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(shape: tuple[int, ...], order: str, dims: str, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        outermost_first = [dims.index(dim) for dim in order]
        return (
            x.permute(outermost_first).contiguous().permute(sorted(range(len(dims)), key=outermost_first.__getitem__))
        )

    def attention(tokens: int, values: int, out_dtype: torch.dtype, dead: list[int]) -> Merged:
        rows = (case.batch, case.heads, tokens)
        out = normal((*rows, values), case.memory, "BNSV", out_dtype)
        lse = normal(rows, case.lse_memory, "BNS", torch.float32).mul_(4).to(dtype)
        for start in dead:
            out[:, :, start::7] = 0
            lse[:, :, start::7] = -torch.inf
        return Merged(out, lse)

    results = attention(case.skipped + case.queries + MARGIN, case.head_size + MARGIN, torch.float32, [0, 1])
    block = attention(case.queries, case.head_size, case.dtype, [] if case.expanded else [1, 2])
    if case.expanded:
        block = Merged(*(x[:, :, :1].expand_as(x) for x in block))
    return Merged(results.out.to(dtype), results.lse), TileOutput(*block)


def merge_far_apart(kernel: MergeKernel, dim: int, folder: str) -> tuple[Tensor, Tensor]:
    """Merge three rows that lie 2^30 numbers apart along `dim`, of zeros seen with lse 0 and ones with lse 0.

    Gives the merged out [3, V] and lse [3]. The memory is that of files with holes: little is ever there.
    """
    step, head_size = 2**30, 4
    sizes = [3 if each == dim else 1 for each in range(3)]
    strides = [step if each == dim else 1 for each in range(3)]

    def rows(name: str, dtype: torch.dtype, value: float, width: int) -> Tensor:
        path = str(Path(folder) / f"{name}_{dim}")
        memory = torch.from_file(path, shared=True, size=2 * step + width, dtype=dtype)
        return memory.as_strided([*sizes, width], [*strides, 1]).fill_(value)

    out, lse = rows("out", torch.float32, 0.0, head_size), rows("lse", torch.float32, 0.0, 1)[..., 0]
    block_out, block_lse = rows("block", torch.bfloat16, 1.0, head_size), rows("block_lse", torch.float32, 0.0, 1)
    kernel.merge_(out, lse, TileOutput(block_out, block_lse[..., 0]))
    return out.reshape(3, head_size).clone(), lse.reshape(3).clone()


def merge_nan(kernel: MergeKernel, where: str) -> tuple[Tensor, Tensor]:
    """Merge two rows, with a NaN at (1, 0) of one of the tensors; gives the merged out [2, V] and lse [2]."""
    tensors = {name: torch.ones(1, 1, 2, 4) for name in ("out", "block_out")}
    tensors |= {name: torch.ones(1, 1, 2) for name in ("lse", "block_lse")}
    tensors[where].view(2, -1)[1, 0] = torch.nan
    kernel.merge_(tensors["out"], tensors["lse"], TileOutput(tensors["block_out"], tensors["block_lse"]))
    return tensors["out"][0, 0], tensors["lse"][0, 0]


def merge_blocks(blocks: list[tuple[TileOutput, slice]], allow_triton: bool) -> TileOutput:
    """The attention that MergedOutput makes of blocks and their queries, in their dtype."""
    refusals = TritonMerge.unsupported_reasons

    def reasons(self: TritonMerge, device_type: str, dtype: torch.dtype) -> list[str]:
        return [] if allow_triton else refusals(self, device_type, dtype)

    (first, _), *others = blocks
    merged = MergedOutput(first.out)
    with mock.patch.object(TritonMerge, "unsupported_reasons", reasons):
        assert merged.kernel.name == ("triton" if allow_triton else "torch")
    merged.merge(first, in_all_samples(slice(None)))
    for block, queries in others:
        merged.merge(block, in_all_samples(queries))
    return merged.result()
