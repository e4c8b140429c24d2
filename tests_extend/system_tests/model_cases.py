"""Training on every algorithm against CP = 1, losses and gradient norms; of toys of models people train."""

import re
from typing import NamedTuple, Protocol

from mindspeed_cp.testing.toy_flags import TOY_FLAGS
from mindspeed_cp.testing.toy_models import TOY_MODELS, sizes
from system_tests.compare_losses import GRADIENT_NORM, ITERATION, losses_in, relative_difference

LENGTH = 64
DATA = (
    "--mock-data",
    "--global-batch-size",
    "2",
    "--distributed-backend",
    "gloo",
    "--distributed-timeout-minutes",
    "4",
)
FOUR_RANKS = ("--context-parallel-size", "4")
ALGORITHMS = {
    "Ulysses": (*FOUR_RANKS, "--context-parallel-algo", "ulysses_cp_algo"),
    "ring": (*FOUR_RANKS, "--context-parallel-algo", "megatron_cp_algo"),
    "double ring": (*FOUR_RANKS, "--context-parallel-algo", "megatron_cp_algo", "--cp-window-size", "2"),
    "hybrid": (*FOUR_RANKS, "--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", "2"),
}
"""By the name of the algorithm, with its flags."""


class Trains(Protocol):
    """Runs a training script: system_tests.conftest.TrainingPool."""

    def log(self, ranks: int, flags: tuple[str, ...], sabotage: str | None = None) -> str:
        """What it prints."""
        ...


class Difference(NamedTuple):
    """Largest relative differences from CP = 1, as far as a log's digits show them: seven of a loss, three after the
    point of a gradient norm."""

    losses: float
    gradients: float


class Runs:
    """Trains on one rank once, and with algorithms of ALGORITHMS on four.

    alone: flags of the run on one rank, in the place of an algorithm's.
    """

    def __init__(self, training: Trains, flags: tuple[str, ...], alone: tuple[str, ...] = ()) -> None:
        self._training, self._flags = training, flags
        self._alone = training.log(1, (*flags, *alone))

    def difference(self, algorithm: str, sabotage: str | None = None) -> Difference:
        """Of training on four ranks from training on one. sabotage: breaks the library on the four."""
        return difference(self._alone, self._training.log(4, (*self._flags, *ALGORITHMS[algorithm]), sabotage))


def model_runs(training: Trains, name: str, further: tuple[str, ...] = ()) -> Runs:
    """Those of one toy."""
    return Runs(training, (*TOY_FLAGS, *sizes(LENGTH), *DATA, *TOY_MODELS[name].flags, *further))


def difference(alone: str, shared: str) -> Difference:
    """Of one log from another."""
    return Difference(*(_largest(alone, shared, line) for line in (ITERATION, GRADIENT_NORM)))


def _largest(alone: str, shared: str, line: re.Pattern[str]) -> float:
    one, other = losses_in(alone, line), losses_in(shared, line)
    if not one or one.keys() != other.keys():
        return float("inf")
    return max(relative_difference(one[i], other[i]) for i in one)
