"""Published scripts say `your data path` where a path belongs: one value, which is not known."""

import pytest

from mindspeed_cp.launch.shell import read_script


@pytest.mark.parametrize("assigned", ['A="your data path"', "export A='Your vocab file path'", "A=${1:-your log path}"])
def test_text_that_is_to_be_filled_in_is_one_value_that_is_not_known(tmp_path, assigned):
    script = f'{assigned}\nrun --data-path $A --save "$A"/x'
    (command,) = read_script(script, environment={}, folder=tmp_path).commands
    assert [field.text for field in command.words] == ["run", "--data-path", "${A}", "--save", "${A}/x"]
    (fragment,) = command.words[2].unresolved
    assert fragment.why.startswith("line 1: '")
    assert fragment.why.endswith("path' is yet to be filled in")


@pytest.mark.parametrize("text", ["your_path", "--prompt your name", "your --lr 1"])
def test_text_that_only_resembles_it_stays(tmp_path, text):
    (command,) = read_script(f"A='{text}'\nrun $A", environment={}, folder=tmp_path).commands
    assert [field.text for field in command.words] == ["run", *text.split()]
