"""Fixtures of all system tests."""

import contextlib
import functools
import random
import socket
from collections.abc import Iterator, Sequence

import pytest
import torch

from mindspeed_cp.testing.rank_pool import LIMIT_S, RankFailure, RankPool
from preload import PRELOAD
from system_tests import (
    block_cases,
    dynamic_cases,
    layer_cases,
    mask_cases,
    recomputation_cases,
    sink_cases,
    stream_cases,
    training_cases,
)
from system_tests.compare_losses import VALIDATION


class TrainingPool:
    """Ranks that train through Megatron again and again: importing it takes longer than a run of a toy."""

    def __init__(self) -> None:
        self._pool = RankPool(8, PRELOAD, training_cases.prepare_rank, alone=True)

    @functools.cache  # noqa: B019  (one pool for the whole session)
    def losses(self, ranks: int, flags: str, sabotage: str | None = None) -> dict[int, float]:
        """Loss of each iteration of training on so many ranks; see training_cases.train."""
        return self._train(ranks, flags, sabotage)

    def validation_losses(self, ranks: int, flags: str) -> dict[int, float]:
        """Loss of each evaluation in the course of training on so many ranks."""
        return self._train(ranks, flags, None, VALIDATION)

    def log(self, ranks: int, flags: Sequence[str], sabotage: str | None = None) -> str:
        """What training with these flags alone prints on the last of so many ranks; see log_of_training."""
        function = training_cases.log_of_training
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), flags, sabotage)[-1]

    def num_threads(self, ranks: int) -> list[int]:
        """How many threads each rank has."""
        return self._pool.call(range(ranks), LIMIT_S, training_cases.num_threads)

    def train_counted(self, ranks: int, flags: Sequence[str]) -> list[recomputation_cases.Counted]:
        """What recomputation_cases.train_counted gives on each rank."""
        function = recomputation_cases.train_counted
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), flags)

    def train_dynamically(self, ranks: int, flags: Sequence[str]) -> list[dynamic_cases.Run]:
        """What dynamic_cases.train_dynamically gives on each rank."""
        function = dynamic_cases.train_dynamically
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), flags)

    def gradients_of_sinks(self, ranks: int, flags: Sequence[str], each_counts: bool) -> list[list[float]]:
        """What sink_cases.gradients_of_sinks gives on the last of so many ranks."""
        function = sink_cases.gradients_of_sinks
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), flags, each_counts)[-1]

    def train_on_streams(
        self, ranks: int, kind: str, flags: dict[str, object], sabotage: str | None = None
    ) -> list[stream_cases.Step]:
        """What stream_cases.train gives on each rank."""
        function = stream_cases.train
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), kind, flags, sabotage)[-1]

    def refusal(self, ranks: int, flags: str, sabotage: str | None = None) -> str:
        """How training ends that is refused, or fails."""
        with pytest.raises(RankFailure) as failure:
            self._train(ranks, flags, sabotage)
        return str(failure.value)

    def attend_in_a_core_layer(
        self, ranks: int, order: str, flags: dict[str, object]
    ) -> list[training_cases.CoreLayerResult]:
        """What training_cases.attend_in_a_core_layer gives on each rank."""
        function = training_cases.attend_in_a_core_layer
        return self._pool.call(range(ranks), LIMIT_S, function, ranks, _free_port(), order, flags)

    def restore_in_mid_training(self, ranks: int) -> list[training_cases.RestoreDrill]:
        """What training_cases.restore_in_mid_training gives on each rank."""
        return self._pool.call(range(ranks), LIMIT_S, training_cases.restore_in_mid_training, ranks, _free_port())

    def compare_layers(
        self,
        ranks: int,
        tensor_parallel: int,
        dtype: torch.dtype,
        flags: dict[str, object],
        sabotage: str | None = None,
    ) -> list[layer_cases.LayerDifference]:
        """What layer_cases.compare_layers gives on each rank."""
        args = (ranks, _free_port(), tensor_parallel, dtype, flags, sabotage)
        return self._pool.call(range(ranks), LIMIT_S, layer_cases.compare_layers, *args)

    def run_blocks(
        self, ranks: int, tensor_parallel: int, variants: list[tuple[dict[str, object], dict[str, object]]]
    ) -> list[list[block_cases.BlockRun]]:
        """What block_cases.run_blocks gives on each rank."""
        return self._pool.call(
            range(ranks), LIMIT_S, block_cases.run_blocks, ranks, _free_port(), tensor_parallel, variants
        )

    def compare_masks(self, ranks: int, flags: dict[str, object], mask_types: list[str]) -> list[dict[str, float]]:
        """What mask_cases.compare_masks gives on each rank."""
        args = (ranks, _free_port(), flags, mask_types)
        return self._pool.call(range(ranks), LIMIT_S, mask_cases.compare_masks, *args)

    def run_program(self, ranks: int, source: str) -> list[str]:
        """What a program, given as its text, prints on each of so many ranks, started as torchrun does."""
        return self._pool.call(range(ranks), LIMIT_S, training_cases.run_program, ranks, _free_port(), source)

    def close(self) -> None:
        """End the ranks."""
        self._pool.close()

    def _train(self, ranks: int, *case: object) -> dict[int, float]:
        return self._pool.call(range(ranks), LIMIT_S, training_cases.train, ranks, _free_port(), *case)[-1]


def _free_port() -> int:
    """A port that nobody listens at, below those that systems give to connections: these come and go meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


@pytest.fixture(scope="session")
def training() -> Iterator[TrainingPool]:
    """Ranks to train on: `training.losses(2, "--context-parallel-size 2")`."""
    pool = TrainingPool()
    yield pool
    pool.close()
