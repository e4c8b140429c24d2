"""Shell scripts as they are read: what would run, what is not known of it and why, and what is not read."""

import os
import subprocess

import pytest

from mindspeed_cp.launch.shell import read_script
from mindspeed_cp.launch.shell_syntax import ShellSyntaxError


def read(text, tmp_path, *arguments, **environment):
    """The reading of a script, in an environment of these variables alone."""
    return read_script(text, arguments=arguments, environment=environment, folder=tmp_path)


def words_of(text, tmp_path, *arguments, **environment):
    """The words of the last command, what is not known as it is spelt."""
    return [field.text for field in read(text, tmp_path, *arguments, **environment).commands[-1].words]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("A=1\nrun $A ${A}0 \"$A\" '$A' \\$A", ["1", "10", "1", "$A", "$A"]),
        ("A='b  c'\nrun $A \"$A\" x$A", ["b", "c", "b  c", "xb", "c"]),
        ("A=\nrun $A \"$A\" ''", ["", ""]),
        ("A=1 B=${A}2\nexport C=$B\ndeclare -i D=$C\nreadonly E=$D; run $E", ["12"]),
        ("A=1\nA+=2\nrun $A", ["12"]),
        ("run ${A:-4} ${A-5} ${A:=6} $A ${B:+7} ${A:+8}", ["4", "5", "6", "6", "8"]),
        ('A="x"; run ${A:-4} ${B:-$A y} "${B:-$A y}" "${B:-"z"}"', ["x", "x", "y", "x y", "z"]),
        ("A=''; run ${A:-4} ${A-5}", ["4"]),
        ('A=(1 "2 3" # why\n  4)\nA+=(5)\nrun "${A[@]}" "${A[*]}"', ["1", "2 3", "4", "5", "1 2 3 4 5"]),
        ("A=(1 2)\nrun ${A[@]} ${A[1]} $A", ["1", "2", "2", "1"]),
        ("N=4\nrun $((N * $N / 3)) $(( -7 / 2 )) $((${M:-2} % 3 + (1 << 3)))", ["5", "-3", "10"]),
        ("run a \\\n  b\\\nc # comment\n", ["a", "bc"]),
        ('ARGS="\n  --a 1 \\\n  --b \\"2\\"\n"\nrun $ARGS', ["--a", "1", "--b", '"2"']),
        ("run a > log 2>&1 < in", ["a"]),
        ("run a 2>&1 | tee log; A=1; run $A", ["1"]),
        ("exec > >(cat >log) 2>&1\nrun a > >(cat >log)", ["a"]),
        ("if true; then\n  :\nfi\nrun a", ["a"]),
        ("f() {\n  run $1 $B\n}\nB=2\nf 1", ["1", "2"]),
        ('A=1\neval "run \\$A"', ["1"]),
        ("CMD='run a'\n$CMD b", ["a", "b"]),
        ("export A=1; B=2; bash -c 'run $A ${B:-no}'", ["1", "no"]),
        ("(A=1); { B=2; }; run ${A:-none} $B", ["none", "2"]),
        ("set -- 1 2; shift; run $1 $#", ["2", "1"]),
        ('run "$@" $*', []),
        ("A=1 && B=2\nrun $B", ["2"]),
        ("run a\nexit 0\nrun b", ["a"]),
        ("f() { exit; }\nrun a; f; run b", ["a"]),
        ("f() { return; run c; }\nf; run b", ["b"]),
        ("L=4; f() { local L=16 M=(1); }; f; run $L", ["4"]),
        ("L=4; f() { L=16; }; f; run $L", ["16"]),
        ("HOME=/h; A=~/x; run ~/y $A '~' a~ none*", ["/h/y", "/h/x", "~", "a~", "none*"]),
        ("(readonly Z=5); f() { local -r Y=5; }; f; Z=6; Y=6; run $Z $Y", ["6", "6"]),
        ("set a b; run $1 $#; set -euo pipefail; run $2", ["b"]),
        ("set -- 1; shift 2; run $1", ["1"]),
        ('export "L=4" M=5; run $L $M', ["4", "5"]),
        ("A=(1 2); A[1]=x; A[2]=y; run ${A[@]}", ["1", "x", "y"]),
        ("A=(1 2); A[1]+=x; A[2]+=y; V=a; V[0]+=b; run ${A[@]} $V", ["1", "2x", "y", "ab"]),
        ('IFS=,; set -- 1 2; A=(3 4); X=$*; Y=${A[*]} Z=$@; unset IFS; run "$X" $Y "$Z"', ["1,2", "3,4", "1 2"]),
        ('IFS=; set -- 1 2; X="$*"; unset IFS; run $X "$*"', ["12", "1 2"]),
        ("declare -i W=3+4; run $W", ["7"]),
        ("run $(((-2) ** 2)) $((2 - -3))", ["4", "5"]),
        ("bash -c 'run $1' x y", ["y"]),
    ],
)
def test_words_are_those_that_bash_makes(tmp_path, script, words):
    (tmp_path / "in").touch()
    run = 'exec 3>said; run() { printf "<%s>" "$@" >&3; printf "\\n" >&3; }; export -f run\n'
    subprocess.run(["bash", "-c", run + script], cwd=tmp_path, env={"PATH": os.defpath}, check=True)
    # Without arguments printf prints its format once.
    assert "".join(f"<{word}>" for word in words or [""]) in (tmp_path / "said").read_text().splitlines()
    reading = read(script, tmp_path)
    assert ["run", *words] in [[field.text for field in command.words] for command in reading.commands]
    assert not any(field.unresolved for command in reading.commands for field in command.words)


def test_environment_and_arguments_are_what_the_shell_would_see(tmp_path):
    assert words_of('run $TP "$1" $2 "$@"', tmp_path, "a b", "c", TP="8") == ["run", "8", "a b", "c", "a b", "c"]


def test_source_of_a_file_that_exists_is_read(tmp_path):
    (tmp_path / "sizes.sh").write_text("TP=2\nsource more.sh\n")
    (tmp_path / "more.sh").write_text("PP=4\n")
    assert words_of("source ./sizes.sh\nrun $TP $PP", tmp_path) == ["run", "2", "4"]
    assert words_of(". sizes.sh\nrun $TP", tmp_path) == ["run", "2"]


def test_command_sees_what_is_exported_to_it(tmp_path):
    (command,) = read("A=1; export B=2; export A; C=3\nD=4 run", tmp_path).commands
    assert {name: field.text for name, field in command.environment.items()} == {"A": "1", "B": "2", "D": "4"}


@pytest.mark.parametrize(
    ("script", "word", "name", "why"),
    [
        ("run $A", "$A", "A", "line 1: A is not set"),
        ("\nB=${A}/x\nrun $B", "${A}/x", "A", "line 2: A is not set"),
        ("run $1", "$1", "1", "line 1: the script is given no argument $1"),
        ("run ${A:?}", "${A:?}", "A", "line 1: A is not set"),
        ("run $((A * 2))", "$((A * 2))", "A", "line 1: A is not set"),
        ("A=$(nproc)\nrun $A", "$(nproc)", "", "line 1: a command would have to run"),
        ("A=`nproc`\nrun $((A / 2))", "$((A / 2))", "", "line 1: a command would have to run"),
        ("A=x; run ${A%y}", "${A%y}", "", "line 1: the operator within the braces is not known here"),
        ("run {1..4}", "{1..4}", "", "line 1: braces make several words of it"),
        ("A=4; run $((A++))", "$((A++))", "", "line 1: arithmetic of this kind is not computed here"),
        ("A=4; ((++A)); run $A", "${A}", "", "line 1 sets it, and is not read"),
        ("A=4; ((A<<=1)); run $A", "${A}", "", "line 1 sets it, and is not read"),
        ("A=4; : $((A+=4)); run $A", "${A}", "", "line 1 sets it, and is not read"),
        ("A=(); run $((A + 1))", "$((A + 1))", "A", "line 1: A is not set"),
        ("A=4; B=$((A++)); run $A", "${A}", "", "line 1 sets it, and is not read"),
        ("for ((A = 0; A < 2; A++)); do :; done; run $A", "${A}", "", "it is set by the loop in line 1"),
        ('set -- a; shift $((OPTIND - 1)); run "$@"', "$@", "", "line 1 sets it, and is not read"),
        ("set -- a; while $X; do shift; done; run $1", "$1", "", "line 1, which may or may not run, sets it"),
        ("run ~/x", "~/x", "", "line 1: which folder ~ is is not known"),
        ("run /*", "/*", "", "line 1: which files match is known when the script runs"),
        ("IFS=,; A=1,2; run $A", "1,2", "", "line 1: IFS decides which words it is"),
        ("A=([1]=4 [0]=1); run ${A[0]}", "${A[0]}", "", "line 1: elements have subscripts"),
        ("A=1\n\nbash -c 'run $B'", "$B", "B", "line 3: B is not set"),
        (
            "A=$(a # it's\ncase b in c) d;; esac\ncat <<E\n(\nE\n)\nrun x$A",
            "x$(a # it's\ncase b in c) d;; esac\ncat <<E\n(\nE\n)",
            "",
            "line 1: a command would have to run",
        ),
        ("A=1\nif $X; then A=2; fi\nrun $A", "${A}", "", "line 2, which may or may not run, sets it"),
        ("A=1\ncase $X in a) A=2;; esac\nrun $A", "${A}", "", "line 2, which may or may not run, sets it"),
        ("A=1\nfor B in 1 2; do A=$B; done\nrun $A", "${A}", "", "line 2, which may or may not run, sets it"),
        ("A=1\n[ -f x ] && A=2\nrun $A", "${A}", "", "line 2, which may or may not run, sets it"),
        ("for A in 1 2; do run $A; done", "${A}", "", "it is set by the loop in line 1"),
        ("A=1; while true; do run $A; A=2; done", "${A}", "", "line 1, which may or may not run, sets it"),
        ("A=1; read A; run $A", "${A}", "", "line 1 sets it, and is not read"),
    ],
)
def test_what_would_have_to_run_stays_as_it_is_spelt(tmp_path, script, word, name, why):
    field = read(script, tmp_path).commands[-1].words[1]
    assert (field.text, [(fragment.name, fragment.why) for fragment in field.unresolved]) == (word, [(name, why)])


@pytest.mark.parametrize(
    ("initial", "more", "words"),
    [
        ('A="--a"', 'A+=" --b"', ["--a", "${A}"]),
        ('A="--a"', 'A="$A --b"', ["--a", "${A}"]),
        ('A="--a"', 'A="$A,b"', ["--a${A}"]),
        ('A="--a"', 'A="$A,b"; A="--a --c"', ["--a", "${A}"]),
        ("A=(--a)", "A+=(--b)", ["--a", "${A}"]),
    ],
)
def test_what_a_branch_appends_follows_what_is_there(tmp_path, initial, more, words):
    fields = read(f"{initial}\nif $X; then {more}; fi\nrun ${{A[@]}}", tmp_path).commands[-1].words[1:]
    assert [field.text for field in fields] == words
    assert [fragment.why for field in fields for fragment in field.unresolved] == [
        "line 2, which may or may not run, appends to it"
    ]


def test_command_of_a_branch_knows_its_condition(tmp_path):
    script = 'A=1\nif [ "$RANK" = 0 ]; then\n  A=2\n  run $A\nelse\n  run $A\nfi'
    commands = [command for command in read(script, tmp_path).commands if command.words[0].text == "run"]
    assert [(command.line, command.words[1].text) for command in commands] == [(4, "2"), (6, "1")]
    assert {command.condition for command in commands} == {'`if [ "$RANK" = 0 ]; then` (line 2)'}


@pytest.mark.parametrize(
    ("script", "line", "text", "why"),
    [
        ("A=$(nproc)", 1, "$(nproc)", "a command would have to run"),
        ("A=(a <(b))", 1, "<(b)", "a process substitution runs a command"),
        ("A[1]=2", 1, "A[1]=", "it sets A"),
        ("readonly A=1\nA=2", 2, "A=", "A is read-only, so that bash refuses to set it"),
        (
            "if a; then\n  B=1\nfi",
            1,
            "if a; then",
            "which branch is taken is not known; what lines 1 to 3 set counts as not known",
        ),
        (
            "for a in b; do c; done",
            1,
            "for a in b; do c; done",
            "how often it runs is not known; what line 1 sets counts as not known",
        ),
        ("run <<EOF\n$(never\nEOF\nB=1", 1, "run <<EOF", "a here-document's text is not read"),
        ("source none.sh", 1, "source none.sh", "there is no file {folder}/none.sh"),
        ("cd /x$Y\nsource a.sh", 2, "source a.sh", "the working directory is not known after `cd`"),
        ('source "$HERE/a.sh"', 1, 'source "$HERE/a.sh"', "which file it is is not known: line 1: HERE is not set"),
        ("read A B", 1, "read A B", "it sets A, B"),
        ("((A = 1))", 1, "((A = 1))", "it sets A"),
        ("bash other.sh 1", 1, "bash other.sh 1", "it starts another script; check that one too"),
        (
            "run --a \\\n  # --b \\\n  --c 1",
            3,
            "--c 1",
            "no command begins with a dash: the one above it ended at a comment or at a line without a backslash",
        ),
    ],
)
def test_what_is_not_read_is_listed(tmp_path, script, line, text, why):
    assert read(script, tmp_path).omissions == ((line, text, why.format(folder=tmp_path)),)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("run 'a\nb", "line 1: a single quote is not closed"),
        ('run\nrun "a', 'line 2: what closes with " is not closed'),
        ("A=(1 2", "line 1: the array A is not closed"),
        ("if a; then b", "line 1: elif or else or fi is missing"),
        ("run $(a", "line 1: '(' is not closed"),
        ("fi", "line 1: 'fi' stands where a command is expected"),
        ("import os\nprint(os)", "line 2: '(' stands within a command"),
    ],
)
def test_text_that_is_no_script_is_refused_with_its_line(tmp_path, script, message):
    with pytest.raises(ShellSyntaxError) as refusal:
        read(script, tmp_path)
    assert str(refusal.value) == message


def test_nothing_is_executed(tmp_path):
    witness = tmp_path / "witness"
    script = f"touch {witness}\nA=$(touch {witness})\n`touch {witness}`\neval touch {witness}\n. <(touch {witness})"
    read(script, tmp_path)
    assert not witness.exists()


def test_function_that_each_branch_defines_may_be_either(tmp_path):
    script = "if $X; then f() { run 1; }; else f() { run 2; }; fi\nf"
    commands = [command for command in read(script, tmp_path).commands if command.words[0].text == "run"]
    assert [(command.words[1].text, command.condition) for command in commands] == [
        ("1", "`f` (line 2)"),
        ("2", "`f` (line 2)"),
    ]


@pytest.mark.parametrize(
    ("script", "value"),
    [
        ("if $X; then export A=1; fi\nrun", "${A}"),
        ("A=1; if $X; then export A; fi\nrun", "${A}"),
        ("export A=$B; run", "$B"),
        ("env A=1 run", "1"),
        ("srun env -u B A=1 C=2 run", "1"),
    ],
)
def test_variable_that_may_be_exported_is_known_as_far_as_it_is(tmp_path, script, value):
    assert read(script, tmp_path).commands[-1].environment["A"].text == value


def test_flags_below_a_comment_are_lost_to_the_command_above(tmp_path):
    (command,) = read("run --a \\\n  # --b \\\n  --c 1", tmp_path).commands
    assert [(lost.line, lost.text) for lost in command.lost] == [(3, "--c 1")]
