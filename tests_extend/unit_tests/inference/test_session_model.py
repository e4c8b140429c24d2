"""Ranks of a session that have different models."""

import importlib.util

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import Session
from unit_tests.inference.toy_model import ToyModel


def test_ranks_with_different_models_all_raise():
    world = VirtualWorld(3, timeout_s=20)

    def run(rank):
        model = ToyModel(softcap=4.0 if rank < 2 else 5.0)
        session = Session(model, 1, VirtualCommunicator(world, range(3), rank, ""))
        with pytest.raises(ValueError, match=r"ranks 0 to 1: ToyModel.*; rank 2: ToyModel.*give all ranks the same mo"):
            next(session.generate([[1, 2, 3]], 1))

    world.run(run)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.xdist_group("transformers")
def test_a_models_words_tell_weights_and_configurations_apart():
    from mindspeed_cp.inference.transformers_model import TransformersModel
    from unit_tests.inference import language_models as families

    models = [families.model_of("qwen3"), families.model_of("qwen3"), families.model_of("qwen3", rms_norm_eps=1e-3)]
    models += [families.model_of("qwen3")]
    models[1].config._name_or_path = "another/place"
    with torch.no_grad():
        models[3].lm_head.weight += 1e-3
    first, same, *others = (TransformersModel(model, ()).words for model in models)
    assert first == same
    assert len({first, *others}) == 3
