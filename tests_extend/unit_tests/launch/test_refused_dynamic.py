"""The page of Megatron's options says what is refused beside documents with ranks of their own, as the refusal does."""

import argparse
import re
from pathlib import Path

import pytest

from mindspeed_cp.launch.check import Verdict, examine_launch
from mindspeed_cp.launch.launcher import Launch
from mindspeed_cp.launch.reading import Field
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.dynamic_rules import _RULES
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "megatron_options.md").read_text()
TABLE = PAGE.partition("<!-- refused beside dynamic ranks -->")[2].partition("<!-- end -->")[0]
ROWS = re.findall(r"^\| `(--.*?)` \| (.*) \|$", TABLE, re.MULTILINE)
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0 --distributed-backend gloo "
    "--hybrid-context-parallel"
)
WHAT_IT_NEEDS = "--sft --calculate-per-token-loss --max-seqlen-per-dp-cp-rank 8"


@pytest.fixture(scope="module")
def report():
    """What is said of a launch with these flags beside the model's, by rows, and which of them are unknown."""
    megatron_arguments = pytest.importorskip("megatron.training.arguments")
    with PatchRegistry(argument_patches(Plugin(), print)).applied():
        parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))

    def examined(flags, num_ranks=8):
        fields = tuple(Field((word,)) for word in f"{MODEL} {flags}".split())
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": Field(("1",))}
        found = examine_launch(Launch(0, "pretrain_gpt.py", fields, num_ranks, environment, ""), parser)
        known = parser._option_string_actions
        return found.rows, {word for word in flags.split() if word.startswith("--") and word not in known}

    return examined


def blocked(rows):
    return [row.text for row in rows if row.verdict is Verdict.BLOCKED]


def test_with_what_it_needs_it_is_accepted_and_says_the_grid_on_each_number_of_ranks(report):
    rows, unknown = report(f"{WHAT_IT_NEEDS} --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2")
    assert (blocked(rows), unknown) == ([], set())
    said = [row.text for row in rows if "documents on 1 to 8 ranks each" in row.text]
    assert len(said) == 1
    assert (
        "hybrid_cp_algo (named): on 2 Ulysses 2; on 4 Ulysses 2 x ring 2; on 8 Ulysses 2 x ring 4, overlap" in said[0]
    )


def test_algorithm_that_nobody_names_is_what_the_heads_allow_on_all_ranks(report):
    rows, _ = report(f"{WHAT_IT_NEEDS} --group-query-attention --num-query-groups 2")
    assert any("on 2 Ulysses 2; on 4 Ulysses 2 x ring 2; on 8 Ulysses 2 x ring 4" in row.text for row in rows)


@pytest.mark.parametrize(("flags", "reason"), ROWS)
def test_options_are_refused_beside_it_for_the_reason_on_the_page(report, flags, reason):
    rows, unknown = report(flags)
    if unknown:
        pytest.skip(f"this release has no {', '.join(sorted(unknown))}")
    assert [sentence for sentence in blocked(rows) if sentence.endswith(f"{reason}.")] != [], blocked(rows)


def test_every_rule_is_on_the_page():
    assert [rule.options for rule in _RULES if f"{rule.reason}; {rule.way_out}" not in TABLE] == []


def test_number_of_ranks_that_megatron_has_no_groups_for_is_refused(report):
    rows, _ = report(WHAT_IT_NEEDS, num_ranks=12)
    assert [sentence.rpartition("; ")[2] for sentence in blocked(rows)] == ["use 8 or 16 ranks."]


def test_what_attention_over_several_ranks_cannot_honour_is_refused_too(report):
    rows, _ = report(f"{WHAT_IT_NEEDS} --batch-invariant-mode")
    assert blocked(rows) == [
        "--batch-invariant-mode with --hybrid-context-parallel: no kernel here makes that promise; leave it out."
    ]
