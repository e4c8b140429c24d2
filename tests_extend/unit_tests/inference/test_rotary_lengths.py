"""Rotary embeddings that follow the length of the text: all ranks and all keys of a cache have those of one length."""

import importlib.util

import pytest

from mindspeed_cp.inference import Sampling
from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference import language_models as families
from unit_tests.inference.test_transformers_model import SMALL, on_ranks, prompts, tokens_of

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]
GREEDY, ORIGINAL = Sampling(), 32
HALF = families.SIZES["head_dim"] // 2
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * HALF, "long_factor": [1.0, 2.0, 3.0, 5.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def rotary(parameters):
    return {"rope_parameters": parameters, "max_position_embeddings": ORIGINAL}


def ntk(length):
    """What `dynamic` is at a length, as another base of plain embeddings."""
    size, factor = families.SIZES["head_dim"], DYNAMIC["factor"]
    scaled = (factor * length / ORIGINAL - (factor - 1)) ** (size / (size - 2))
    return {"rope_type": "default", "rope_theta": DYNAMIC["rope_theta"] * scaled}


@pytest.mark.parametrize(
    ("parameters", "equal_to", "length"),
    [(DYNAMIC, ntk(60), 60), (LONGROPE, LONGROPE, 60), (LONGROPE, LONGROPE, ORIGINAL)],
    ids=["dynamic", "longrope, long", "longrope, short"],
)
def test_ranks_write_what_a_model_does_that_knows_the_length(parameters, equal_to, length):
    # Of `longrope` all are on one side of ORIGINAL, so that each text by itself tells its own attention the same.
    given = prompts(40, 35) if length > ORIGINAL else prompts(20, 9)
    own = families.model_of("qwen3", **rotary(equal_to))
    expected = [families.own_tokens(own, prompt, 6, GREEDY) for prompt in given]
    model = adapted.adapt(families.model_of("qwen3", **rotary(parameters)))
    # Set for another length before: it is forgotten.
    for steps in on_ranks(3, model.for_length(200).for_length(length), given, 6, **SMALL):
        assert [tokens_of(steps, sample) for sample in range(2)] == expected


def test_texts_longer_than_a_model_is_set_for_are_refused_on_all_ranks():
    model = adapted.adapt(families.model_of("qwen3", **rotary(DYNAMIC)))
    for set_for, known in ((model, 0), (model.for_length(12), 12)):
        with pytest.raises(ValueError, match=f"make 13 positions, and the model is set for {known}; shorten"):
            on_ranks(2, set_for, prompts(10), 4)
    assert tokens_of(on_ranks(1, model.for_length(13), prompts(10), 4)[0], 0)
