"""The gradient of a learnable sink with context parallelism is that of CP = 1, with data parallelism beside it."""

import pytest
import torch

from system_tests.model_cases import ALGORITHMS
from system_tests.training_cases import HAS_TRAINING, ITERATIONS, MODEL_FLAGS

pytestmark = [
    pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed"),
    pytest.mark.slow,
]

FLAGS = [*MODEL_FLAGS, "--softmax-type", "learnable", "--window-size", "8,0", "--global-batch-size", "4"]
DATA_PARALLEL = 2
TWO = ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"]


def gradients(training, size, *flags, each_counts=False):
    ranks = size * DATA_PARALLEL
    return torch.tensor(training.gradients_of_sinks(ranks, [*FLAGS, *flags], each_counts), dtype=torch.float64)


def test_gradients_of_sinks_are_those_of_cp_1(training):
    alone = gradients(training, 1)
    assert alone.shape == (ITERATIONS, 2 * 8), "of 2 layers with 8 heads"
    largest = alone.abs().max()
    for size, flags in ((2, TWO), (4, ALGORITHMS["hybrid"])):
        assert (gradients(training, size, *flags) - alone).abs().max() <= 1e-5 * largest
    wrong = gradients(training, 2, *TWO, each_counts=True)
    assert (wrong[0] - 2 * alone[0]).abs().max() <= 1e-5 * largest
