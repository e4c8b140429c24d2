"""Models of transformers that would be computed otherwise than they say are refused when they are adapted."""

import importlib.util
import types

import pytest
import torch

from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference import language_models as families

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]


def built(family, **more):
    """A small one with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **families.SIZES | {"pad_token_id": 0} | more), attn_implementation="eager"
    )


@pytest.mark.parametrize(
    ("family", "more", "sentence"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "Gemma3Attention tells its .* is_causal=False"),
        ("bert", {"is_decoder": False}, "BertSelfAttention tells its attention .*is_causal=False"),
        ("llama", {"is_causal": False}, "LlamaForCausalLM looks ahead"),
        ("roberta", {"is_decoder": True, "pad_token_id": 1}, "numbers positions otherwise than from 0 on"),
        ("diffllama", {}, "DiffLlamaForCausalLM computes several attentions in layer 0"),
        ("nemotron", {}, "NemotronAttention is not told whose cache"),
    ],
)
def test_what_a_cache_cannot_serve_is_said_before_any_prompt(family, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapted.adapt(built(family, **more))


class Seen:
    """An attention that gives its queries back."""

    def refuse_window(self, layer, window):
        pass

    def attend(self, layer, q, k, v, scale, terms):
        return q


def test_a_false_that_says_something_is_not_dropped():
    module, x = types.SimpleNamespace(layer_idx=0), torch.zeros(1, 2, 3, 4)
    for said in {"is_causal": False}, {"scaled": False}:
        with pytest.raises(ValueError, match=f"{next(iter(said))}=False, which is not computed"):
            adapted.attend(module, x, x, x, None, cached_attention=Seen(), **said)
    out, _ = adapted.attend(module, x, x, x, None, cached_attention=Seen(), is_causal=True, output_attentions=False)
    assert out.is_contiguous()  # There are models that take a view of it.
