"""Folders of models whose files are broken, or do not fit together: one line with a way out."""

import importlib.util
import json

import pytest
import torch

from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference import language_models as families
from unit_tests.inference.test_transformers_model import folder

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]
__all__ = ["folder"]


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def said(**changed):
    def change(folder):
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changed))

    return change


def written(text, name="config.json"):
    return lambda folder: (folder / name).write_text(text)


def indexed(name):
    """An index that has all weights in a file of this name; model.safetensors is gone, and another one is there."""

    def change(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
        torch.save(weights, folder / "weights.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def changed_weights(change):
    def changed(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


ANOTHER_LAYER = changed_weights(lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}))
NO_NUMBERS = changed_weights(lambda weights: weights["model.norm.weight"].fill_(torch.nan))
WINDOW = {"use_sliding_window": True, "sliding_window": 0, "layer_types": ["sliding_attention"] * 2}


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
        (
            said(num_hidden_layers=1, layer_types=["full_attention"]),
            "hold model.layers.1.* and 10 more, for which Qwen3",
        ),
        (ANOTHER_LAYER, "hold model.layers.2.mlp.up_proj.weight, for which Qwen3ForCausalLM .* no place; get"),
        (
            indexed("weights.bin"),
            "has its weights in 'weights.bin', by model.safetensors.index.json, and only safetensors",
        ),
        (indexed("../outside.safetensors"), "'../outside.safetensors', by .* of the folder itself"),
        (indexed("gone.safetensors"), "lacks gone.safetensors, in which model.safetensors.index.json has weights; get"),
        (said(transformers_weights="adapter_model.bin"), "has its weights in 'adapter_model.bin', by config.json, and"),
        (written("{}", "adapter_config.json"), "holds an adapter .* merge it into the model first"),
        (written("{", "generation_config.json"), r"its generation_config.json is no JSON \(.*; get it anew"),
        (
            said(text_config={"_attn_implementation": "a/kernel"}),
            "code fetched from 'a/kernel' .* is not run; take it out",
        ),
        (said(), r"holds no tokenizer that can be read \(no vocabulary\); add its tokenizer.json"),
    ],
    ids=[
        *("cut weights", "cut config", "list", "unknown", "type", "shape", "missing", "fewer layers", "another layer"),
        *("pickle by index", "outside", "lacks", "pickle by config", "adapter", "generation", "kernel", "no tokenizer"),
    ],
)
def test_a_broken_folder_is_one_line_with_a_way_out(tmp_path, break_it, sentence):
    """Missing weights are not replaced by random ones."""
    families.model_of("qwen3", torch.float32).save_pretrained(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{sentence}") as raised:
        adapted.load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (NO_NUMBERS, "Qwen3ForCausalLM gives logits that are no numbers; its weights are broken: get them anew"),
        (said(**WINDOW), "sliding_window=0 of this qwen3 model shows no token"),
        (
            written('{"eos_token_id": [3, "x"]}', "generation_config.json"),
            r"eos_token_id=\[3, 'x'\] of its configuration are no tokens",
        ),
        (said(return_dict=False), ""),
    ],
    ids=["no numbers", "window", "ends", "tuples"],
)
def test_folders_that_transformers_loads_are_looked_at_too(folder, break_it, sentence):
    """The last one is in order."""
    break_it(folder)
    if not sentence:
        assert adapted.load(folder).ends == frozenset()
        return
    with pytest.raises(ValueError, match=sentence):
        adapted.load(folder)
