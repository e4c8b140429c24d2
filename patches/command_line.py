"""A whole command line, looked at before it is parsed: what becomes of each flag, and all that stands in the way."""

import argparse
import contextlib
import difflib
import io
from collections.abc import Sequence
from typing import NamedTuple

from mindspeed_cp.patches.blockers import Blocker
from mindspeed_cp.patches.mindspeed.record import Disposition
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
    findings, words = translate(argv, {name: _choices(action) for name, action in actions.items()})
    blockers = [
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
        blockers += [Blocker(each.name, f"{' '.join(each.words)}: {error}.") for each, error in wrong]
        if whole.error is not None:
            blockers.append(Blocker("", f"{whole.error}."))
    if not ignore_unknown:
        said = [word for each in given if each.name and each.name not in actions for word in each.words]
        blockers += _nobody_s([word for word in whole.unknown if word not in said])
    return Examination(findings, words, whole.args, tuple(blockers))


def _choices(action: argparse.Action) -> list[str] | None:
    return None if action.choices is None else [str(choice) for choice in action.choices]


def _unknown(each: Given, known: Sequence[str] | dict[str, argparse.Action]) -> Blocker:
    """A flag that neither this Megatron nor MindSpeed has, with the nearest that one of them has."""
    near = difflib.get_close_matches(each.name, [*known, *FLAGS], n=1, cutoff=0.75)
    way_out = f"did you mean {near[0]}?" if near else "leave it out."
    return Blocker(each.name, f"{' '.join(each.words)}: neither this Megatron nor MindSpeed has this flag; {way_out}")


def _nobody_s(words: Sequence[str]) -> list[Blocker]:
    """Words that are no flags, where no flag takes them; a value with spaces that was not quoted, often."""
    return [Blocker(words[0], f"{' '.join(words)}: no flag takes this; leave it out.")] if words else []


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
