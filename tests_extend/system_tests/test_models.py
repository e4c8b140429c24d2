"""Toys of models people train, with context parallelism against CP = 1; each with one algorithm, for a sample.

The whole table is a command of its own: python tests_extend/model_table.py.
"""

import pytest

from mindspeed_cp.testing.toy_models import TOY_MODELS
from system_tests.model_cases import MOST, TIMES_NOISE, Difference, model_runs
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
    assert difference.within(MOST), difference


@pytest.mark.slow
@pytest.mark.parametrize(("name", "algorithm"), [("GLM", "ring"), ("gpt-oss", "double ring")])
def test_model_in_bf16_differs_from_cp_1_as_cp_1_does_from_itself_in_another_order(training, name, algorithm):
    runs = model_runs(training, name, ("--bf16",))
    difference, noise = runs.difference(algorithm), runs.noise()
    assert difference.within(noise.times(TIMES_NOISE)), (difference, noise)
    assert noise.within(Difference(5e-3, 5e-2)), "another order of sums is no other training"
