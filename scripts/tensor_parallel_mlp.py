"""An MLP 256 -> 1024 -> 256 in any kind of tensor parallelism: the shapes of each rank, and the difference from one.

    python scripts/tensor_parallel_mlp.py --mode 2.5d --ranks 8 --depth 2       # ranks are threads of this process
    torchrun --nproc-per-node 4 scripts/tensor_parallel_mlp.py --mode 2d        # ranks are processes, over gloo

Exits with 1 where the outputs or gradients are not those of one rank.
"""

import argparse
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mindspeed_cp.tensor_parallel import (
    KINDS,
    MLP,
    Dropout,
    Sharded,
    TensorMesh,
    on_virtual_ranks,
    plan_mesh,
    shard,
    unshard,
)
from mindspeed_cp.tensor_parallel.checkpoint import gather_parts

DIM, BATCH, TOLERANCE = 256, 16, 1e-4


class Shown(NamedTuple):
    """What one rank has to show. differences: the largest from one rank, by name."""

    lines: list[str]
    differences: dict[str, float]
    bytes_sent: int


def run(mesh: TensorMesh) -> Shown:
    """The MLP on one rank of a mesh, forward and backward."""
    # Virtual ranks share torch's own generator: what has to be the same on all of them comes from one of each.
    generator = torch.Generator().manual_seed(0)
    whole = nn.ModuleDict({"fc1": nn.Linear(DIM, 4 * DIM), "fc2": nn.Linear(4 * DIM, DIM)})
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    full_x = torch.randn(BATCH, DIM, generator=generator)

    mlp = MLP(whole["fc1"], whole["fc2"], mesh)
    dropout = Dropout(0.1, mesh, generator=torch.Generator().manual_seed(0))
    x = shard(full_x, mesh.kind.outer, mesh)
    hidden = mlp.fc1(x)
    y: Sharded = mlp(x)
    lines = [
        f"Weight of the first linear layer: {tuple(mlp.fc1.weight.shape)}",
        f"Weight of the second linear layer: {tuple(mlp.fc2.weight.shape)}",
        f"Input: {tuple(x.local.shape)}, {x.layout}",
        f"Output of the first linear layer: {tuple(hidden.local.shape)}, {hidden.layout}",
        f"Output of the second linear layer: {tuple(y.local.shape)}, {y.layout}",
        f"Output of the dropout: {tuple(dropout(y).local.shape)}",
    ]
    mesh.traffic.clear()
    y = mlp(x)
    y.local.square().sum().backward()
    bytes_sent = sum(mesh.traffic.bytes_sent.values())

    exact = whole["fc2"](F.gelu(whole["fc1"](full_x)))
    exact.square().sum().backward()
    found = gather_parts(mlp, {name: each.grad for name, each in mlp.named_parameters()})
    expected = {name: each.grad for name, each in whole.named_parameters()}
    pairs = {name: (found[name], expected[name]) for name in expected} | {"output": (unshard(y, mesh), exact.detach())}
    return Shown(lines, {name: _difference(*pair) for name, pair in pairs.items()}, bytes_sent)


def _difference(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative norm."""
    return ((value - exact).norm() / exact.norm()).item()


def main() -> int:
    """Read the command line, run, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=tuple(KINDS), default="2d")
    parser.add_argument("--ranks", type=int, default=4, help="without torchrun: virtual ranks")
    for name, of in (("depth", "2.5d"), ("x", "xy"), ("y", "xy")):
        parser.add_argument(f"--{name}", type=int, help=f"size of this axis of {of}")
    args = parser.parse_args()
    shows = True
    sizes = {"depth": args.depth, "x": args.x, "y": args.y}
    try:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo")
            mesh = TensorMesh.build(args.mode, **sizes)
            results = [run(mesh)]
            shows = dist.get_rank() == 0
            dist.destroy_process_group()
        else:
            results = on_virtual_ranks(run, *plan_mesh(args.mode, args.ranks, **sizes))
    except ValueError as error:
        parser.error(str(error))
    if shows:
        result = results[0]
        worst = max(result.differences, key=result.differences.__getitem__)
        print("\n".join(result.lines))
        print(f"Sent by rank 0, forward and backward: {result.bytes_sent / 1024:.1f} KiB")
        print(f"Largest difference from one rank: {result.differences[worst]:.1e} of {worst}")
    return int(any(max(result.differences.values()) > TOLERANCE for result in results))


if __name__ == "__main__":
    sys.exit(main())
