"""Tables of training: twenty steps in every kind, and x*y on each context-parallel algorithm, in fp64 and bf16."""

import pytest
import torch

from unit_tests.tensor_parallel.gpt_cases import (
    ALGORITHMS,
    EACH_KIND,
    LIKE_LLAMA,
    assert_as_accurate_as_whole,
    assert_replicas_are_equal,
    assert_trained_as_whole,
    train_sharded,
)
from unit_tests.tensor_parallel.mesh_cases import xy

pytestmark = pytest.mark.slow
WITHIN_ATTENTION = {1: xy(2, 4), 2: xy(2, 2, context=2)}
"""Meshes of four ranks that share a sequence, by the context-parallel size."""


@pytest.mark.parametrize("case", EACH_KIND, ids=str)
def test_losses_and_replicas_after_twenty_steps_of_adam(case):
    results = case.run(lambda mesh: train_sharded(mesh, steps=20, sizes=LIKE_LLAMA))
    assert_trained_as_whole(results, steps=20, sizes=LIKE_LLAMA)
    assert_replicas_are_equal(results)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("context", WITHIN_ATTENTION)
def test_x_times_y_trains_with_each_context_parallel_size_and_algorithm(context, algorithm):
    case = WITHIN_ATTENTION[context]
    results = case.run(lambda mesh: train_sharded(mesh, algorithm=algorithm))
    assert_trained_as_whole(results)
    assert_replicas_are_equal(results)
    in_bf16 = case.run(lambda mesh: train_sharded(mesh, dtype=torch.bfloat16, algorithm=algorithm))
    assert_as_accurate_as_whole(in_bf16)
    assert_replicas_are_equal(in_bf16)
