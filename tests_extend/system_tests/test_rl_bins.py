"""Bins that Megatron's own module for reinforcement learning makes: what is learned from them over context-parallel
ranks is what Megatron learns from their sequences one by one.
"""

import json
from importlib.util import find_spec

import pytest

from system_tests.compare_losses import relative_difference
from system_tests.rl_cases import Learned
from system_tests.training_cases import HAS_TRAINING, MEGATRON_LM

pytestmark = [
    pytest.mark.skipif(MEGATRON_LM is None, reason="MEGATRON_LM names no Megatron-LM checkout, and no wheel has bins"),
    pytest.mark.skipif(not HAS_TRAINING or find_spec("pydantic") is None, reason="megatron.rl cannot be imported"),
    pytest.mark.slow,
    pytest.mark.every_release,
]

ALGORITHMS = {
    "ulysses": {"context_parallel_algo": "ulysses_cp_algo"},
    "ring": {"context_parallel_algo": "megatron_cp_algo"},
    "double ring": {"context_parallel_algo": "megatron_cp_algo", "cp_window_size": 2},
    "hybrid": {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
}


def learned(training, ranks, planted=False, **flags):
    source = f"from system_tests.rl_cases import print_learned\nprint_learned({flags!r}, planted={planted})"
    return Learned(*json.loads(training.run_program(ranks, source)[0].splitlines()[-1]))


def difference(one, other):
    return max(relative_difference(*each) for each in zip(one, other, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_learned_from_bins_is_what_is_from_their_sequences(training, record_property, algorithm):
    alone = learned(training, 1)
    shared = learned(training, 4, context_parallel_size=4, **ALGORITHMS[algorithm])
    record_property("check", "bins of RL, CP 4")
    record_property("algorithm", algorithm)
    record_property("result", f"{shared.loss:.5f} {difference(alone, shared):.0e}")
    assert difference(alone, shared) <= 1e-5


def test_a_boundary_that_is_a_token_late_is_noticed(training):
    late = learned(training, 4, planted=True, context_parallel_size=4, **ALGORITHMS["ring"])
    assert difference(learned(training, 1), late) > 1e-3
