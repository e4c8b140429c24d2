"""YaRN, which latent attention has by default: embeddings of its original length are made with the model."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.layouts import Zigzag
from mindspeed_cp.patches.any_length import any_length_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry
from mindspeed_cp.sharding import restore


@pytest.mark.parametrize("original_length", [16, 2])
def test_its_original_length_need_not_be_a_multiple_of_the_chunks(monkeypatch, original_length):
    module = pytest.importorskip("megatron.core.models.common.embeddings.yarn_rotary_pos_embedding")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    def embeddings(rank, size):
        group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
        made = module.YarnRotaryEmbedding(
            8, original_max_position_embeddings=original_length, use_cpu_initialization=True, cp_group=group
        )
        return made.cos_cached, made(7)[0]

    with PatchRegistry(any_length_patches(Plugin())).applied():
        whole, *shards = embeddings(0, 1), *(embeddings(rank, 3) for rank in range(3))
    for one, several, length in zip(whole, zip(*shards, strict=True), (original_length, 7), strict=True):
        assert torch.equal(restore(list(several), Zigzag(3, ((length,),)), 0), one)
