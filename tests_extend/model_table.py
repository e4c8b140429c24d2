"""Every toy of a model, on every algorithm, against CP = 1: the largest differences of losses and gradient norms.

    python tests_extend/model_table.py [model ...]
    MEGATRON_LM=/path/to/Megatron-LM python tests_extend/model_table.py "Gemma 3" --bf16

Trains with that checkout's own pretrain_gpt.py, unmodified, or with scripts/pretrain_gpt.py. Flags after the models go
to every run. Takes some minutes; exits with 1 where one differs by more than rounding: in 16 bits that is four times
what CP = 1 differs by from itself in other orders of sums, which is then a column of its own.
"""

import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests_extend")]

from mindspeed_cp.testing.toy_models import TOY_MODELS  # noqa: E402
from system_tests.conftest import TrainingPool  # noqa: E402
from system_tests.model_cases import ALGORITHMS, MOST, TIMES_NOISE, model_runs  # noqa: E402


def main() -> int:
    """Print the table; the exit status."""
    names = [*takewhile(lambda word: not word.startswith("--"), sys.argv[1:])]
    if unknown := [name for name in names if name not in TOY_MODELS]:
        print(f"there is no toy of {unknown[0]!r}; there are {', '.join(TOY_MODELS)}.", file=sys.stderr)
        return 2
    further = tuple(sys.argv[1 + len(names) :])
    in_16_bits = bool({"--bf16", "--fp16"} & {*further})
    training, failed = TrainingPool(), False
    columns = [*(["CP = 1, other orders"] * in_16_bits), *ALGORITHMS]
    print("| model | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name in names or TOY_MODELS:
        runs, cells, most = model_runs(training, name, further), [], MOST
        if in_16_bits:
            noise = runs.noise()
            cells.append(str(noise))
            most = noise.times(TIMES_NOISE)
        for algorithm in ALGORITHMS:
            found = runs.difference(algorithm)
            cells.append(str(found))
            failed |= not found.within(most)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    training.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
