"""scripts/generate.py over ranks: the demo's model, trained on real text, and what one rank alone refuses."""

import importlib.util
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import Choice, Sampling, Session, Step
from mindspeed_cp.inference import transformers_model as adapted
from unit_tests.inference.test_transformers_model import folder

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore"),
]
__all__ = ["folder"]
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture
def generate(monkeypatch):
    """scripts/generate.py as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("generate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the script's model, hardly trained, and the text of the library that it leaves out."""
    folder = tmp_path_factory.mktemp("model")
    script = [sys.executable, str(SCRIPTS / "generate.py"), "--demo", "--demo-folder", str(folder)]
    script += ["--demo-seconds", "4", "--prompt", "def", "--max-new-tokens", "1"]
    subprocess.run(script, check=True, timeout=300)
    return folder, Path(queue.__file__).read_text()


GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0, seed=1)


def turns_on_ranks(size, loaded, turns, num_tokens, sampling=GREEDY, **options):
    """Steps of each turn, of one sequence, by rank 0; the others have the same."""
    world = VirtualWorld(size)

    def run(rank):
        ranks = VirtualCommunicator(world, range(size), rank, "") if size > 1 else None
        session = Session(loaded.model, 1, ranks, **options)
        return [list(session.generate([prompt], num_tokens, sampling=sampling)) for prompt in turns]

    first, *others = world.run(run)
    assert all(other == first for other in others)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_trained_model_writes_the_same_on_any_number_of_ranks_in_two_turns(trained, generate, dtype):
    """Up to where the best two logits are as close as its dtype is coarse; in fp64 everywhere."""
    folder, text = trained
    loaded = adapted.load(folder, dtype=dtype)
    tokens = loaded.tokenizer(text)["input_ids"]
    turns, wide = [tokens[:700], tokens[900:930]], torch.float64 if dtype is torch.bfloat16 else None
    one = turns_on_ranks(1, loaded, turns, 40, DRAWN, attention_dtype=wide)
    assert len({step.choices[0].token for step in one[0]}) > 5
    for size in 2, 3, 4:
        found = turns_on_ranks(size, loaded, turns, 40, DRAWN, attention_dtype=wide)
        assert generate.compared(found, one, dtype) == 0


@pytest.mark.slow
def test_two_hundred_tokens_of_the_trained_model_after_four_thousand_are_those_of_one_rank(trained, generate):
    folder, text = trained
    loaded = adapted.load(folder)
    prompt = loaded.tokenizer(text)["input_ids"][:4000]
    assert len(prompt) == 4000
    one, three = (turns_on_ranks(size, loaded, [prompt], 200) for size in (1, 3))
    assert generate.compared(three, one, loaded.dtype) == 0


def test_where_texts_part_is_reported_and_is_an_error_where_the_best_logits_are_apart(generate, capsys):
    def steps(*choices):
        return [[Step((Choice(token, 1.0, margin),)) for token, margin in choices]]

    one = steps((3, 0.5), (4, 2e-3), (5, 0.5))
    other = steps((3, 0.5), (7, 2e-3), (8, 0.5))
    told = "turn 0, sequence 0: those of one rank up to step 1, where the best two logits differ by 2.0e-03\n"
    for dtype, status in (torch.bfloat16, 0), (torch.float32, 1), (torch.float64, 1):
        assert generate.compared(other, one, dtype) == status
        assert capsys.readouterr().out == told
    assert generate.compared(one, one, torch.float64) == 0
    assert "all 3 tokens are those of one rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--top-p", "0"], "top_p=0.0: give a probability"),
        (["--chunk", "0"], "chunk=0 tokens of a prompt"),
        (["--decode", "ring_q"], "decode='ring_q' takes a sequence on each of 2 ranks"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 of each turn"),
    ],
    ids=["sampling", "chunk", "decode", "tokens"],
)
def test_what_one_rank_refuses_all_ranks_refuse_and_name_it(folder, generate, wrong, sentence):
    """None of them goes on alone, to wait for one that is gone."""
    world = VirtualWorld(2, 20.0)

    def run(rank):
        command = ["--model", str(folder), "--prompt", "w1 w2", *(wrong if rank else [])]
        ranks = VirtualCommunicator(world, range(2), rank, "")
        with pytest.raises(ValueError) as raised:
            generate.run(generate.arguments().parse_args(command), torch.device("cpu"), ranks, rank)
        return str(raised.value)

    for said in world.run(run):
        assert "rank 0: ready" in said and f"rank 1: refused: {sentence}" in said
