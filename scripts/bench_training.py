"""Tokens per second and peak memory of Megatron training at growing sequence length, for each way of holding it.

    python scripts/bench_training.py --tokens 1024 2048 4096 8192 --memory-gib 1 --plot training.png

Trains a small GPT on random tokens, on this machine's CPU ranks over gloo, with CP 1, CP 1 with full recomputation, and
every algorithm on `--ranks` ranks. Each run is a fresh set of processes. Time is the median of the iterations after the
first. Memory is the largest resident size of any rank, less that of a run with hardly a token, which is Python, torch
and Megatron: what is left grows with the sequence. A configuration that exceeds `--memory-gib` is not tried on longer
sequences.

The data loader makes no masks, which would grow with the square of the length: attention is causal anyway.
All ranks share this machine's cores, so that more ranks are not faster; what a network costs is measured by
bench_attention.py. CP 1 is Megatron's own local attention, which holds all scores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from mindspeed_cp.benchmark.training import Configuration, Measurement, configurations, plot, seconds_in, table
from mindspeed_cp.testing.toy_flags import TOY_FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_FLAGS = [*TOY_FLAGS, "--mock-data", "--global-batch-size", "1", "--distributed-backend", "gloo"]
MODEL_FLAGS += ["--no-create-attention-mask-in-dataloader"]


def train(configuration: Configuration, tokens: int, model: list[str], iterations: int) -> Measurement:
    """Train on sequences of `tokens`. Raises RuntimeError with the end of the log where the training fails."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(configuration.ranks),
    ]
    length = ["--seq-length", str(tokens), "--max-position-embeddings", str(tokens), "--train-iters", str(iterations)]
    command = [*launch, str(REPOSITORY / "scripts" / "pretrain_gpt.py"), *MODEL_FLAGS, *model, *length]
    command += configuration.flags
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"} | dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        # The usage of a process that has ended is the largest of its own and that of the ranks it has waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{configuration.name} with {tokens} tokens failed:\n{text[-3000:]}")
    return Measurement(configuration.name, tokens, seconds_in(text), usage.ru_maxrss / 1024)


def main() -> None:
    """Read the command line, train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="lengths of a sequence")
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel size, even and above 2 (4)")
    parser.add_argument("--memory-gib", type=float, default=1.0, help="memory of a rank above its start (1)")
    parser.add_argument("--iterations", type=int, default=4, help="of each run, the first of which is not counted (4)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of the configurations to measure (all)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file to append a line for each measurement to")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    args = parser.parse_args()
    if args.ranks < 4 or args.ranks % 2:
        parser.error(f"--ranks {args.ranks} is not even and above 2; use 4.")
    if bad := [tokens for tokens in args.tokens if tokens % (2 * args.ranks)]:
        parser.error(f"--tokens {bad[0]} is not a multiple of 2 * --ranks = {2 * args.ranks}.")

    model = ["--num-layers", str(args.layers), "--hidden-size", str(args.hidden_size)]
    model += ["--num-attention-heads", str(args.heads)]
    limit_mib, measurements, baseline_mib = args.memory_gib * 1024, [], {}
    for configuration in configurations(args.ranks):
        if args.only and configuration.name not in args.only:
            continue
        print(f"{configuration.name}: memory at the start", file=sys.stderr, flush=True)
        baseline_mib[configuration.name] = train(configuration, 4 * args.ranks, model, iterations=2).peak_mib
        for tokens in sorted(args.tokens):
            one = train(configuration, tokens, model, args.iterations)
            above = one.peak_mib - baseline_mib[configuration.name]
            line = f"{configuration.name}, {tokens} tokens: {one.tokens_per_second:.0f} tokens/s, {above:.0f} MiB"
            print(line, file=sys.stderr, flush=True)
            measurements.append(one)
            if args.json:
                with args.json.open("a") as lines:
                    lines.write(json.dumps(asdict(one) | {"mib_above_start": above}) + "\n")
            if above > limit_mib:
                break
    print(table(measurements, baseline_mib, limit_mib))
    if args.plot:
        plot(measurements, baseline_mib, limit_mib, args.plot)


if __name__ == "__main__":
    main()
