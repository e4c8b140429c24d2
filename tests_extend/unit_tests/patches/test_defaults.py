"""Defaults of Megatron's on machines without TransformerEngine, apex or a GPU, and its help."""

import argparse
import shlex
import sys
from types import SimpleNamespace

import pytest

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.patches.arguments import argument_patches
from mindspeed_cp.patches.defaults import check_transformer_impl, note_on_defaults, set_defaults
from mindspeed_cp.patches.help_text import escape_help
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry

pytestmark = pytest.mark.every_release

OF_PACKAGES = shlex.split(
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-rope-fusion"
)
EIGHT = [*OF_PACKAGES, "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"]
MODULES = {
    "transformer_engine.pytorch",
    "apex",
    "fused_weight_gradient_mlp_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
}


@pytest.fixture
def megatron_parser(megatron_arguments):
    """Megatron's own parser, without the plugin's patches."""
    return megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


@pytest.mark.parametrize(
    ("here", "flags"),
    [
        (set(), EIGHT),
        ({"torch.compile"}, OF_PACKAGES),
        ({"torch.compile", "transformer_engine.pytorch"}, ["--no-gradient-accumulation-fusion"]),
        ({"apex"}, [flag for flag in EIGHT if flag != "--no-persist-layer-norm"]),
        ({"torch.compile", *MODULES}, []),
    ],
)
def test_without_a_package_the_defaults_are_those_that_need_none(megatron_arguments, megatron_parser, here, flags):
    expected = vars(megatron_parser.parse_args(flags))
    set_defaults(megatron_parser, here.__contains__)
    assert vars(megatron_parser.parse_args([])) == expected
    assert [note.count("--") for note in note_on_defaults(megatron_parser, [], here.__contains__)] == (
        [len(flags) - ("local" in flags)] if flags else []
    )


def test_flags_that_the_user_names_are_kept_and_not_listed(megatron_parser):
    here = set().__contains__
    set_defaults(megatron_parser, here)
    argv = ["--transformer-impl=transformer_engine", "--no-rope-fusion"]
    assert megatron_parser.parse_args(argv).transformer_impl == "transformer_engine"
    (note,) = note_on_defaults(megatron_parser, argv, here)
    assert "--transformer-impl" not in note and "--no-rope-fusion" not in note and "--no-persist-layer-norm" in note
    assert note_on_defaults(megatron_parser, EIGHT, here) == []


@pytest.mark.parametrize("value", ["transformer_engine", "inference_optimized"])
def test_layers_of_a_missing_transformer_engine_are_refused_with_the_flag_to_change(value):
    args = SimpleNamespace(transformer_impl=value)
    with pytest.raises(ConfigurationError) as refusal:
        check_transformer_impl(args, set().__contains__)
    assert str(refusal.value) == (
        f"--transformer-impl {value} needs TransformerEngine, which cannot be imported; "
        f"use --transformer-impl local, the default without it."
    )
    check_transformer_impl(args, {"transformer_engine.pytorch"}.__contains__)


def test_patched_parser_has_them_and_the_named_layers_are_refused(megatron_arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py"])
    with PatchRegistry(argument_patches(Plugin(), print)).applied():
        args = megatron_arguments.parse_args()
        assert (args.transformer_impl, args.apply_rope_fusion) == ("local", False)
        args.transformer_impl, args.distributed_backend = "transformer_engine", "gloo"
        with pytest.raises(SystemExit):
            megatron_arguments.validate_args(args)
    assert "pretrain_gpt.py: error: --transformer-impl transformer_engine needs" in capsys.readouterr().err


def test_help_is_printed(megatron_arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--help"])
    with PatchRegistry(argument_patches(Plugin(), print)).applied(), pytest.raises(SystemExit) as end:
        megatron_arguments.parse_args()
    assert end.value.code in (None, 0)
    assert "--context-parallel-algo" in capsys.readouterr().out


def test_help_that_is_a_format_is_kept_and_a_stray_percent_sign_is_printed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kept", default=4, help="%(default)s of 100%%")
    parser.add_argument("--escaped").help = "half (50%) of it"
    escape_help(parser)
    assert "4 of 100%" in parser.format_help() and "half (50%) of it" in parser.format_help()
