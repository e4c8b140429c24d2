"""Ulysses sequence parallelism of an attention in BSND, by hand and with the library.

    torchrun --nproc-per-node 4 scripts/examples/ulysses.py

Each rank has a part of the tokens. An all-to-all gives it all tokens of a part of the heads, it attends, and another
one gives it its own tokens of all heads again. By hand the ranks divide the tokens; the library takes any number.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_as_script
from torch import Tensor

from mindspeed_cp.diffusion import MeshAttention, ParallelMesh, Shares, gather, split

BATCH, TOKENS, HEADS, HEAD_SIZE = 1, 64, 8, 16


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in BSND on one rank."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def exchange(x: Tensor, *, split_dim: int, concat_dim: int) -> Tensor:
    """Send the r-th part along one dim to rank r, and put what comes one after another along the other."""
    sent = [part.contiguous() for part in x.chunk(dist.get_world_size(), dim=split_dim)]
    received = [torch.empty_like(part) for part in sent]
    dist.all_to_all(received, sent)
    return torch.cat(received, dim=concat_dim)


@torch.no_grad()
def example(device: torch.device) -> dict[str, float]:
    """Largest differences."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # One whole tensor, the same on every rank, of which each takes its part.
    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, HEAD_SIZE).to(device) for _ in range(3))
    whole = attend(q, k, v)

    own = [x.chunk(size, dim=1)[rank] for x in (q, k, v)]
    heads = [exchange(x, split_dim=2, concat_dim=1) for x in own]
    out = exchange(attend(*heads), split_dim=1, concat_dim=2)
    parts = [torch.empty_like(out) for _ in range(size)]
    dist.all_gather(parts, out.contiguous())
    by_hand = torch.cat(parts, dim=1)

    mesh, tokens = ParallelMesh(ulysses=size), TOKENS - 1
    shares = [split(x[:, :tokens], mesh, dim=1) for x in (q, k, v)]
    out = MeshAttention(mesh)(*shares, dims="BSND")
    library = gather(out, Shares.of(tokens, size), mesh, dim=1)
    uneven = attend(q[:, :tokens], k[:, :tokens], v[:, :tokens])
    return {
        f"{TOKENS} tokens, by hand": (by_hand - whole).abs().max().item(),
        f"{tokens} tokens, MeshAttention": (library - uneven).abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(run_as_script(example))
