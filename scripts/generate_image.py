"""Paint a picture or a clip on a mesh of ranks, with a pipeline of diffusers as it is.

    torchrun --nproc-per-node 4 scripts/generate_image.py --cfg 2 --ulysses 2 --prompt "red circle"
    torchrun --nproc-per-node 4 scripts/generate_image.py --cfg 2 --ring 2 --kind clip --compare

The model paints coloured shapes; the first run trains it, in minutes, and keeps it in --models. --compare paints on one
rank too, shows both side by side, and exits with 1 where they differ by more than rounding.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from mindspeed_cp.diffusion import ParallelMesh
from mindspeed_cp.diffusion.pipeline import parallelize_pipeline

try:
    from shapes_model import paint, pipeline, train
except ModuleNotFoundError as error:
    print(f"generate_image.py: error: {error}; pip install '.[diffusion]' in a clone brings it along.", file=sys.stderr)
    raise SystemExit(2) from None

TOLERANCE, SCALE = 1e-3, 6


def write_png(frames: list[Tensor], path: Path) -> None:
    """Rows of frames [F, 3, H, W] below each other, enlarged."""
    rows = torch.cat([torch.cat(list(row), dim=-1) for row in frames], dim=-2)
    pixels = (255 * rows.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    height, width, _ = pixels.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST).save(path)


def main() -> int:
    """Read the command line, paint, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis, what in (("cfg", "branches"), ("ring", "tokens"), ("ulysses", "tokens and heads"), ("tp", "weights")):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"ranks that share {what}")
    parser.add_argument("--kind", choices=("picture", "clip"), default="picture")
    parser.add_argument("--prompt", nargs="+", default=["red circle"], help="a colour and a shape; a row for each")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="paint on one rank too, and show both")
    parser.add_argument("--output", type=Path, default=Path("runs/picture.png"))
    parser.add_argument("--models", type=Path, default=Path("runs/shapes"), help="where trained models are kept")
    parser.add_argument("--train-steps", type=int, default=1500)
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    try:
        mesh = ParallelMesh(cfg=args.cfg, ring=args.ring, ulysses=args.ulysses, tp=args.tp)
        options = {"guidance": args.guidance, "steps": args.steps, "seed": args.seed}
        if rank == 0:
            train(args.kind, args.models / f"{args.kind}.pt", args.train_steps, print)
        if dist.is_initialized():
            dist.barrier()  # The others read what rank 0 has written.
        model = train(args.kind, args.models / f"{args.kind}.pt", args.train_steps, print)
        alone = pipeline(args.kind, copy.deepcopy(model))
        shared = pipeline(args.kind, model)
        parallelize_pipeline(shared, mesh)
        frames, difference = [], 0.0
        for prompt in args.prompt:
            found = paint(args.kind, shared, prompt, **options)
            expected = paint(args.kind, alone, prompt, **options) if args.compare and rank == 0 else found
            difference = max(difference, (found - expected).abs().max().item())
            # A clip below that of one rank, a picture beside it.
            pair = [expected, found] if args.compare else [found]
            frames += pair if args.kind == "clip" else [torch.cat(pair)]
    except ValueError as error:
        parser.error(str(error))
    if rank == 0:
        write_png(frames, args.output)
        sent = {axis: traffic.bytes_sent.total() for axis, traffic in mesh.traffic.items()}
        bytes_sent = (
            ", ".join(f"{axis} {number / 1024:.0f} KiB" for axis, number in sent.items() if number) or "nothing"
        )
        print(f"{mesh.shape}: {args.output}; rank 0 has sent {bytes_sent}")
        if args.compare:
            print(f"largest difference from one rank: {difference:.1e} of 1")
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
