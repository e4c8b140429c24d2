"""Folders of models whose files are broken, or do not fit together: one line with a way out."""

import importlib.util
import json

import pytest
import torch

from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference import language_models as families

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def said(**changed):
    def change(folder):
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))

    return change


def written(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (cut, "cannot be loaded by transformers: Error while deserializing header.* anew"),
        (written('{"model_type": "ll'), r"its config.json is no JSON \(Unterminated string.* anew"),
        (written("[]"), "its config.json is a list, no JSON object; get it anew"),
        (said(model_type="nobody's"), "model type `nobody's` but Transformers does not recognize"),
        (said(hidden_size="many"), "Field 'hidden_size' expected int"),
        (
            said(intermediate_size=64),
            "safetensors lack model.layers.0.mlp.down_proj.weight and 5 more, or have it in an",
        ),
        (
            said(num_hidden_layers=3, layer_types=["full_attention"] * 3),
            "safetensors lack model.layers.2.* and 10 more",
        ),
    ],
    ids=["cut weights", "cut config", "list", "unknown", "type", "shape", "missing"],
)
def test_a_broken_folder_is_one_line_with_a_way_out(tmp_path, break_it, sentence):
    """Missing weights are not replaced by random ones."""
    families.model_of("qwen3", torch.float32).save_pretrained(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{sentence}") as raised:
        adapted.load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1
