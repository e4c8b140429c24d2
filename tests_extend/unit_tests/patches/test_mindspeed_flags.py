"""MindSpeed's flags in Megatron's parser: what changes nothing is noted, what would change the results is refused."""

import argparse
import warnings
from importlib.util import find_spec

import pytest

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.patches import arguments
from mindspeed_cp.patches.arguments import add_context_parallel_arguments, argument_patches, config_from_arguments
from mindspeed_cp.patches.mindspeed_flags import (
    MINDSPEED_FLAGS,
    REFUSED_VALUES,
    add_mindspeed_arguments,
    mindspeed_notes,
)
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchRegistry

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

NOTED = [
    ["--use-fused-ring-attention-update"],
    ["--context-parallel-kv-cache-policy", "full"],
    ["--context-parallel-kv-cache-policy", "half"],
    ["--context-parallel-cache-interval", "1"],
    ["--use-ulysses-allgather-kv"],
    ["--attention-mask-on-cpu"],
    ["--adaptive-cp-without-coarse"],
    ["--adaptive-cp-dynamic-attn-mask"],
    ["--adaptive-cp-only-reschedule"],
    ["--adaptive-cp-manually-set-mask-list"],
    ["--use-flash-attn"],
    ["--use-fusion-attn-v2"],
    ["--shape-order", "SBH"],
    ["--sparse-mode", "0"],
    ["--sparse-mode", "2"],
    ["--pre-tockens", "65536"],
    ["--pre-tockens", "64"],
    ["--next-tockens", "0"],
    ["--alibi-fusion-attn-type", "2"],
    ["--alibi-diagonal-opposite"],
    ["--square-alibi-mask"],
    ["--fill-neg-inf"],
    ["--fix-sub-seq-length", "-1"],
]
REFUSED = [
    (
        ["--sparse-mode", "4"],
        "--sparse-mode 4: bands, prefixes and unmasked attention have no mode here; use 0 or 2, or "
        "--attention-mask-type general with the batch's mask.",
    ),
    (["--pre-tockens", "63"], "--pre-tockens 63: sliding windows are not available yet; leave it out."),
    (["--next-tockens", "-1"], "--next-tockens -1: sliding windows are not available yet; leave it out."),
    (
        ["--fix-sub-seq-length", "16"],
        "--fix-sub-seq-length 16: documents of one given length are not available; leave it out, "
        "--reset-attention-mask takes them from the data.",
    ),
]
REFUSED_BY_THE_PARSER = [
    (
        "--context-parallel-algo",
        "adaptive_cp_algo",
        "megatron_cp_algo with --attention-mask-type general computes the same.",
    ),
    ("--context-parallel-algo", "hybrid_adaptive_cp_algo", "or hybrid_cp_algo with it, computes the same."),
    ("--context-parallel-algo", "kvallgather_cp_algo", "not available yet; megatron_cp_algo computes the same."),
    ("--position-embedding-type", "alibi", "attention bias is not available yet; use rope or learned_absolute."),
]


@pytest.fixture
def parse(parser, monkeypatch):
    """Parse the flags of a small model and these, for a machine with a GPU."""
    monkeypatch.setattr(arguments, "accelerator", lambda: "cuda")
    monkeypatch.setattr(arguments, "check_kernels", lambda args, config: None)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    model = ["--num-attention-heads", "8", "--seq-length", "64", "--attention-dropout", "0"]
    return lambda *flags: parser.parse_args([*model, *flags])


def test_every_flag_is_tested_here():
    assert {flags[0] for flags in NOTED} == {each.name for each in MINDSPEED_FLAGS if each.note}
    assert {flags[0] for flags, _ in REFUSED} == {each.name for each in MINDSPEED_FLAGS if each.refusal}
    refused = {(option, value) for option, values in REFUSED_VALUES.items() for value in values}
    assert {(option, value) for option, value, _ in REFUSED_BY_THE_PARSER} == refused


@pytest.mark.parametrize("size", ["1", "4"])
@pytest.mark.parametrize("flags", NOTED, ids=" ".join)
def test_flag_that_changes_nothing_is_taken_with_one_note(parse, flags, size):
    args = parse("--context-parallel-size", size, *flags)
    plain = parse("--context-parallel-size", size)
    assert config_from_arguments(args) == config_from_arguments(plain)
    (note,) = mindspeed_notes(args)
    assert note.startswith(f"{flags[0]} has no effect: ")
    assert "\n" not in note


def test_nothing_is_noted_where_no_flag_of_mindspeed_s_is_given(parse):
    assert mindspeed_notes(parse("--context-parallel-size", "4")) == []
    assert mindspeed_notes(argparse.Namespace()) == [], "arguments of another parser"


@pytest.mark.parametrize("size", ["1", "4"])
@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_value_that_would_change_the_results_is_refused_at_any_size(parse, flags, message, size):
    with pytest.raises(ConfigurationError) as refusal:
        config_from_arguments(parse("--context-parallel-size", size, *flags))
    assert str(refusal.value) == message


@pytest.mark.parametrize(("option", "value", "nearest"), REFUSED_BY_THE_PARSER)
def test_value_of_mindspeed_s_is_refused_with_the_nearest_thing(parse, option, value, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(option, value)
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: {value} is MindSpeed's: " in last_line
    assert last_line.endswith(nearest)


@pytest.mark.parametrize("option", REFUSED_VALUES)
def test_other_values_of_such_an_option_are_as_before(parse, option, capsys):
    value = {"--context-parallel-algo": "hybrid_cp_algo", "--position-embedding-type": "rope"}[option]
    assert getattr(parse(option, value), option.removeprefix("--").replace("-", "_")) == value
    with pytest.raises(SystemExit):
        parse(option, "unknown")
    assert f"argument {option}: invalid choice: 'unknown'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [each.name for each in MINDSPEED_FLAGS])
def test_flag_that_the_parser_has_already_is_left_as_it_is(name):
    parser = argparse.ArgumentParser()
    mine = parser.add_argument(name, action="store_const", const="mine")
    for option in REFUSED_VALUES:
        parser.add_argument(option)
    add_mindspeed_arguments(parser)
    assert parser._option_string_actions[name] is mine
    assert vars(parser.parse_args([name]))[mine.dest] == "mine"


def test_megatron_s_own_flash_flag_is_among_those(megatron_arguments):
    unpatched = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = [each.name for each in MINDSPEED_FLAGS if each.name in unpatched._option_string_actions]
    assert known == ["--use-flash-attn"]


def test_another_plugin_s_flags_of_the_same_name_are_an_error_in_one_line():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cp-window-size")
    parser.add_argument("--context-parallel-algo")
    with pytest.raises(ConfigurationError) as refusal:
        add_context_parallel_arguments(parser)
    assert str(refusal.value) == (
        "--context-parallel-algo, --cp-window-size: another plugin has added them to Megatron's parser already; "
        "import either mindspeed_cp or that one (MindSpeed?), not both."
    )


def patch_of(function: str) -> Patch:
    return next(patch for patch in argument_patches(Plugin(), print) if patch.target.endswith(f":{function}"))


def test_building_the_parser_beside_another_plugin_ends_with_status_2(megatron_arguments, monkeypatch, capsys):
    def with_a_flag_of_theirs(parser, original=megatron_arguments.add_megatron_arguments):
        parser.add_argument("--context-parallel-algo")
        return original(parser)

    monkeypatch.setattr(megatron_arguments, "add_megatron_arguments", with_a_flag_of_theirs)
    with PatchRegistry([patch_of("add_megatron_arguments")]).applied(), pytest.raises(SystemExit) as stop:
        megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert stop.value.code == 2
    assert "--context-parallel-algo: another plugin has added them" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_notes_are_said_by_the_first_rank_alone(adaptor, parse, monkeypatch, rank, said):
    monkeypatch.setenv("RANK", rank)
    patch = patch_of("validate_args")
    validate = patch.function(lambda args, defaults: args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate(parse("--use-fused-ring-attention-update"), {})
    assert sum("--use-fused-ring-attention-update has no effect" in str(one.message) for one in caught) == said


@pytest.mark.parametrize(
    ("flags", "ranks", "message"),
    [
        (
            [],
            6,
            "--context-parallel-size 4 * --tensor-model-parallel-size 1 * --pipeline-model-parallel-size 1 = 4 "
            "does not divide the 6 ranks; use a --context-parallel-size of 1, 2, 3 or 6, or a multiple of 4 ranks.",
        ),
        (
            ["--tensor-model-parallel-size", "2"],
            4,
            "--context-parallel-size 4 * --tensor-model-parallel-size 2 * --pipeline-model-parallel-size 1 = 8 "
            "does not divide the 4 ranks; use a --context-parallel-size of 1 or 2, or a multiple of 8 ranks.",
        ),
        (
            ["--tensor-model-parallel-size", "2"],
            3,
            "--context-parallel-size 4 * --tensor-model-parallel-size 2 * --pipeline-model-parallel-size 1 = 8 "
            "does not divide the 3 ranks; use a multiple of 8 ranks.",
        ),
    ],
)
def test_sizes_that_do_not_divide_the_ranks_are_refused(parse, flags, ranks, message):
    args = parse("--context-parallel-size", "4", *flags)
    args.world_size = ranks
    with pytest.raises(ConfigurationError) as refusal:
        config_from_arguments(args)
    assert str(refusal.value) == message
    args.world_size = 8
    config_from_arguments(args)
