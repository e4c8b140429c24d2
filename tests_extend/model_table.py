"""Every toy of a model, on every algorithm, against CP = 1: the largest differences of losses and gradient norms.

    python tests_extend/model_table.py [model ...]
    MEGATRON_LM=/path/to/Megatron-LM python tests_extend/model_table.py "Gemma 3" --bf16

Trains with that checkout's own pretrain_gpt.py, unmodified, or with scripts/pretrain_gpt.py. Flags after the models go
to every run. Takes some minutes; exits with 1 where one differs by more than rounding.
"""

import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests_extend")]

from mindspeed_cp.testing.toy_models import TOY_MODELS  # noqa: E402
from system_tests.conftest import TrainingPool  # noqa: E402
from system_tests.model_cases import ALGORITHMS, Difference, model_runs  # noqa: E402


def main() -> int:
    """Print the table; the exit status."""
    names = [*takewhile(lambda word: not word.startswith("--"), sys.argv[1:])]
    if unknown := [name for name in names if name not in TOY_MODELS]:
        print(f"there is no toy of {unknown[0]!r}; there are {', '.join(TOY_MODELS)}.", file=sys.stderr)
        return 2
    further = tuple(sys.argv[1 + len(names) :])
    # In 16 bits a rounding may choose another expert.
    most = Difference(5e-3, 5e-2) if {"--bf16", "--fp16"} & {*further} else Difference(1e-5, 1e-3)
    training, failed = TrainingPool(), False
    print("| model | " + " | ".join(ALGORITHMS) + " |\n|---" + "|---" * len(ALGORITHMS) + "|")
    for name in names or TOY_MODELS:
        runs, cells = model_runs(training, name, further), []
        for algorithm in ALGORITHMS:
            found = runs.difference(algorithm)
            cells.append(f"{found.losses:.0e}, {found.gradients:.0e}")
            failed |= not (found.losses <= most.losses and found.gradients <= most.gradients)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    training.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
