"""The context-parallel flags in Megatron's own parser."""

import argparse
from importlib.util import find_spec

import pytest

from mindspeed_cp.config import ContextParallelConfig
from unit_tests.argument_cases import config_from_arguments

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.usefixtures("ampere_machine"),
]


def test_flags_have_the_defaults_of_the_configuration(parser):
    assert config_from_arguments(parser.parse_args([])) == ContextParallelConfig()


def test_every_flag_reaches_the_configuration(parser):
    flags = [
        *("--context-parallel-size", "1"),
        *("--context-parallel-algo", "hybrid_cp_algo"),
        *("--cp-window-size", "1"),
        *("--attention-mask-type", "general"),
        "--use-cp-send-recv-overlap",
        "--megatron-cp-in-bnsd",
        *("--context-parallel-kernels", "reference", "cpu_flash"),
    ]
    assert config_from_arguments(parser.parse_args(flags)) == ContextParallelConfig(
        context_parallel_algo="hybrid_cp_algo",
        attention_mask_type="general",
        use_cp_send_recv_overlap=True,
        megatron_cp_in_bnsd=True,
        context_parallel_kernels=("reference", "cpu_flash"),
    )


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--context-parallel-algo", "megatron_cp_algo"], "context_parallel_algo", "megatron_cp_algo"),
        (["--cp-window-size", "4"], "cp_window_size", 4),
        (["--ulysses-degree-in-cp", "2"], "ulysses_degree_in_cp", 2),
        (["--use-cp-send-recv-overlap"], "use_cp_send_recv_overlap", True),
        (["--attention-mask-type", "general"], "attention_mask_type", "general"),
        (["--megatron-cp-in-bnsd"], "megatron_cp_in_bnsd", True),
        (
            ["--context-parallel-kernels", "reference", "cpu_flash"],
            "context_parallel_kernels",
            ["reference", "cpu_flash"],
        ),
    ],
)
def test_flag_parses_in_megatron_s_parser(parser, flags, name, value):
    assert getattr(parser.parse_args(flags), name) == value
    assert getattr(parser.parse_args([]), name) != value


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--context-parallel-algo", "unknown is unknown; use ulysses_cp_algo, megatron_cp_algo (the ring"),
        ("--attention-mask-type", "invalid choice: 'unknown'"),
        ("--context-parallel-kernels", "invalid choice: 'unknown'"),
    ],
)
def test_unknown_choice_is_refused_by_the_parser(parser, flag, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([flag, "unknown"])
    assert stop.value.code == 2
    assert f"argument {flag}: {answer}" in capsys.readouterr().err


def test_flags_have_a_group_of_their_own_in_the_help(parser):
    group = next(group for group in parser._action_groups if "mindspeed_cp" in (group.title or ""))
    assert [action.option_strings[0] for action in group._group_actions] == [
        "--context-parallel-algo",
        "--cp-window-size",
        "--ulysses-degree-in-cp",
        "--use-cp-send-recv-overlap",
        "--context-parallel-kv-cache-policy",
        "--context-parallel-cache-interval",
        "--context-parallel-latent",
        "--context-parallel-keep-outputs",
        "--attention-mask-type",
        "--megatron-cp-in-bnsd",
        "--context-parallel-kernels",
        "--use-alibi",
        "--attention-on-one-rank",
    ]


def test_unpatched_parser_does_not_know_the_flags(megatron_arguments, capsys):
    parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    with pytest.raises(SystemExit):
        parser.parse_args(["--context-parallel-algo", "ulysses_cp_algo"])
    assert "unrecognized arguments" in capsys.readouterr().err
