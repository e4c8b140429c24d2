"""Meshes to run on, and denoising with the small transformer of mindspeed_cp/testing/tiny_dit.py."""

import copy
from itertools import product

import torch
from torch import Tensor

from mindspeed_cp.diffusion import (
    Gather,
    GuidanceParallel,
    MeshShape,
    ParallelMesh,
    Split,
    TransformerPlan,
    guide,
    parallelize,
)
from mindspeed_cp.testing.tiny_dit import TinyDiT

MESHES = [
    shape
    for cfg, ring, ulysses, tp in product((1, 2, 3), (1, 2, 4), (1, 2, 4), (1, 2))
    if (shape := MeshShape(cfg=cfg, ring=ring, ulysses=ulysses, tp=tp)).size <= 8
]
SOME_MESHES = [
    MESHES[0],
    *(each for each in MESHES if each.size in (2, 6)),
    *[each for each in MESHES if each.size == 8][::3],
]
ODD_MESHES = [MeshShape(ring=3), MeshShape(cfg=2, ring=3), MeshShape(ring=7), MeshShape(ulysses=2, ring=3)]

HEIGHT, WIDTH, TEXT, STEPS = 17, 23, 5, 4


def plan(*, joint: bool = False) -> TransformerPlan:
    """Where TinyDiT's tokens and layers are split."""
    columns = {"blocks.*.attn.qkv": 3, "blocks.*.fc1": 1} | (
        {} if joint else {"blocks.*.cross.q": 1, "blocks.*.cross.kv": 2}
    )
    return TransformerPlan(
        splits=(Split("blocks.0", "x"), *([Split("blocks.0", "text")] * joint)),
        gathers=(Gather("final", "x"),),
        columns=columns,
        rows={"blocks.*.proj": (), "blocks.*.fc2": ()},
        heads="num_heads",
    )


def model(*, joint: bool, dtype: torch.dtype = torch.float64) -> TinyDiT:
    """The same weights each time, whichever thread asks."""
    made = TinyDiT(width=32, heads=8, layers=1, joint=joint).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return made


def inputs(dtype: torch.dtype = torch.float64, tokens: int = HEIGHT * WIDTH) -> tuple[Tensor, list[Tensor]]:
    """Noise, and the prompts of three branches."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, tokens, 4, generator=generator, dtype=torch.float64)
    return noise.to(dtype), [
        torch.randn(1, TEXT, 32, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    ]


@torch.no_grad()
def denoised(
    mesh: ParallelMesh, whole: TinyDiT, *, joint: bool, branches: int = 2, tokens: int = HEIGHT * WIDTH
) -> Tensor:
    """Tokens after some steps from the same noise, guided."""
    made = copy.deepcopy(whole)
    parallelize(made, mesh, plan(joint=joint))
    guidance = GuidanceParallel(mesh)
    x, prompts = inputs(next(whole.parameters()).dtype, tokens)

    def combine(negative: Tensor, positive: Tensor, *others: Tensor) -> Tensor:
        guided = guide(positive, negative, 3.0, rescale=0.5)
        return guided + sum((each - negative for each in others), torch.zeros_like(guided))

    for step in range(STEPS):
        time = torch.full((1,), 1 - step / STEPS, dtype=x.dtype)
        each = [{"x": x, "time": time, "text": prompts[number]} for number in range(branches)]
        x = x - guidance(made, each, combine) / STEPS
    return x
