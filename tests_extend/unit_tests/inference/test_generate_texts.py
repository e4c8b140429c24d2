"""scripts/generate.py with texts that a terminal cannot show, and with a tokenizer that is larger than its model."""

import importlib.util
import io
import sys

import pytest
import torch

from unit_tests.inference import language_models as families

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def folder(tmp_path):
    """A small model, and a tokenizer with three words that it does not know; no word is ASCII."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0} | {f"é{number}": number for number in range(1, families.VOCABULARY + 3)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    families.model_of("qwen3", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def test_an_ascii_terminal_gets_a_question_mark_for_what_it_cannot_show(folder, run_script, monkeypatch):
    """As with PYTHONIOENCODING=ascii, or LC_ALL=C: no UnicodeEncodeError in the middle of a text."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    ended = run_script("generate.py", "--model", folder, "--prompt", "é5 é7", "--max-new-tokens", 3)
    screen.flush()
    written = screen.buffer.getvalue().decode("ascii").splitlines()
    assert ended.status == 0, ended.err
    assert written[-3].count("?") == 3  # A word for each token.


def test_a_token_that_the_model_does_not_know_is_refused_in_a_line(folder, run_script):
    last = families.VOCABULARY + 2
    ended = run_script("generate.py", "--model", folder, "--prompt", f"é5 é{last}", "--max-new-tokens", 1)
    assert ended.status == 2
    told = f"the tokenizer gives token {last}, and the model knows {families.VOCABULARY}; get both from one place."
    assert ended.err.strip().endswith(told) and len(ended.err.strip().splitlines()) == 1
