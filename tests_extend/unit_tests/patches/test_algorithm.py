"""The algorithm of a job, named or chosen, and options of another one."""

import warnings
from importlib.util import find_spec

import pytest

from unit_tests.argument_cases import CP4, MODEL, is_known, option_of

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.usefixtures("ampere_machine"),
]


TWO_LEVELS = ["--cp-comm-type", "a2a+p2p", "--hierarchical-context-parallel-sizes", "2", "2"]


@pytest.mark.parametrize(
    ("flags", "algorithm", "degree", "why"),
    [
        ([], "ulysses_cp_algo", None, "because"),
        (["--num-attention-heads", "6"], "hybrid_cp_algo", 2, "because"),
        (["--num-attention-heads", "7"], "megatron_cp_algo", None, "because"),
        (["--group-query-attention", "--num-query-groups", "2"], "hybrid_cp_algo", 2, "because"),
        (["--cp-comm-type", "p2p"], "megatron_cp_algo", None, "asks for it"),
        (TWO_LEVELS, "hybrid_cp_algo", 2, "asks for it"),
        ([*TWO_LEVELS, "--context-parallel-algo", "hybrid_cp_algo"], "hybrid_cp_algo", 2, "asks for it"),
        (["--cp-comm-type", "p2p", "--context-parallel-algo", "megatron_cp_algo"], "megatron_cp_algo", None, "(named)"),
        (
            ["--num-attention-heads", "7", "--context-parallel-algo", "megatron_cp_algo"],
            "megatron_cp_algo",
            None,
            "(named)",
        ),
    ],
)
def test_a_job_that_names_no_algorithm_gets_one_that_fits_and_says_why(
    parser, validation, capsys, flags, algorithm, degree, why
):
    args = parser.parse_args([*CP4, *flags])
    validation.validate(args, {})
    assert (args.context_parallel_algo, args.ulysses_degree_in_cp) == (algorithm, degree)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mindspeed_cp: ")]
    assert f"context parallel size 4, {algorithm} " in line
    assert why in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--context-parallel-algo", "ulysses_cp_algo", "--cp-comm-type", "p2p"],
            "--context-parallel-algo ulysses_cp_algo contradicts --cp-comm-type p2p, which is megatron_cp_algo; leave "
            "out one of them.",
        ),
        (["--cp-comm-type", "p2p", "a2a"], "one algorithm is used in all layers"),
        (["--ulysses-degree-in-cp", "2"], "--ulysses-degree-in-cp 2 without --context-parallel-algo: it belongs to"),
        (["--cp-window-size", "2"], "--cp-window-size 2 without --context-parallel-algo: it belongs to"),
        (["--ulysses-degree-in-cp", "-3"], "--ulysses-degree-in-cp -3 without --context-parallel-algo: it belongs to"),
        (
            [*TWO_LEVELS, "--ulysses-degree-in-cp", "4"],
            "--ulysses-degree-in-cp 4 contradicts --cp-comm-type a2a+p2p, which has a Ulysses degree of 2; leave out",
        ),
        (
            ["--cp-comm-type", "p2p", "--ulysses-degree-in-cp", "2"],
            "--ulysses-degree-in-cp 2 contradicts --cp-comm-type p2p, which has no Ulysses within a ring; leave out",
        ),
        (["--context-parallel-size", "0"], "--context-parallel-size 0 is below 1; use 1 or more."),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0 is below 1; use 1 or more."),
        (["--num-attention-heads", "0"], "--num-attention-heads 0 is below 1; use 1 or more."),
        (["--seq-length", "-3"], "--seq-length -3 is below 1; use 1 or more."),
    ],
)
def test_options_of_another_algorithm_are_refused(parser, validation, capsys, flags, message):
    with pytest.raises(SystemExit):
        validation.validate(parser.parse_args([*CP4, *flags]), {})
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--hierarchical-context-parallel-sizes", "2", "2"],
        ["--attention-backend", "flash"],
        ["--flash-attention-version", "3"],
    ],
)
def test_choice_among_algorithms_of_transformer_engine_is_said_to_have_no_effect(parser, validation, flags):
    if not is_known(option_of(flags)):
        pytest.skip("this Megatron does not have the option yet")
    with pytest.warns(UserWarning, match=f"^{flags[0]} has no effect: it is TransformerEngine's, and"):
        validation.validate(parser.parse_args([*CP4, *flags]), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validation.validate(parser.parse_args([*MODEL, *flags]), {})
