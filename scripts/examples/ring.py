"""Ring sequence parallelism of an attention in BSND, by hand and with the library.

    torchrun --nproc-per-node 4 scripts/examples/ring.py

Each rank keeps its queries, and keys and values go once around. A rank's outputs over the blocks are merged by their
log-sum-exps: out = sum of exp(lse_i - lse) out_i. Adding up the outputs themselves would be wrong, since each is
divided by the sum of its own block's weights.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launch import run_as_script
from torch import Tensor

from mindspeed_cp.diffusion import MeshAttention, ParallelMesh, Shares, gather

BATCH, TOKENS, HEADS, HEAD_SIZE = 1, 64, 4, 16


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in BNSD, and the log-sum-exp [B, N, S] of each query's scores."""
    scores = q @ k.mT / q.size(-1) ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def pass_on(kv: Tensor) -> Tensor:
    """Send a block to the next rank, and take that of the one before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(kv)
    # The receive is posted first, and both at once: sends that wait for each other around a ring would never end.
    messages = [
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
        dist.P2POp(dist.isend, kv, (rank + 1) % size),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return received


@torch.no_grad()
def example(device: torch.device) -> dict[str, float]:
    """Largest differences."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, TOKENS, HEADS, HEAD_SIZE).to(device) for _ in range(3))
    whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    own_q, own_k, own_v = (x.chunk(size, dim=1)[rank] for x in (q, k, v))
    kv = torch.stack([own_k.transpose(1, 2), own_v.transpose(1, 2)]).contiguous()
    out, lse = attend_with_lse(own_q.transpose(1, 2), *kv)
    for _ in range(size - 1):
        kv = pass_on(kv)
        block, block_lse = attend_with_lse(own_q.transpose(1, 2), *kv)
        both = torch.logaddexp(lse, block_lse)
        out = (lse - both).exp()[..., None] * out + (block_lse - both).exp()[..., None] * block
        lse = both

    mesh, shares = ParallelMesh(ring=size), Shares.of(TOKENS, size)
    by_hand = gather(out.transpose(1, 2), shares, mesh, dim=1)
    library = gather(MeshAttention(mesh)(own_q, own_k, own_v, dims="BSND"), shares, mesh, dim=1)
    return {
        "by hand": (by_hand - whole).abs().max().item(),
        "MeshAttention": (library - whole).abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(run_as_script(example))
