"""What the resident memory of a training consists of, for each algorithm and with glibc told to give back what is free.

    python scripts/bench_resident.py --tokens 4096

Trains as bench_training.py does, through Megatron on this machine's CPU ranks, each way once with `--tokens` and once
with hardly any. In MiB of the largest rank, column by column; see Resident in mindspeed_cp/benchmark/resident.py.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from mindspeed_cp.benchmark.resident import watched
from mindspeed_cp.benchmark.training import Configuration, configurations
from mindspeed_cp.testing.toy_flags import TOY_FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL_FLAGS = [*TOY_FLAGS, "--mock-data", "--global-batch-size", "1", "--distributed-backend", "gloo"]
MODEL_FLAGS += ["--no-create-attention-mask-in-dataloader", "--num-layers", "4", "--hidden-size", "256"]
MODEL_FLAGS += ["--num-attention-heads", "8"]
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MALLOC: dict[str, dict[str, str]] = {"as it is": {}, "gives back": GIVES_BACK}
COLUMNS = ["peak", "in_use", "end", "free", "trimmed", "files", "stacks", "threads"]


def run_as_rank(folder: Path) -> None:
    """Train as torchrun has started this process, and leave what was measured in a file."""
    with watched() as found:
        runpy.run_path(str(REPOSITORY / "scripts" / "pretrain_gpt.py"), run_name="__main__")
    (folder / os.environ["RANK"]).write_text(json.dumps(asdict(found)))


def train(configuration: Configuration, tokens: int, malloc: dict[str, str], iterations: int) -> dict[str, float]:
    """The largest of all ranks, by column. Raises RuntimeError with the end of the log where the training fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(configuration.ranks), __file__, "--as-rank"]
    length = ["--seq-length", str(tokens), "--max-position-embeddings", str(tokens), "--train-iters", str(iterations)]
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"} | dict(os.environ) | malloc
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, folder, *MODEL_FLAGS, *length, *configuration.flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    if done.returncode or len(ranks) != configuration.ranks:
        raise RuntimeError(f"{configuration.name} with {tokens} tokens failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return {column: max(rank[column] for rank in ranks) for column in COLUMNS}


def main() -> None:
    """Read the command line, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence")
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel size, even and above 2")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["ring, CP 4", "Ulysses, CP 4"])
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=list(MALLOC))
    parser.add_argument("--iterations", type=int, default=3)
    args = parser.parse_args()
    print(f"| | malloc | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    for configuration in (each for each in configurations(args.ranks) if each.name in args.only):
        for name in args.malloc:
            few = train(configuration, 4 * args.ranks, MALLOC[name], args.iterations)
            many = train(configuration, args.tokens, MALLOC[name], args.iterations)
            for tokens, cells in ((4 * args.ranks, few), (args.tokens, many)):
                numbers = " | ".join(f"{cells[column]:.0f}" for column in COLUMNS)
                print(f"| {configuration.name}, {tokens} tokens | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    if "--as-rank" in sys.argv:
        place = sys.argv.index("--as-rank")
        folder = Path(sys.argv[place + 1])
        del sys.argv[place : place + 2]
        run_as_rank(folder)
    else:
        main()
