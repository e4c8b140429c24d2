"""What `python -m mindspeed_cp check` says of scripts and flags, and its exit status."""

import logging
import os
import sys
import textwrap
import warnings

import pytest

from mindspeed_cp import __main__ as program
from mindspeed_cp.launch.check import CheckError, check
from unit_tests.launch.refusal_cases import MODEL

SCRIPT = """
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    TP=2
    ARGS=(
        --num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 64
        --micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0
        --tensor-model-parallel-size $TP --context-parallel-size 2
    )
"""
RUN = 'torchrun --nproc-per-node 4 pretrain_gpt.py "${ARGS[@]}"'


@pytest.fixture
def checked(parser, tmp_path, monkeypatch):
    """Check a script's text: the lines of the report, without what the machine says, and whether it is blocked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)

    def check_text(last_lines, *arguments, **environment):
        path = tmp_path / "train.sh"
        path.write_text(textwrap.dedent(SCRIPT) + last_lines)
        text, is_blocked = check(["train.sh", *arguments], parser, environment)
        return text, is_blocked

    return check_text


def rows(text, verdict):
    """The rows of one verdict, each in one line."""
    found = []
    for line in text.partition("\n\n")[0].splitlines()[1:]:
        if line[2:14].strip():
            found.append((line[2:14].strip(), line[14:]))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return [row for name, row in found if name == verdict]


def test_script_that_is_accepted(checked):
    text, is_blocked = checked(RUN)
    assert not is_blocked and not rows(text, "blocked")
    assert text.startswith("train.sh, line 9: pretrain_gpt.py on 4 ranks\n")
    (as_it_is,) = rows(text, "as it is")
    assert as_it_is.split("  ")[:2] == ["--num-layers 4", "--hidden-size 64"]
    (run,) = text.split("would run\n")[1:]
    assert run.replace("\\\n", "").split()[:5] == ["-m", "mindspeed_cp", "pretrain_gpt.py", "--num-layers", "4"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_every_flag_has_its_verdict(checked):
    text, is_blocked = checked(f"{RUN} --use-fused-rmsnorm --moe-intermediate-size 32 --fix-router --use-fused-swiglo")
    assert is_blocked
    assert [row.partition(":")[0] for row in rows(text, "blocked")] == ["--fix-router", "--use-fused-swiglo"]
    assert rows(text, "blocked")[1].endswith("did you mean --use-fused-swiglu?")
    assert rows(text, "translated") == [
        "--moe-intermediate-size 32 -> --moe-ffn-hidden-size 32: Megatron's --moe-ffn-hidden-size."
    ]
    assert rows(text, "noted")[0].startswith("--use-fused-rmsnorm: ")
    run = text.split("would run without what is blocked\n")[1]
    assert "--moe-ffn-hidden-size 32" in run and "--fix-router" not in run and "swiglo" not in run


@pytest.mark.parametrize(
    ("script", "blocker"),
    [
        (RUN.replace("4", "3"), "does not divide the 3 ranks"),
        (f"unset CUDA_DEVICE_MAX_CONNECTIONS\n{RUN}", "export CUDA_DEVICE_MAX_CONNECTIONS=1."),
        (f"{RUN} --qk-clip --tensor-model-parallel-size 1", "use --bf16 or --fp16"),
    ],
)
def test_rules_are_judged_by_what_the_script_says(checked, script, blocker):
    text, is_blocked = checked(script)
    assert is_blocked
    assert [blocker in row for row in rows(text, "blocked")] == [True]


def test_program_that_megatron_has_no_counterpart_of_is_named(checked):
    text, is_blocked = checked(RUN.replace("pretrain_gpt.py", "$HOME/posttrain_gpt.py"), HOME="/h")
    assert is_blocked
    assert rows(text, "blocked") == [
        "/h/posttrain_gpt.py: it is MindSpeed-LLM's program for fine-tuning and preference tuning, and imports "
        "MindSpeed-LLM; use a program of Megatron's, such as pretrain_gpt.py."
    ]


def test_text_that_is_not_known_is_kept_and_a_number_is_blocked(checked):
    text, is_blocked = checked(f'{RUN} --save $1/x --lr "$LR" $EXTRA --train-iters $2')
    assert is_blocked
    assert rows(text, "blocked") == [
        "--lr $LR: its value is not known (line 9: LR is not set); "
        "set it before the command: LR=... python -m mindspeed_cp check.",
        "--train-iters $2: its value is not known (line 9: the script is given no argument $2); "
        "give the script's arguments after its name.",
    ]
    assert "--save $1/x" in rows(text, "as it is")[0]
    section = text.split("not known\n")[1].split("\n\n")[0].splitlines()
    assert section == [
        "  $1/x: line 9: the script is given no argument $1; it is kept as it is spelt",
        "  $EXTRA: line 9: EXTRA is not set; it may add flags, or none",
    ]


def test_arguments_and_variables_of_the_caller_count(checked):
    text, is_blocked = checked(f'{RUN} --save $1/x --lr "$LR" --train-iters $2', "/ckpt", "5", LR="0.1")
    assert not is_blocked
    assert "--save /ckpt/x  --lr 0.1  --train-iters 5" in rows(text, "as it is")[0]
    assert "not known" not in text


def test_rules_wait_for_values_that_are_not_known(checked):
    run = f"{RUN.replace('4', '3')} --qk-clip"
    text, _ = checked(f"{run} --seq-length 1 --save-interval $I")
    rules = ["does not divide the 3 ranks", "use --bf16 or --fp16", "--seq-length 1 is below"]
    blocked = "\n".join(rows(text, "blocked"))
    assert [rule in blocked for rule in rules] == [True, True, True]
    text, _ = checked(f"{run} --seq-length $S")
    blocked = "\n".join(rows(text, "blocked"))
    assert "--seq-length $S: its value is not known" in blocked
    assert [rule in blocked for rule in rules] == [True, True, False]
    text, _ = checked(f"{run} --context-parallel-size $S")
    assert [row.partition(":")[0] for row in rows(text, "blocked")] == ["--context-parallel-size $S"]
    assert "--context-parallel-size: for want of values, rules that read them were not checked." in rows(text, "noted")


@pytest.mark.parametrize(
    "flag",
    ["--num-layers a", "--context-parallel-algo=ulysses", "--context-parallel-kernels foo", "--cp-comm-type", "--help"],
)
def test_what_is_blocked_is_not_among_what_would_run(checked, flag):
    text, is_blocked = checked(f"{RUN} {flag}")
    assert is_blocked and any(row.startswith(flag) for row in rows(text, "blocked"))
    assert flag not in text.split("would run without what is blocked\n")[1]


def test_what_was_not_read_is_listed(checked):
    text, _ = checked(f"if test $X; then\n  ARGS+=(--bf16)\nfi\n{RUN}")
    assert "${ARGS}: line 9, which may or may not run, appends to it; it may add flags, or none" in text
    assert text.splitlines()[-2:] == [
        "not read",
        "  line 9: if test $X; then: which branch is taken is not known; what lines 9 to 11 set counts as not known",
    ]


def test_each_of_two_launches_is_checked(checked):
    text, is_blocked = checked(f"{RUN}\n{RUN} --fix-router")
    assert is_blocked
    assert [line for line in text.splitlines() if line.startswith("train.sh")] == [
        "train.sh, line 9: pretrain_gpt.py on 4 ranks",
        "train.sh, line 10: pretrain_gpt.py on 4 ranks",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.sh", None, "none.sh: No such file or directory; give a shell script, or flags."),
        (".", None, ".: Is a directory; give a shell script, or flags."),
        ("a.py", b"x = 1", "a.py is a Python program; check the shell script that starts it, or its flags."),
        (
            "a.sh",
            b"echo 'a",
            "a.sh cannot be read as a shell script: line 1: a single quote is not closed; give a shell",
        ),
        ("a.bin", b"\x7fELF\xff\xfe", "a.bin cannot be read as a shell script: 'utf-8' codec can't decode"),
        ("a.yaml", b"a: 1\nb:\n  - 2\n", "a.yaml starts no training that can be read: "),
        ("empty.sh", b"", "empty.sh starts no training that can be read: "),
    ],
)
def test_file_that_is_no_launch_script_is_refused_with_a_line(parser, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckError) as refusal:
        check([name], parser, {})
    assert str(refusal.value).startswith(message)


def run_program(monkeypatch, parser, *words):
    """The exit status of the program; Megatron's parser is the given one."""
    monkeypatch.setattr(sys, "argv", ["mindspeed_cp", *words])
    monkeypatch.setattr(program, "_megatron_parser", lambda: parser)
    try:
        program.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["check", "--micro-batch-size", "1", "--num-layers", "2"], 0, "  as it is    --micro-batch-size 1"),
        (["check", "--micro-batch-sise", "1"], 1, "did you mean --micro-batch-size?"),
        (["check", "none.sh"], 2, "mindspeed_cp: error: none.sh: No such file"),
        (["check"], 2, "usage: python -m mindspeed_cp"),
        (["check", "--help"], 0, "usage: python -m mindspeed_cp"),
        (["chek"], 2, "mindspeed_cp: error: there is no script 'chek'; did you mean check?"),
        (["--help"], 0, "  --context-parallel-algo {ulysses_cp_algo,"),
        (["check", "--num-layers", "2", "--help"], 0, "usage: python -m mindspeed_cp"),
        (["check", ""], 2, "mindspeed_cp: error: there is no file ''; give a shell script, or flags."),
        (["--version"], 0, "mindspeed_cp 0."),
        (["--version", "x"], 2, "error: --version takes no argument, and is given 'x'; leave it out."),
    ],
)
def test_program_says_and_ends_as_documented(monkeypatch, capsys, parser, words, status, line):
    assert run_program(monkeypatch, parser, *words) == status
    said = capsys.readouterr()
    assert line in " ".join((said.out + said.err).split()) or line in said.out
    assert bool(said.err) == (status == 2)


def test_nothing_but_the_report_is_said(monkeypatch, parser, caplog, recwarn):
    def noisy_parser():
        logging.getLogger("noise").warning("on import")
        warnings.warn("on import", stacklevel=1)
        return parser

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "argv", ["mindspeed_cp", "check", *MODEL.split()])
    monkeypatch.setattr(program, "_megatron_parser", noisy_parser)
    with pytest.raises(SystemExit) as end:
        program.main()
    assert (end.value.code, caplog.records, list(recwarn)) == (0, [], [])
    logging.getLogger("noise").warning("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


def test_connections_that_may_be_set_are_not_blocked(checked):
    text, is_blocked = checked(f"unset CUDA_DEVICE_MAX_CONNECTIONS\nexport CUDA_DEVICE_MAX_CONNECTIONS=$C\n{RUN}")
    assert not is_blocked
    assert "$C: line 10: C is not set; as CUDA_DEVICE_MAX_CONNECTIONS it has to be 1" in text
    assert not checked(f"unset CUDA_DEVICE_MAX_CONNECTIONS\nenv CUDA_DEVICE_MAX_CONNECTIONS=1 {RUN}")[1]


def test_one_rank_is_no_plural(checked):
    run = RUN.replace("--nproc-per-node 4", "--nproc-per-node 1")
    assert checked(run)[0].startswith("train.sh, line 9: pretrain_gpt.py on 1 rank\n")


def test_lost_flags_are_blocked(checked):
    text, is_blocked = checked(f"{RUN} \\\n  # why\n  --seq-length 64")
    assert is_blocked and rows(text, "blocked")[0].startswith("--seq-length 64 (line 11): no command begins")


def test_launch_that_is_not_read_is_listed_beside_those_that_are(checked):
    text, _ = checked(f"{RUN}\ntorchrun $SCRIPT --micro-batch-size 1")
    assert "line 10: torchrun $SCRIPT --micro-batch-size 1: which training script it starts is not known" in text


def test_script_for_another_machine_is_not_blocked_by_the_kernels_of_this_one(checked, monkeypatch):
    monkeypatch.setattr("mindspeed_cp.patches.rules.accelerator", lambda: None)
    # The reference kernel, the one of a CPU for such heads, would hold 64 GiB of scores.
    latent = "--multi-latent-attention --seq-length 262144 --max-position-embeddings 262144 --bf16"
    text, is_blocked = checked(f"{RUN} {latent}")
    assert not is_blocked
    assert any(row.startswith("there is no accelerator here") for row in rows(text, "noted"))
    assert checked(f"{RUN} {latent} --distributed-backend gloo")[1]
