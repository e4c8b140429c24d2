"""A whole command line, looked at before it is parsed: what becomes of each flag, and all that stands in the way."""

import argparse
import contextlib
import difflib
import io
import itertools
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mindspeed_cp.messages import or_list
from mindspeed_cp.patches.blockers import Blocker
from mindspeed_cp.patches.mindspeed.record import Disposition, is_number
from mindspeed_cp.patches.mindspeed.table import FLAGS
from mindspeed_cp.patches.mindspeed.translate import Finding, Given, split_flags, translate


class Examination(NamedTuple):
    """What a parser makes of a command line.

    findings: what became of each flag of MindSpeed's.
    argv: the command line that is parsed, without MindSpeed's flags.
    args: what the parser makes of it, of what it understands; None where that is nothing.
    blockers: what stands in the way of parsing.
    """

    findings: tuple[Finding, ...]
    argv: tuple[str, ...]
    args: argparse.Namespace | None
    blockers: tuple[Blocker, ...]


def examine(argv: Sequence[str], parser: argparse.ArgumentParser, *, ignore_unknown: bool = False) -> Examination:
    """Look at a command line without side effects; to be called when all flags have been added to the parser.

    argv: the words after the program's name, none of which asks for help.
    ignore_unknown: let flags pass that nobody knows, as Megatron's parse_args does where it is told so.
    """
    actions = parser._option_string_actions
    argv, blockers = _without_detached(argv, {*actions, *FLAGS})
    findings, words = translate(argv, {name: _choices(action) for name, action in actions.items()})
    blockers += [
        Blocker(each.flag.partition(" ")[0], f"{each.flag}: {each.sentence}.")
        for each in findings
        if each.disposition is Disposition.REFUSED
    ]
    given = split_flags(words, actions)
    if not ignore_unknown:
        blockers += [_unknown(each, actions) for each in given if each.name and each.name not in actions]
    parse = _Parse(parser)
    wrong = []
    whole = parse([word for each in given for word in each.words])
    if whole.error is not None:
        # What is missing altogether is wrong with every flag alone: it is said once, below.
        missing = parse([]).error
        wrong = [(each, error) for each in given if (error := parse(each.words).error) not in (None, missing)]
        misread = {each for each, _ in wrong}
        whole = parse([word for each in given if each not in misread for word in each.words])
        blockers += [
            Blocker(each.name, f"{shlex.join(each.words)}: {_with_way_out(error, actions.get(each.name))}.")
            for each, error in wrong
        ]
        if whole.error is not None:
            blockers.append(Blocker("", f"{whole.error}."))
    if not ignore_unknown:
        said = [word for each in given if each.name and each.name not in actions for word in each.words]
        blockers += _nobody_s([word for word in whole.unknown if word not in said])
    return Examination(findings, words, whole.args, tuple(blockers))


def _choices(action: argparse.Action) -> list[str] | None:
    return None if action.choices is None else [str(choice) for choice in action.choices]


def _without_detached(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], list[Blocker]]:
    """The command line without flags whose value argparse takes for another flag, as in `--lr -1e-3`; and those."""
    given = split_flags(argv, known)
    pairs = [
        (flag, value)
        for flag, value in itertools.pairwise(given)
        if flag.name in known and not flag.values and value.name not in known and is_number(value.name)
    ]
    blockers = [
        Blocker(
            flag.name,
            f"{flag.name} {value.name}: a number in this form is taken for a flag; write {flag.name}={value.name}.",
        )
        for flag, value in pairs
    ]
    left_out = [id(each) for pair in pairs for each in pair]
    return [word for each in given if id(each) not in left_out for word in each.words], blockers


_WAYS_OUT = (
    (r"invalid int value: .*", "it takes a whole number; give it one"),
    (r"invalid float value: .*", "it takes a number; give it one"),
    (r"expected one argument", "it needs a value; give it one"),
    (r"expected at least one argument", "it needs one value or more; give it them"),
    (r"expected (\d+) arguments", r"it needs \1 values; give it as many"),
    (r"ignored explicit argument .*", "it takes no value; give the flag alone"),
)
"""What argparse says of a value, and the same as a rule and a way out."""


def _with_way_out(error: str, action: argparse.Action | None) -> str:
    """What is wrong with a flag's values, and what to do; errors of a flag's own type say so themselves."""
    if action is not None and action.choices is not None and error.startswith("invalid choice: "):
        return f"it has no such value; use {or_list([str(choice) for choice in action.choices])}"
    for pattern, sentence in _WAYS_OUT:
        if found := re.fullmatch(pattern, error):
            return found.expand(sentence)
    return error if "; " in error else f"{error}; give it another value"


_SHORT = {
    "--cp": "--context-parallel-size",
    "--tp": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
    "--ep": "--expert-model-parallel-size",
    "--etp": "--expert-tensor-parallel-size",
    "--sp": "--sequence-parallel",
}
"""What people call these flags."""


def _unknown(each: Given, known: Mapping[str, argparse.Action]) -> Blocker:
    """A flag that neither this Megatron nor MindSpeed has, with the nearest that one of them has."""
    near = _nearest(each.name.partition("=")[0], known)
    way_out = f"did you mean {or_list(near)}?" if near else "leave it out."
    return Blocker(each.name, f"{shlex.join(each.words)}: neither this Megatron nor MindSpeed has this flag; {way_out}")


def _nearest(name: str, known: Collection[str]) -> list[str]:
    """The flags that may be meant by a name that nobody knows: what it begins, else what is spelt like it.

    A few letters are like many names; what is spelt like them is taken for meant only where it does something here.
    """
    short = _SHORT.get(name.removesuffix("-size"))
    if short is not None and short in known:
        return [short]
    useful = [*known, *(flag for flag, record in FLAGS.items() if record.disposition is not Disposition.NOTED)]
    begun = sorted(dict.fromkeys(flag for flag in useful if flag.startswith(name)))
    if 0 < len(begun) <= 4:
        return begun
    is_short = len(name) < len("--letters")
    return difflib.get_close_matches(name, useful if is_short else [*known, *FLAGS], n=1, cutoff=0.75)


def _nobody_s(words: Sequence[str]) -> list[Blocker]:
    """Words that are no flags, where no flag takes them; a value with spaces that was not quoted, often."""
    return [Blocker(words[0], f"{shlex.join(words)}: no flag takes this; leave it out.")] if words else []


class _Parsed(NamedTuple):
    """What a parse gave: the arguments and the words that no flag takes, or why it failed."""

    args: argparse.Namespace | None
    unknown: Sequence[str]
    error: str | None


class _Parse:
    """A parser whose errors are values: no usage on stderr, no exit."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def __call__(self, words: Sequence[str]) -> _Parsed:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                args, unknown = self._parser.parse_known_args(list(words))
        except SystemExit:
            *_, error = said.getvalue().rpartition(": error: ")
            # "argument --name: what is wrong with it": the flag is named by whoever reads this.
            name, _, reason = error.strip().partition(": ")
            return _Parsed(None, (), reason if name.startswith("argument ") else error.strip())
        return _Parsed(args, unknown, None)
