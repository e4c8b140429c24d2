"""A diffusion transformer of one's own on a mesh: where its tokens are split and gathered, and its layers by name.

    torchrun --nproc-per-node 4 scripts/examples/own_dit.py

The model is mindspeed_cp/testing/tiny_dit.py, which knows nothing of ranks, and stays as it is.
"""

import copy
import sys

import torch
import torch.distributed as dist
from launch import run_as_script

from mindspeed_cp.diffusion import Gather, ParallelMesh, Split, TransformerPlan, parallelize
from mindspeed_cp.testing.tiny_dit import TinyDiT

PLAN = TransformerPlan(
    splits=(Split("blocks.0", "x"),),
    gathers=(Gather("final", "x"),),
    # For tensor parallelism: layers by columns, with the blocks their outputs consist of (q, k and v), and by rows.
    columns={"blocks.*.attn.qkv": 3, "blocks.*.cross.q": 1, "blocks.*.cross.kv": 2, "blocks.*.fc1": 1},
    rows={"blocks.*.proj": (), "blocks.*.fc2": ()},
    heads="num_heads",
)


@torch.no_grad()
def example(device: torch.device) -> dict[str, float]:
    """Largest differences."""
    size = dist.get_world_size()
    torch.manual_seed(0)
    model = TinyDiT(width=64, heads=8).to(device)
    inputs = [torch.randn(1, 35, 4).to(device), torch.ones(1, device=device), torch.randn(1, 5, 64).to(device)]
    whole = model(*inputs)
    differences = {}
    for sizes in ({"ulysses": size}, {"ring": size}, {"tp": size}, {"ring": size // 2, "tp": 2}):
        mesh = ParallelMesh(**sizes)
        parallel = copy.deepcopy(model)
        parallelize(parallel, mesh, PLAN)
        differences[str(mesh.shape)] = (parallel(*inputs) - whole).abs().max().item()
    return differences


if __name__ == "__main__":
    sys.exit(run_as_script(example))
