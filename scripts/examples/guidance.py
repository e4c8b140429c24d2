"""The branches of classifier-free guidance on different ranks, by hand and with the library.

    torchrun --nproc-per-node 4 scripts/examples/guidance.py

Without it a step predicts twice, with the prompt and without. Here rank i predicts branch i, one message a step gives
every rank both, and all of them take the same step. By hand on the first two ranks; with the library three branches on
all.
"""

import sys

import torch
import torch.distributed as dist
from launch import run_as_script
from torch import Tensor

from mindspeed_cp.diffusion import GuidanceParallel, ParallelMesh, guide
from mindspeed_cp.testing.tiny_dit import TinyDiT

STEPS, SCALE = 4, 3.0


@torch.no_grad()
def example(device: torch.device) -> dict[str, float]:
    """Largest differences."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # One model, one noise and one set of prompts on every rank.
    model = TinyDiT(width=32, heads=4, layers=1).to(device)
    noise = torch.randn(1, 20, 4).to(device)
    negative, positive, style = (torch.randn(1, 5, 32).to(device) for _ in range(3))

    def denoise(predict_all) -> Tensor:
        x = noise
        for step in range(STEPS):
            x = x - predict_all(x, torch.full((1,), 1 - step / STEPS, device=device)) / STEPS
        return x

    def on_one_rank(x: Tensor, time: Tensor) -> Tensor:
        return guide(model(x, time, positive), model(x, time, negative), SCALE)

    def by_hand(x: Tensor, time: Tensor) -> Tensor:
        mine = model(x, time, positive if rank == 1 else negative)
        branches = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(branches, mine)
        return guide(branches[1], branches[0], SCALE)

    def combine(negative: Tensor, positive: Tensor, style: Tensor) -> Tensor:
        return guide(positive, negative, SCALE) + 0.5 * (style - negative)

    guidance = GuidanceParallel(ParallelMesh(cfg=size))

    def with_library(x: Tensor, time: Tensor) -> Tensor:
        branches = [{"x": x, "time": time, "text": text} for text in (negative, positive, style)]
        return guidance(model, branches, combine)

    def three_on_one_rank(x: Tensor, time: Tensor) -> Tensor:
        return combine(*(model(x, time, text) for text in (negative, positive, style)))

    return {
        "two branches, by hand": (denoise(by_hand) - denoise(on_one_rank)).abs().max().item(),
        "three branches, GuidanceParallel": (denoise(with_library) - denoise(three_on_one_rank)).abs().max().item(),
    }


if __name__ == "__main__":
    sys.exit(run_as_script(example))
