"""How near one rank of a ring comes to its attention kernel, measured on a single GPU.

    python scripts/bench_one_gpu.py --json runs/bench.jsonl --plot runs/bench.png   # all of it, on the GPU that is here
    python scripts/bench_one_gpu.py --kernels all --tokens 8192 --ranks 8           # every kernel that can compute it
    python scripts/bench_one_gpu.py --merge torch                                   # without the fused merge
    python scripts/bench_one_gpu.py --device cpu                                    # small sizes: a smoke test

with mindspeed_cp installed, or PYTHONPATH=. in a checkout; pictures need matplotlib.

One rank of a causal zigzag ring is run by the library's own code, forward and backward, with a communicator that moves
nothing: the time is that of kernels, merges, accumulation, packing and Python, as if every message arrived in time. It
is held against the same kernel on the whole sequence in one call, divided by the number of ranks: what attention
without any context parallelism would take for the rank's share. Where the whole sequence does not fit into memory, the
dense call is of about the rank's own FLOPs, and the table marks it.

Ranks differ in the shape of their work, not in its amount: the first one has half its queries over whole blocks, the
last one all its queries over half blocks, those between have some of each. The first and the last are measured, and the
slower one counts. Times are medians after a warm-up; Python counts as far as the GPU waits for it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mindspeed_cp.benchmark.one_gpu import Kernels, RingCase, Row, draw, empty_cache, environment, measure, table
from mindspeed_cp.device import accelerator
from mindspeed_cp.kernels import KERNELS, MERGE_KERNELS, KernelRegistry, choose_merge_kernel

ON_GPU = {"tokens": [4096, 8192, 16384, 32768], "ranks": [2, 4, 8], "heads": ["32:32", "64:8"], "head_size": 128}
ON_CPU = {"tokens": [128, 256], "ranks": [2, 4], "heads": ["4:4", "8:2"], "head_size": 64}
"""Sizes that are measured by default."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked, sizes filled in; cases and registries of kernels as `cases` and `registries`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "npu", "cpu"), default=accelerator() or "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", help="sizes of the ring")
    parser.add_argument("--heads", nargs="+", metavar="N:G", help="query heads, and key/value heads")
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--kernels",
        nargs="+",
        metavar="NAME",
        help="measure each of these by itself, or `all`; else those that are chosen",
    )
    parser.add_argument(
        "--merge", choices=[kernel.name for kernel in MERGE_KERNELS], help="what merges blocks; else what is chosen"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each time is measured, at least")
    parser.add_argument("--json", type=Path, help="file to write a line for each case to")
    parser.add_argument("--plot", type=Path, help="PNG to draw percent of dense into")
    args = parser.parse_args(argv)

    here = accelerator() or "cpu"
    if args.device not in (here, "cpu"):
        parser.error(f"--device {args.device} is not on this machine; use {here}.")
    for name, default in (ON_CPU if args.device == "cpu" else ON_GPU).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if odd := [tokens for tokens in args.tokens if tokens < 2 or tokens % 2]:
        parser.error(
            f"--tokens {odd[0]} is not a multiple of the 2 chunks that a rank holds; use {max(2, odd[0] + 1)}."
        )
    if alone := [size for size in args.ranks if size < 2]:
        parser.error(f"--ranks {alone[0]}: a ring has 2 ranks or more.")
    try:
        heads = [(num_heads, num_kv_heads) for num_heads, num_kv_heads in (map(int, x.split(":")) for x in args.heads)]
        fitting = all(num_kv_heads > 0 and num_heads % num_kv_heads == 0 for num_heads, num_kv_heads in heads)
    except ValueError:
        fitting = False
    if not fitting:
        parser.error(f"--heads {' '.join(args.heads)}: query heads, a multiple of the key/value heads, like 32:8.")
    try:
        args.registries = _registries(args.kernels)
    except ValueError as error:
        parser.error(f"--kernels: {error}")
    dtype = getattr(torch, args.dtype)
    merge_kernels = [kernel for kernel in MERGE_KERNELS if args.merge in (None, kernel.name)]
    try:
        args.merge = choose_merge_kernel(args.device, dtype, merge_kernels).name
    except NotImplementedError as error:
        parser.error(f"--merge {args.merge}: {error}")
    args.cases = [
        RingCase(num_ranks, tokens, *each, args.head_size, dtype, args.device)
        for each, num_ranks, tokens in itertools.product(heads, args.ranks, args.tokens)
    ]
    return args


def _registries(names: Sequence[str] | None) -> dict[str, KernelRegistry]:
    if names is None:
        return {"chosen kernels": KERNELS}
    return {name: KERNELS.only([name]) for name in (KERNELS.names if names == ["all"] else names)}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, measure, print and draw; the exit status, 1 where nothing could be measured."""
    args = parse_arguments(argv)
    machine = environment(args.device)
    title = ", ".join(
        [machine["date"], machine["device_name"], *(f"{name} {machine[name]}" for name in ("torch", "cuda", "cudnn"))]
    )
    if args.device == "cpu":
        title += "\nCPU: a smoke test at small sizes, no statement about a GPU"
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("")
    rows: list[Row] = []
    left_out: list[str] = []
    choices: dict[tuple[str, ...], str] = {}
    runs = list(itertools.product(args.cases, args.registries.items()))
    for number, (case, (name, kernels)) in enumerate(runs, start=1):
        print(f"{number}/{len(runs)}  {case}, {name}", end="  ", file=sys.stderr, flush=True)
        try:
            row = measure(case, Kernels(kernels, args.merge), args.seconds)
        except RuntimeError as error:  # No kernel for it, no memory, a kernel that fails: the others are worth having.
            left_out.append(f"{case}, {name}: {type(error).__name__}: {error}")
            print(f"left out: {type(error).__name__}", file=sys.stderr)
            continue
        finally:
            empty_cache(args.device)
        rows.append(row)
        for block in (*case.blocks(0), *case.blocks(case.num_ranks - 1)):
            choices.setdefault((name, case.heads, kernels.choose(block).name), kernels.explain(block))
        print(f"{row.forward_and_backward.percent_of_dense:.1f} % of dense", file=sys.stderr)
        if args.json:
            with args.json.open("a") as file:
                print(json.dumps({**machine, **row.record()}), file=file)

    if rows:
        print(title, table(rows), *choices.values(), sep="\n\n")
    if left_out:
        print("", "Left out:", *left_out, sep="\n")
    if rows and args.plot:
        draw(rows, title, args.plot)
        print(f"\ndrawn into {args.plot}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
