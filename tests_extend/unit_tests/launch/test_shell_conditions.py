"""Conditions of shell scripts: those that are known decide which commands run, and others decide nothing."""

import os
import subprocess

import pytest

from mindspeed_cp.launch.shell import read_script


def commands_of(script, tmp_path, *arguments):
    """The words of each `run` of a script, and what it runs within."""
    reading = read_script(script, arguments=arguments, environment={}, folder=tmp_path)
    commands = [command for command in reading.commands if command.words[0].text == "run"]
    return [(" ".join(field.text for field in command.words[1:]), command.condition) for command in commands]


@pytest.mark.parametrize(
    "script",
    [
        "if [ $SIZE = 0.5B ]; then run a; elif [ $SIZE = 7B ]; then run b; else run c; fi",
        "if [ $SIZE = 0.5B ]; then run a; elif [ x$SIZE == x ]; then run b; else run c; fi; run d",
        "if [ $SP = true ] && [ $TP -gt 1 ]; then run a; fi; if [ $SP != false ] && [ $TP -le 1 ]; then run b; fi",
        '[[ "$TP" -gt 1 ]] && export A=yes || export A=no; run $A',
        '[ -z "$EMPTY" ] && A=1; [ -n "$EMPTY" ] && A=2; [ ! -z $EMPTY ] || A=${A}3; run $A',
        "if [ $TP -eq 4 -a $SIZE = 8B -o $TP -eq 2 -a $SIZE = 7B ]; then run a; else run b; fi",
        'if [[ $SIZE == "7"* && ( $TP -ne 2 || ! -z $SP ) ]]; then run a; fi; [[ $SIZE == "7*" ]] || run b',
        "if [[ $EMPTY != */ ]]; then EMPTY=$EMPTY/; fi; [[ $SIZE == [!1-6]? && $SIZE ]] && run $EMPTY",
        "if ! false; then run a; fi; if ! [[ -n $EMPTY ]]; then run b; fi; true && false || run c",
        'if [ "$#" -lt 2 ]; then exit 1; fi; run $1; f() { [ $# -eq 0 ] && return; run $1; }; f; f c',
        "A=1 || A=2; false && A=3; true || A=4; run $A",
        "[ $EMPTY -gt 1 ] 2>/dev/null && run a; [ $EMPTY ] || run b; test 7 -ge +7 && run c",
    ],
)
def test_commands_are_those_that_bash_runs(tmp_path, script):
    variables = "SIZE=7B TP=2 SP=true EMPTY=\n"
    bash = ["bash", "-c", f'run() {{ echo "$*" >>said; }}; {variables}{script}', "script", "a", "b"]
    subprocess.run(bash, cwd=tmp_path, env={"PATH": os.defpath}, check=False)
    said = (tmp_path / "said").read_text().splitlines()
    read = commands_of(variables + script, tmp_path, "a", "b")
    # What is not known may run, and says so: none of these may but where bash calls the condition an error.
    assert [words for words, condition in read if not condition] == said
    assert {condition for _, condition in read if condition} <= {"`[ $EMPTY -gt 1 ] 2>/dev/null &&` (line 2)"}


@pytest.mark.parametrize(
    "condition",
    [
        "[ $X = 7B ]",
        "[ -f 7B ]",
        "[[ -d 7B || $X ]]",
        "[[ 7B =~ ^(7|8)B$ ]]",
        "[[ 7 == $X || 1 -gt $X ]]",
        "[[ 7B == [^7]B ]]",
        "[ $# -gt 0 ]",
        "[ 1 = 1 -o 7B -eq 7 ]",
        "[ -z -o -n 7B -a 1 ]",
        "(( 1 > 2 ))",
        "grep -q 7B sizes",
    ],
)
def test_branches_of_what_is_not_known_may_both_be_taken(tmp_path, condition):
    start = f"if {condition}; then"
    read = commands_of(f"A=1\n{start} A=2; run a; else run b; fi\nrun $A", tmp_path)
    whole = f"`{start} A=2; run a; else run b; fi` (line 2)"
    assert read == [("a", whole), ("b", whole), ("${A}", "")]


def test_only_branches_below_what_is_not_known_are_uncertain(tmp_path):
    script = "if [ a = b ]; then run 1; elif [ $X = b ]; then run 2; elif [ b = b ]; then run 3; else run 4; fi"
    assert [(words, bool(condition)) for words, condition in commands_of(script, tmp_path)] == [
        ("2", True),
        ("3", True),
    ]


def test_failure_that_ends_the_script_is_listed(tmp_path):
    script = "if [ $1 = true ]; then\n  exit -1\nelif $X; then\n  exit 1\nfi\nrun\nexit 0"
    endings = {
        argument: [
            (each.line, each.text)
            for each in read_script(script, arguments=[argument], environment={}, folder=tmp_path).omissions
            if each.why == "the script ends here"
        ]
        for argument in ("true", "false")
    }
    assert endings == {"true": [(2, "exit -1")], "false": []}
