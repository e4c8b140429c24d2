"""The page of Megatron's options says what is refused beside what, in the words of the refusal."""

import argparse
import re
from pathlib import Path

import pytest

from mindspeed_cp.launch.check import Verdict, examine_launch
from mindspeed_cp.launch.launcher import Launch
from mindspeed_cp.launch.reading import Field
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "megatron_options.md").read_text()
ROWS = re.findall(
    r"^\| `(--.*?)` \| (.*) \|$",
    PAGE.partition("<!-- refused together -->")[2].partition("<!-- end -->")[0],
    re.MULTILINE,
)
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0 --distributed-backend gloo "
    "--context-parallel-size 2"
)


@pytest.fixture(scope="module")
def blockers():
    """What stands in the way of a launch with these flags beside the model's."""
    megatron_arguments = pytest.importorskip("megatron.training.arguments")
    with PatchRegistry(argument_patches(Plugin(), print)).applied():
        parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

    def examined(flags):
        fields = tuple(Field((word,)) for word in f"{MODEL} {flags}".split())
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": Field(("1",))}
        report = examine_launch(Launch(0, "pretrain_gpt.py", fields, 8, environment, ""), parser)
        known = parser._option_string_actions
        unknown = {word for word in flags.split() if word.startswith("--") and word not in known}
        return [row.text for row in report.rows if row.verdict is Verdict.BLOCKED], unknown

    return examined


def test_model_of_the_table_is_accepted_alone(blockers):
    assert len(ROWS) > 10
    assert blockers("") == ([], set())


@pytest.mark.parametrize(("flags", "reason"), ROWS)
def test_options_are_refused_together_for_the_reason_on_the_page(blockers, flags, reason):
    sentences, unknown = blockers(flags)
    if unknown:
        pytest.skip(f"this release has no {', '.join(sorted(unknown))}")
    assert [sentence for sentence in sentences if sentence.endswith(f"{reason}.")] != []
