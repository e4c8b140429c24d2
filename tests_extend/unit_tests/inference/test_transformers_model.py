"""Models of transformers, unmodified, write over ranks what they write by their own attention."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import Sampling, Session
from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference import language_models as families

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    # One worker imports it.
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).resolve().parents[3]
GREEDY, DRAWN = Sampling(), Sampling(temperature=2.0, seed=1)
SMALL = {"chunk": 16, "interleave": 3, "page": 4}


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, families.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def on_ranks(size, model, given, num_tokens, sampling=GREEDY, **options):
    """The steps of each rank."""
    world = VirtualWorld(size)

    def run(rank):
        ranks = VirtualCommunicator(world, range(size), rank, "") if size > 1 else None
        return list(Session(model, len(given), ranks, **options).generate(given, num_tokens, sampling=sampling))

    return world.run(run)


def tokens_of(steps, sample):
    return [step.choices[sample].token for step in steps]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize(
    "sizes", [pytest.param((3,), id="3"), pytest.param((1, 2, 4), id="1, 2, 4", marks=pytest.mark.slow)]
)
def test_ranks_write_what_the_models_own_attention_does(family, sizes):
    model, given = families.model_of(family), prompts(37, 5, 20)
    expected = [families.own_tokens(model, prompt, 10, DRAWN, sample) for sample, prompt in enumerate(given)]
    assert len(set(expected[0])) > 3
    model = adapted.adapt(model)
    for size in sizes:
        for steps in on_ranks(size, model, given, 10, DRAWN, **SMALL):
            assert [tokens_of(steps, sample) for sample in range(3)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_rounded_models_part_only_where_the_best_logits_are_close(family, dtype):
    model, given = adapted.adapt(families.model_of(family, dtype)), prompts(37, 20)
    wide = {"attention_dtype": torch.float64 if dtype is torch.bfloat16 else None}
    one, *_ = on_ranks(1, model, given, 12, **SMALL, **wide)
    for size in 2, 3, 4:
        steps, *_ = on_ranks(size, model, given, 12, **SMALL, **wide)
        for sample in range(2):
            pairs = zip(tokens_of(one, sample), tokens_of(steps, sample), strict=True)
            parted = [number for number, (a, b) in enumerate(pairs) if a != b]
            assert not parted or one[parted[0]].choices[sample].is_close(dtype)


@pytest.mark.slow
def test_two_hundred_tokens_after_four_thousand_are_those_of_one_rank():
    model, given = adapted.adapt(families.model_of("mistral", sliding_window=1000)), prompts(4000)
    (one,), (two, other) = (on_ranks(size, model, given, 200, DRAWN) for size in (1, 2))
    assert tokens_of(one, 0) == tokens_of(two, 0) == tokens_of(other, 0)
    assert len(set(tokens_of(one, 0))) > 20


def test_models_that_a_cache_cannot_serve_are_refused():
    config = families.config_of("qwen3")
    config.update({"layer_types": ["full_attention", "linear_attention"]})
    with pytest.raises(ValueError, match=r"layer 1 of this qwen3 model is linear_attention.*; use"):
        adapted.layer_windows(config)


def test_what_a_model_tells_its_attention_is_never_dropped():
    model, given = families.model_of("llama"), prompts(5)
    adapted_model = adapted.adapt(model)
    with pytest.raises(ValueError, match="LlamaAttention tells its attention position_bias='T5', which is not"):
        model(torch.tensor(given), use_cache=False, position_bias="T5", cached_attention=object())
    with pytest.raises(ValueError, match="attention by 'mindspeed_cp' is that of a Session"):
        model(torch.tensor(given), use_cache=False)
    wrong = adapted.TransformersModel(adapted_model.model, (None, 8))
    with pytest.raises(ValueError, match="layer 1 attends within a window of None, and the cache was made for 8"):
        on_ranks(1, wrong, given, 1)


def write_folder(folder, **said):
    """A folder without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | said))
    return folder


def test_folders_that_cannot_be_trusted_are_refused(tmp_path):
    refused = {"config.json; give": tmp_path}
    refused["no weights, and only safetensors are loaded"] = write_folder(tmp_path / "empty")
    (write_folder(tmp_path / "pickle") / "pytorch_model.bin").touch()
    refused["pytorch_model.bin, a pickle, which may run code"] = tmp_path / "pickle"
    (write_folder(tmp_path / "code", auto_map={"AutoModel": "evil.Model"}) / "model.safetensors").touch()
    refused["code of its own .* which is not run"] = tmp_path / "code"
    for message, folder in refused.items():
        with pytest.raises(ValueError, match=rf"{folder} .*{message}"):
            adapted.load(folder)


@pytest.fixture
def folder(tmp_path):
    """A small model with a tokenizer of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[UNK]", *(f"w{n}" for n in range(1, families.VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    families.model_of("qwen3", torch.float32).save_pretrained(tmp_path)
    return tmp_path


def test_script_goes_on_with_each_prompt_and_then_with_each_question(folder, run_script):
    ended = run_script(
        *("generate.py", "--model", folder, "--prompt", "w5 w7 w9", "w3", "--question", " w8", "w2 w4"),
        *("--max-new-tokens", 4, "--dtype", "float64"),
    )
    assert ended.status == 0, ended.err
    model = families.model_of("qwen3", torch.float32).double()
    for prompt, shown in (([5, 7, 9], "--- 0\n"), ([3], "--- 1\n")):
        first = families.own_tokens(model, [*prompt, 8], 4, GREEDY)
        second = families.own_tokens(model, [*prompt, 8, *first, 2, 4], 4, GREEDY)
        for written in first, second:
            assert f"{shown}{' '.join(f'w{token}' for token in written)}\n" in ended.out
    assert "prompt: 3 of 3 tokens" in ended.out  # The last token of the first answer, and the second question.
    assert re.search(r"\[4 tokens a sequence in [\d.]+ s, [\d.]+ a second\]", ended.out)
    assert re.search(r"rank 0: \d+\.\d\d MiB of K/V, \d+ MiB at most in all", ended.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt is no file; give a text file"),
        (["--prompt", "w1", "--max-new-tokens", 8192], "make 8193 positions, and the model has 8192"),
        ([], "there is no prompt; give --prompt-file, or --prompt"),
        (["--prompt", "w1", "--top-p", 0], "top_p=0.0: give a probability above 0"),
        (["--prompt", "w1", "--chunk", 0], "chunk=0 tokens of a prompt at once: give 1 or more"),
    ],
)
def test_script_says_in_a_line_what_cannot_be(folder, run_script, arguments, message):
    ended = run_script("generate.py", "--model", folder, *arguments)
    assert ended.status == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_demo_trains_a_model_and_ranks_write_what_one_does(tmp_path):
    """Trained on real text; two turns over one cache."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29577"),
        *(ROOT / "scripts" / "generate.py", "--demo", "--demo-folder", tmp_path / "model", "--demo-seconds", "6"),
        *("--question", "def ", "\n\n    def ", "--max-new-tokens", "20", "--dtype", "float64", "--compare"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    for turn in 0, 1:
        assert f"turn {turn}, sequence 0: all 20 tokens are those of one rank" in ended.stdout
