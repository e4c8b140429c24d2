"""`python -m mindspeed_cp check`: what becomes of each flag of a launch script, without starting anything."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mindspeed_cp.launch.launcher import Launch, find_launches, find_unread
from mindspeed_cp.launch.reading import Field, Reading
from mindspeed_cp.launch.report import Report, Row, Unknown, Verdict, describe, describe_omissions
from mindspeed_cp.launch.shell import read_script
from mindspeed_cp.patches.arguments import examine_command_line, notes_on_command_line
from mindspeed_cp.patches.command_line import Examination, examine
from mindspeed_cp.patches.mindspeed.programs import PROGRAMS_OF_MINDSPEED
from mindspeed_cp.patches.mindspeed.record import Disposition
from mindspeed_cp.patches.mindspeed.table import FLAGS
from mindspeed_cp.patches.mindspeed.translate import split_flags

_FLAG = re.compile(r"--[a-z][\w-]*")
_ENVIRONMENT = "CUDA_DEVICE_MAX_CONNECTIONS"
"""The variable that decides whether flags are accepted."""


class CheckError(ValueError):
    """There is nothing to check: a line that says why, and what to give instead."""


def check(words: Sequence[str], parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> tuple[str, bool]:
    """The report on a script or on flags, as text, and whether anything is blocked.

    words: a file and the arguments that it would be started with, or flags. parser: Megatron's, patched.
    environment: the variables that a script would find.

    Raises CheckError where there is nothing to check.
    """
    if words[0].startswith("-"):
        flags = tuple(Field((word,)) for word in words)
        reading = Reading((), ())
        ranks = environment.get("WORLD_SIZE", "")
        own = {name: Field((value,)) for name, value in environment.items()}
        launches = [Launch(0, "pretrain_gpt.py", flags, int(ranks) if ranks.isdecimal() else None, own, "")]
    else:
        reading = read_file(words[0], words[1:], environment)
        launches = find_launches(reading.commands)
        omissions = {*reading.omissions, *find_unread(reading.commands)}
        reading = reading._replace(omissions=tuple(sorted(omissions, key=lambda each: each.line)))
        if not launches:
            raise CheckError("\n".join([_no_launch(words[0]), *describe_omissions(reading)]))
    reports = [examine_launch(launch, parser) for launch in launches]
    parts = [describe(report, words[0]) for report in reports]
    if reading.omissions:
        parts.append("\n".join(describe_omissions(reading)))
    return "\n\n".join(parts), any(report.is_blocked for report in reports)


def read_file(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Reading:
    """What the script in a file would run.

    Raises CheckError where it is no shell script.
    """
    if not name:
        raise CheckError("there is no file ''; give a shell script, or flags.")
    path = Path(name)
    if path.suffix == ".py":
        raise CheckError(f"{path} is a Python program; check the shell script that starts it, or its flags.")
    try:
        return read_script(path.read_text(), arguments=arguments, environment=environment, folder=Path.cwd())
    except OSError as error:
        raise CheckError(f"{path}: {error.strerror}; give a shell script, or flags.") from error
    except ValueError as error:
        # What is no text is a ValueError, too.
        raise CheckError(f"{path} cannot be read as a shell script: {error}; give a shell script, or flags.") from error


def examine_launch(launch: Launch, parser: argparse.ArgumentParser) -> Report:
    """What becomes of each flag of a launch."""
    actions = parser._option_string_actions
    asks_for_help = [field for field in launch.flags if field.text in ("-h", "--help")]
    known, unknown, blocked, without_value = _sort_out_unknown(
        [field for field in launch.flags if field not in asks_for_help], parser
    )
    # What MindSpeed's flags stand for depends on their values: any argument may be among it.
    needed = [name for name in without_value if not _is_text(name, actions)]
    read_by_any_rule = not {*needed} <= {*actions}
    variable = launch.environment.get(_ENVIRONMENT)
    with _environment(variable):
        if read_by_any_rule:
            found, notes = examine(known, parser), []
        else:
            dests = {actions[name].dest for name in without_value if name in actions}
            found = examine_command_line(known, parser, num_ranks=launch.ranks, unknown=dests)
            notes = notes_on_command_line(found, known, parser)
    rows = [
        *(Row(Verdict.BLOCKED, sentence) for sentence in _wrong_with_launch(launch, asks_for_help)),
        *blocked,
        *_rows(found, parser),
        *(Row(Verdict.NOTED, note) for note in notes),
    ]
    if needed:
        rules = "what the flags mean together was" if read_by_any_rule else "rules that read them were"
        rows.append(Row(Verdict.NOTED, f"{'  '.join(needed)}: for want of values, {rules} not checked."))
    if variable is not None and variable.unresolved:
        unknown.append(Unknown(variable, f"as {_ENVIRONMENT} it has to be 1 wherever Megatron asks for it"))
    return Report(launch, tuple(rows), tuple(unknown), tuple(_without_blocked(found, actions)))


def _wrong_with_launch(launch: Launch, asks_for_help: Sequence[Field]) -> Iterator[str]:
    """What is wrong whatever the flags mean: with the program, with a flag that starts nothing, with lines cut off."""
    program = launch.script.rpartition("/")[2]
    if program in PROGRAMS_OF_MINDSPEED:
        yield (
            f"{launch.script}: it is MindSpeed-LLM's program for {PROGRAMS_OF_MINDSPEED[program]}, and imports "
            f"MindSpeed-LLM; use a program of Megatron's, such as pretrain_gpt.py."
        )
    for field in asks_for_help:
        yield f"{field.text}: the help is printed, and nothing runs; leave it out."
    for each in launch.lost:
        yield (
            f"{each.text} (line {each.line}): {each.why}; end each line above it with a backslash, and put comments "
            f"before the command."
        )


def _without_blocked(found: Examination, actions: Mapping[str, argparse.Action]) -> Iterator[str]:
    """The words of flags that would run, without those that a blocker is about, unless it is about others beside."""
    given = [each for each in split_flags(found.argv, actions) if each.name in actions]
    names = {each.name for each in given}
    blocked = {
        blocker.flag for blocker in found.blockers if not {*_FLAG.findall(blocker.sentence)} & names - {blocker.flag}
    }
    for each in given:
        if each.name not in blocked:
            yield from each.words


def _sort_out_unknown(
    fields: Sequence[Field], parser: argparse.ArgumentParser
) -> tuple[list[str], list[Unknown], list[Row], list[str]]:
    """The words that can be examined, those that are not known, a row for each flag that needs to be known, and the
    names of all flags without a known value.

    Text that is not known stays as it is spelt; a number or a choice that is not known is blocked.
    """
    actions = parser._option_string_actions
    known: list[str] = []
    unknown: list[Unknown] = []
    blocked: list[Row] = []
    without_value: list[str] = []
    left = list(fields)
    for each in split_flags([field.text for field in fields], {*actions, *FLAGS}):
        own, left = left[: len(each.words)], left[len(each.words) :]
        takes = _takes(each.name, actions)
        # Words beyond the flag's values may be flags, or nothing.
        values, beyond = (own, []) if takes is None else (own[: 1 + takes], own[1 + takes :])
        if not each.name:
            values, beyond = [], own
        loose = [field for field in beyond if field.is_unknown]
        unknown += [Unknown(field, "it may add flags, or none") for field in loose]
        rest = [field for field in beyond if not field.is_unknown]
        open_values = [field for field in values if field.unresolved]
        if open_values and (each.name in actions or each.name in FLAGS):
            without_value.append(each.name)
        if open_values and not _is_text(each.name, actions):
            spelled = " ".join(field.text for field in values)
            why = "; ".join(dict.fromkeys(fragment.why for field in open_values for fragment in field.unresolved))
            blocked.append(Row(Verdict.BLOCKED, f"{spelled}: its value is not known ({why}); {_way_out(open_values)}."))
            known += [field.text for field in rest]
            continue
        unknown += [Unknown(field, "it is kept as it is spelt") for field in open_values]
        known += [field.text for field in (*values, *rest)]
    return known, unknown, blocked, without_value


def _way_out(fields: Sequence[Field]) -> str:
    names = [fragment.name for field in fields for fragment in field.unresolved if fragment.name]
    if not names:
        return "write the value itself, or check the flags alone"
    if names[0].isdecimal():
        return "give the script's arguments after its name"
    return f"set it before the command: {names[0]}=... python -m mindspeed_cp check"


def _takes(name: str, actions: Mapping[str, argparse.Action]) -> int | None:
    """How many values a flag takes; None for any number."""
    if name in actions:
        nargs = actions[name].nargs
        return 1 if nargs is None else nargs if isinstance(nargs, int) else None
    if name in FLAGS:
        return None if FLAGS[name].takes_many else int(bool(FLAGS[name].values))
    return 1


def _is_text(name: str, actions: Mapping[str, argparse.Action]) -> bool:
    """Whether any text is a value of the flag, so that it does not matter which."""
    if name in actions:
        return actions[name].type in (None, str) and actions[name].choices is None
    return name not in FLAGS or FLAGS[name].values.startswith("S")


def _rows(found: Examination, parser: argparse.ArgumentParser) -> Iterator[Row]:
    actions = parser._option_string_actions
    yield from (Row(Verdict.BLOCKED, blocker.sentence) for blocker in found.blockers)
    spoken_of = {blocker.flag for blocker in found.blockers}
    for each in found.findings:
        if each.disposition is Disposition.TRANSLATED:
            target = f"{' '.join(each.flags)}: {each.sentence}" if each.flags else each.sentence
            yield Row(Verdict.TRANSLATED, f"{each.flag} -> {target}.")
    by_reason: dict[str, list[str]] = {}
    for each in found.findings:
        if each.disposition is Disposition.NOTED:
            by_reason.setdefault(each.sentence, []).append(each.flag)
    yield from (Row(Verdict.NOTED, f"{'  '.join(flags)}: {reason}.") for reason, flags in by_reason.items())
    translated = {word for each in found.findings for word in each.flags}
    plain = [
        " ".join(each.words)
        for each in split_flags(found.argv, actions)
        if each.name in actions and each.name not in spoken_of | translated
    ]
    if plain:
        yield Row(Verdict.AS_IT_IS, "  ".join(plain))


@contextlib.contextmanager
def _environment(variable: Field | None) -> Iterator[None]:
    """The variable that flags are judged by, as the launch would find it; where it is not known, as it should be."""
    before = os.environ.get(_ENVIRONMENT)
    _set(None if variable is None else "1" if variable.unresolved else variable.text)
    try:
        yield
    finally:
        _set(before)


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(_ENVIRONMENT, None)
    else:
        os.environ[_ENVIRONMENT] = value


def _no_launch(name: str) -> str:
    return (
        f"{name} starts no training that can be read: a command with a .py script, by torchrun, or with "
        f"--micro-batch-size; check its flags instead: python -m mindspeed_cp check --flag ..."
    )
