"""Tensor parallelism of one matrix product Y = X W, X [b, s, h], W [h, h'], by columns and by rows of W.

    torchrun --nproc-per-node 4 scripts/examples/split_matrix.py

By columns each rank has a part of Y, and an all-gather concatenates the parts. By rows each rank has a part of X as
well, and an all-reduce sums the products. Both once by hand, and once with the library's layers.
"""

import sys

import torch
import torch.distributed as dist
from launch import run_as_script
from torch import nn

from mindspeed_cp.diffusion import ColumnLinear, ParallelMesh, RowLinear

BATCH, TOKENS, WIDTH, OUTPUTS = 2, 16, 32, 64


@torch.no_grad()
def example(device: torch.device) -> dict[str, float]:
    """Largest differences."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # The same X and W on every rank: else there would be nothing to compare with.
    x = torch.randn(BATCH, TOKENS, WIDTH).to(device)
    layer = nn.Linear(WIDTH, OUTPUTS, bias=False).to(device)
    w = layer.weight.T
    whole = x @ w

    part = x @ w.chunk(size, dim=1)[rank]
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part)  # Into a list: all_gather knows nothing of dims.
    by_columns = torch.cat(parts, dim=-1)

    by_rows = x.chunk(size, dim=-1)[rank] @ w.chunk(size, dim=0)[rank]
    dist.all_reduce(by_rows)

    along = ParallelMesh(tp=size).communicators["tp"]
    library_columns = ColumnLinear(layer, along, gather=True)(x)
    library_rows = RowLinear(layer, along)(x.chunk(size, dim=-1)[rank])
    results = {
        "columns and all-gather, by hand": by_columns,
        "rows and all-reduce, by hand": by_rows,
        "ColumnLinear": library_columns,
        "RowLinear": library_rows,
    }
    return {name: (result - whole).abs().max().item() for name, result in results.items()}


if __name__ == "__main__":
    sys.exit(run_as_script(example))
