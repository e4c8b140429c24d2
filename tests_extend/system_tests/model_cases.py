"""Toys of models people train, on every algorithm against CP = 1: losses and gradient norms."""

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

    def log(self, ranks: int, flags: tuple[str, ...]) -> str:
        """What it prints."""
        ...


class Difference(NamedTuple):
    """Largest relative differences from CP = 1, as far as a log's digits show them: seven of a loss, three after the
    point of a gradient norm."""

    losses: float
    gradients: float


class ModelRuns:
    """Trains one toy with CP = 1 once, and with algorithms of ALGORITHMS."""

    def __init__(self, training: Trains, name: str, further: tuple[str, ...] = ()) -> None:
        self._training = training
        self._flags = (*TOY_FLAGS, *sizes(LENGTH), *DATA, *TOY_MODELS[name].flags, *further)
        self._alone = training.log(1, self._flags)

    def difference(self, algorithm: str) -> Difference:
        """Of training on four ranks from training on one."""
        log = self._training.log(4, (*self._flags, *ALGORITHMS[algorithm]))
        return Difference(self._largest(log, ITERATION), self._largest(log, GRADIENT_NORM))

    def _largest(self, log: str, line: re.Pattern[str]) -> float:
        alone, shared = losses_in(self._alone, line), losses_in(log, line)
        if not alone or alone.keys() != shared.keys():
            return float("inf")
        return max(relative_difference(alone[i], shared[i]) for i in alone)
