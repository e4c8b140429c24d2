"""What there is to say of a launch, and how it is printed."""

import textwrap
from enum import Enum
from typing import NamedTuple

from mindspeed_cp.launch.launcher import Launch
from mindspeed_cp.launch.reading import Field, Reading

_WIDTH = 116
"""Characters of a line."""


class Verdict(Enum):
    """What becomes of a flag; the value is the word for it in the table."""

    BLOCKED = "blocked"
    TRANSLATED = "translated"
    NOTED = "noted"
    AS_IT_IS = "as it is"


class Row(NamedTuple):
    """A line of the table."""

    verdict: Verdict
    text: str


class Unknown(NamedTuple):
    """A word whose value is not known. means: what that leaves open."""

    word: Field
    means: str


class Report(NamedTuple):
    """What there is to say of one launch.

    flags: those that would run, without MindSpeed's and without what is blocked on its own.
    unknown: words whose value is not known.
    """

    launch: Launch
    rows: tuple[Row, ...]
    unknown: tuple[Unknown, ...]
    flags: tuple[str, ...]

    @property
    def is_blocked(self) -> bool:
        """Whether anything stands in the way."""
        return any(row.verdict is Verdict.BLOCKED for row in self.rows)


def describe(report: Report, name: str) -> str:
    """The report as text: where the launch is, its table, what is not known, and what would run. name: of the file."""
    launch = report.launch
    where = f"{name}, line {launch.line}: {launch.script}" if launch.line else "flags"
    ranks = f" on {launch.ranks} rank{'s' * (launch.ranks > 1)}" if launch.ranks else ", on how many ranks is not known"
    within = f", within {launch.condition}" if launch.condition else ""
    lines = [f"{where}{ranks}{within}"]
    for verdict in Verdict:
        for row in report.rows:
            if row.verdict is verdict:
                lines += _wrap(f"  {verdict.value:<12}", row.text)
    if report.unknown:
        lines += ["", "not known"]
        for each in dict.fromkeys(report.unknown):
            why = "; ".join(dict.fromkeys(fragment.why for fragment in each.word.unresolved))
            lines += _wrap("  ", f"{_in_one_line(each.word.text)}: {why}; {each.means}")
    lines += ["", "would run without what is blocked" if report.is_blocked else "would run"]
    start = f"-m mindspeed_cp {launch.script}"
    open_words = {each.word.text for each in report.unknown}
    flags = [word if word in open_words else _quoted(word) for word in report.flags]
    lines += _wrap("  ", " ".join([start, *flags]), ending=" \\")
    return "\n".join(lines)


def _wrap(head: str, text: str, *, ending: str = "") -> list[str]:
    """Lines of a text behind a head, with flags left whole."""
    lines = textwrap.wrap(
        text, _WIDTH - len(head) - len(ending), break_on_hyphens=False, break_long_words=False, replace_whitespace=True
    )
    return [
        f"{head if number == 0 else ' ' * len(head)}{line}{ending if number + 1 < len(lines) else ''}"
        for number, line in enumerate(lines)
    ]


def _quoted(word: str) -> str:
    """A word as a shell would have to be given it; what is not known keeps its spelling."""
    plain = word and not any(character in word for character in " \t\n;&|<>()'\"*?[]#~\\")
    return word if plain or "$" in word else "'" + word.replace("'", "'\\''") + "'"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def describe_omissions(reading: Reading) -> list[str]:
    """Lines that say what of a script was not read; none where all was."""
    lines = ["not read"]
    for omission in reading.omissions:
        lines += _wrap("  ", f"line {omission.line}: {_in_one_line(omission.text)}: {omission.why}")
    return lines if reading.omissions else []
