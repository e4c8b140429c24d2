"""Train a tiny GPT in every kind of tensor parallelism, on virtual ranks, and compare the losses with one rank's.

    python scripts/tensor_parallel_gpt.py --steps 100 --plot docs/images/tensor_parallel_losses.png
    python scripts/tensor_parallel_gpt.py --mode 3d --steps 20 --dtype bfloat16

Exits with 1 where losses are further from one rank's than --tolerance.
"""

import argparse
import sys
from pathlib import Path

import torch

from mindspeed_cp.tensor_parallel import TensorMesh, on_virtual_ranks, plan_mesh
from mindspeed_cp.testing.tiny_gpt import GPT, ShardedGPT, Sizes, train

MESHES: dict[str, tuple[str, int, dict[str, int]]] = {
    "1d": ("1d", 4, {}),
    "1d-sp": ("1d-sp", 4, {}),
    "2d": ("2d", 4, {}),
    "2.5d": ("2.5d", 8, {"depth": 2}),
    "3d": ("3d", 8, {}),
    "xy": ("xy", 4, {"x": 4}),
}
"""Kind, ranks and sizes by what --mode calls them. With y above 1 attention is context parallel, which tests do."""


def losses_of(mode: str, sizes: Sizes, steps: int, dtype: torch.dtype) -> list[float]:
    """Losses of so many steps, which are the same on all ranks."""
    kind, ranks, mesh_sizes = MESHES[mode]

    def run(mesh: TensorMesh) -> list[float]:
        return train(ShardedGPT(GPT(sizes).to(dtype), mesh), sizes, range(steps))

    by_rank = on_virtual_ranks(run, *plan_mesh(kind, ranks, **mesh_sizes), timeout_s=600.0)  # type: ignore[arg-type]
    assert all(losses == by_rank[0] for losses in by_rank), "ranks have different losses"
    return by_rank[0]


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """All curves on one picture. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, losses) in enumerate(curves.items()):
        # Curves lie upon each other: dashes of their own let each be seen.
        dashes = (2 * place - 2, (2, 10))
        style = {"linestyle": dashes, "linewidth": 2} if place else {"linewidth": 6, "alpha": 0.25}
        axes.plot(range(len(losses)), losses, label=name, **style)
    axes.set(xlabel="step", ylabel="loss", title="A tiny GPT in every kind of tensor parallelism")
    axes.legend(handlelength=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Read the command line, train, print a table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=tuple(MESHES), nargs="+", default=list(MESHES))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32")
    parser.add_argument("--gated", action="store_true", help="SwiGLU instead of GELU")
    parser.add_argument("--tied", action="store_true", help="the head's weight is the embedding's table")
    parser.add_argument("--tolerance", type=float, help="1e-6, in bfloat16 0.05")
    parser.add_argument("--plot", type=Path, help="where to draw the losses")
    args = parser.parse_args()
    dtype, sizes = getattr(torch, args.dtype), Sizes(gated=args.gated, tied=args.tied)
    tolerance = args.tolerance or (0.05 if dtype is torch.bfloat16 else 1e-6)
    whole = GPT(sizes).to(dtype)
    curves = {"one rank": train(whole, sizes, range(args.steps))}
    print(f"one rank: loss {curves['one rank'][0]:.6f} to {curves['one rank'][-1]:.6f}")
    worst = 0.0
    for mode in args.mode:
        curves[mode] = losses_of(mode, sizes, args.steps, dtype)
        difference = max(abs(a - b) for a, b in zip(curves[mode], curves["one rank"], strict=True))
        print(f"{mode} on {MESHES[mode][1]} ranks: loss {curves[mode][-1]:.6f}, at most {difference:.1e} from one rank")
        worst = max(worst, difference)
    if args.plot:
        plot(curves, args.plot)
    return int(not worst <= tolerance)


if __name__ == "__main__":
    sys.exit(main())
