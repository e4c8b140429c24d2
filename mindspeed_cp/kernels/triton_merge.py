"""Merging in one pass over the memory: a Triton kernel for CUDA.

Shapes: B batch, N query heads, S query tokens, V value head size.

A merge computes next to nothing: its time is that of its bytes. Of a row of V numbers in a block of b bytes a number,
plain torch moves

    multiply out   read and write fp32                  8 V
    cast           read the block, write fp32           (b + 4) V
    add            read out and block, write out        12 V
    lse            reads and writes of all its steps    about 150

and one pass moves

    out and block  read both, write out                 (8 + b) V
    lse            read both, write one                 12

With bf16 and V = 128 that is about 3480 bytes a row, or 1292. Neither was timed on a GPU yet.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.kernels.protocol import TileOutput

TILE = 4096
"""Numbers of `out` that one program holds in its registers: 32 a thread."""

tl: Any
"""triton.language: the kernel's source is looked up among the module's names."""


class TritonMerge:
    """Note [Merge] as one kernel: out and lse are read once and written once. For bf16, fp16 and fp32 on CUDA."""

    name = "triton"

    def unsupported_reasons(self, device_type: str, dtype: torch.dtype) -> list[str]:
        """Why it cannot merge blocks of this dtype on this device."""
        reasons = []
        if device_type != "cuda":
            reasons.append(f"runs on CUDA, not on {device_type}")
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            reasons.append(f"merges bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}")
        return [*reasons, *missing()]

    def merge_(self, out: Tensor, lse: Tensor, block: TileOutput) -> None:
        """See MergeKernel.merge_."""
        tensors = (out, lse, block.out, block.lse)
        batch, num_heads, num_queries, head_size = out.shape
        shapes = [tuple(x.shape) for x in tensors]
        assert shapes == [(*out.shape,), (*out.shape[:3],)] * 2, f"out, lse, and those of the block: {shapes}"
        assert out.dtype == lse.dtype == torch.float32, f"sums in {out.dtype} and {lse.dtype}"
        values = 1 << (head_size - 1).bit_length()
        queries = max(1, TILE // values)
        tiles = -(-num_queries // queries)
        strides = [stride for x in tensors for stride in x.stride()]
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(out):
            merge_tile()[(batch * num_heads * tiles,)](
                *tensors, num_heads, num_queries, head_size, tiles, *strides, queries, values
            )


@cache
def missing() -> tuple[str, ...]:
    """What this machine lacks for Triton; looked for once, as every layer asks."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append("triton is not installed")
    # Triton builds what launches its kernels when the first one is launched, as a module of this Python.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        reasons.append("triton needs a C compiler: gcc, clang, or what CC names")
    # Debian's default scheme is that of packages installed locally: Triton asks for the other, where the headers are.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme)["include"]
    if not (Path(headers) / "Python.h").is_file():
        reasons.append(f"triton needs Python's headers, and there is no Python.h in {headers}: install python3-dev")
    return tuple(reasons)


@cache
def merge_tile() -> Any:
    """The kernel, compiled by Triton at its first launch."""
    global tl
    import triton
    import triton.language

    tl = triton.language
    return triton.jit(_merge_tile)


def _merge_tile(  # type: ignore[no-untyped-def]
    out,
    lse,
    block_out,
    block_lse,
    num_heads,
    num_queries,
    head_size,
    tiles,
    out_b,
    out_n,
    out_s,
    out_v,
    lse_b,
    lse_n,
    lse_s,
    block_out_b,
    block_out_n,
    block_out_s,
    block_out_v,
    block_lse_b,
    block_lse_n,
    block_lse_s,
    QUERIES: tl.constexpr,
    VALUES: tl.constexpr,
):
    # All places are counted in 64 bits: with a million tokens a result has more than 2^31 numbers.
    program = tl.program_id(0)
    b = (program // tiles // num_heads).to(tl.int64)
    n = (program // tiles % num_heads).to(tl.int64)
    s = (program % tiles).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    v = tl.arange(0, VALUES).to(tl.int64)[None, :]
    rows = s < num_queries
    places = rows[:, None] & (v < head_size)

    lse += b * lse_b + n * lse_n + s * lse_s
    block_lse += b * block_lse_b + n * block_lse_n + s * block_lse_s
    out += (b * out_b + n * out_n + s * out_s)[:, None] + v * out_v
    block_out += (b * block_out_b + n * block_out_n + s * block_out_s)[:, None] + v * block_out_v

    old = tl.load(lse, mask=rows, other=0.0)
    new = tl.load(block_lse, mask=rows, other=0.0)
    highest = tl.maximum(old, new)
    anchor = tl.where(highest == -float("inf"), 0.0, highest)
    seen = tl.exp(old - anchor)
    added = tl.exp(new - anchor)
    both = seen + added
    # Not tl.maximum, which hides a NaN on a GPU. (The interpreter's does not, so that no test would see it.)
    divisor = tl.where(both < 1.0, 1.0, both)
    merged = tl.load(out, mask=places, other=0.0) * (seen / divisor)[:, None]
    merged += tl.load(block_out, mask=places, other=0.0).to(tl.float32) * (added / divisor)[:, None]

    # Several warps read the same lse: none may write it before all have.
    tl.debug_barrier()
    tl.store(out, merged, mask=places)
    tl.store(lse, anchor + tl.log(both), mask=rows)
