"""What scripts/generate.py shows, and how it compares: by steps that are given to it."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from mindspeed_cp.comm import LostRank
from mindspeed_cp.inference import Choice, Step

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.xdist_group("transformers"),
]

FOUND = Path(__file__).resolve().parents[3] / "scripts" / "generate.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("generate", FOUND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(*rows):
    """Of each step the tokens of all sequences; a negative one is chosen closely, None where a sequence has ended."""
    chosen = [[each and Choice(abs(each), 5.0, 1e-6 if each < 0 else 1.0) for each in row] for row in rows]
    return [Step(tuple(row)) for row in chosen]


def test_a_sequence_that_ends_as_on_one_rank_agrees_beside_one_that_writes_on(script, capsys):
    """Sequence 0 parts where the best two are close, and goes on for longer; sequence 1 is equal to its end."""
    one = steps((-1, 7), (9, 8))
    ours = steps((-2, 7), (3, 8), (4, None), (5, None))
    assert script.compared([ours], [one], torch.float32) == 0
    assert "turn 0, sequence 1: all 2 tokens are those of one rank" in capsys.readouterr().out
    assert script.compared([steps((-2, 7), (3, 6))], [one], torch.float32) == 1


def test_a_rank_that_is_gone_is_one_line_on_the_others(script, monkeypatch, capsys):
    def run(*_):
        raise LostRank("no answer from rank 2 of the group: Connection\n closed")

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", "folder", "--prompt", "a"])
    assert script.main() == 1
    said = "generate.py: error: rank 0 stops: no answer from rank 2 of the group: Connection closed; see what that"
    assert capsys.readouterr().err == f"\n{said} rank said last.\n"  # Not behind half a line of text.


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("name", ["--timeout", "--demo-seconds"])
def test_seconds_that_are_none_are_refused(script, monkeypatch, capsys, name, seconds):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--demo", f"{name}={seconds}"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert f"error: {name} {seconds}: give seconds above 0, up to 1e+06." in capsys.readouterr().err


def test_demo_is_not_trained_for_a_folder_that_cannot_be_made_or_is_not_its_own(run_script, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for folder, said in (("file/model", "cannot be made"), ("file", "cannot be made"), ("folder", "holds other files")):
        ended = run_script("generate.py", "--demo", "--demo-folder", tmp_path / folder, "--demo-seconds", 1e5)
        assert ended.status == 2 and len(ended.err.strip().splitlines()) == 1
        assert f"error: {tmp_path / folder} {said}" in ended.err


def test_an_unfinished_character_is_shown_at_the_end(script, capsys):
    """Three bytes of "aé", of which the last one never comes."""
    tokenizer = types.SimpleNamespace(decode=lambda tokens: bytes(tokens).decode(errors="replace"))
    screen = script.Screen(types.SimpleNamespace(tokenizer=tokenizer), 1, True)
    for byte in "aéé".encode()[:-1]:
        screen.step(*steps((byte,)))
    assert capsys.readouterr().out == "aé"
    screen.finish()
    assert capsys.readouterr().out.startswith("\ufffd\n")
