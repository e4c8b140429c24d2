"""Toys of models people train, with context parallelism against CP = 1; each with one algorithm, for a sample.

The whole table is a command of its own: python tests_extend/model_table.py.
"""

import pytest

from mindspeed_cp.testing.toy_models import TOY_MODELS
from system_tests.model_cases import model_runs
from system_tests.training_cases import HAS_TRAINING

pytestmark = pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed")

SAMPLE = {
    "Llama 3": "hybrid",
    "Qwen 3": "Ulysses",
    "Mistral": "double ring",
    "Gemma 3": "ring",
    "gpt-oss": "Ulysses",
    "DeepSeek-V3": "hybrid",
    "Mixtral": "ring",
    "GLM": "Ulysses",
}


def test_sample_has_every_model():
    assert SAMPLE.keys() == TOY_MODELS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "algorithm"), SAMPLE.items())
def test_model_has_the_losses_and_gradient_norms_of_cp_1(training, name, algorithm):
    difference = model_runs(training, name).difference(algorithm)
    assert difference.losses <= 1e-5
    assert difference.gradients <= 1e-3
