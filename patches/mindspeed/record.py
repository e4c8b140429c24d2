"""What a flag of MindSpeed's is there and here: the record, and the words for what becomes of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple


class Disposition(Enum):
    """What becomes of a flag; the value is the word for it in tables and messages."""

    SAME = "the same"
    NOTED = "noted"
    TRANSLATED = "translated"
    REFUSED = "refused"


class Ruling(NamedTuple):
    """What becomes of one flag with these values in this command line.

    sentence: why, or what is done; for a refusal its reason, then "; " and a way out. No full stop.
    flags: what takes its place on the command line; empty unless it is translated.
    drops: flags beside it that go with it, because `flags` says what they said.
    differs: whether something else is computed than MindSpeed would, or than the flag promises: the sentence says so,
    and is a line of its own when the job starts.
    """

    disposition: Disposition
    sentence: str
    flags: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    differs: bool = False


class CommandLine:
    """The flags of one command line with their values, the last of each, as argparse has it."""

    def __init__(self, flags: Mapping[str, Sequence[str]]) -> None:
        self._flags = flags

    def has(self, name: str) -> bool:
        """Whether the flag is given."""
        return name in self._flags

    def text(self, name: str, default: str | None = None) -> str | None:
        """Its values, joined by spaces; `default` where it is not given."""
        return " ".join(self._flags[name]) if name in self._flags else default

    def number(self, name: str, default: float | None = None) -> float | None:
        """Its value as a number; `default` where it is not given, None where it is something else."""
        text = self.text(name)
        if text is None:
            return default
        return float(text) if is_number(text) else None

    def whole(self, name: str, default: int | None = None) -> int | None:
        """Its value as a whole number; `default` where it is not given, None where it is something else."""
        text = self.text(name)
        if text is None:
            return default
        return int(text) if _is_whole(text) else None

    def is_latent(self) -> bool:
        """Whether the attention is latent, in either spelling."""
        return self.has("--multi-latent-attention") or self.has("--multi-head-latent-attention")


Rule = Callable[[str, CommandLine], Ruling]
"""What becomes of a flag with this value (several are joined by spaces) in this command line."""


class Record(NamedTuple):
    """A flag of MindSpeed's.

    name: its spelling.
    values: what it takes, as in a usage line: empty, `N` a whole number, `X` a number, `S` text, `{a,b}` one of these,
        and `...` after it for any number of them.
    there: what it does in MindSpeed.
    disposition, here: what becomes of it here, and why; a refusal says a way out after "; ". Where `rule` decides, all
        that may happen.
    rule: what decides by value or by the flags beside it; None where nothing does.
    """

    name: str
    values: str
    there: str
    disposition: Disposition
    here: str
    rule: Rule | None = None

    @property
    def takes_many(self) -> bool:
        """Whether any number of values may follow."""
        return self.values.endswith("...")

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that MindSpeed takes; empty where there are others."""
        return tuple(self.values[1:-1].split(",")) if self.values.startswith("{") else ()

    def misfit(self, values: Sequence[str]) -> str | None:
        """What is wrong with these values, in MindSpeed as well; None where nothing is."""
        if self.takes_many:
            return None
        if len(values) < bool(self.values):
            return "it needs a value; give it one"
        if extra := values[bool(self.values) :]:
            return f"it takes {'one' if self.values else 'no'} value; leave out {' '.join(extra)}"
        for value in values:
            if self.choices and value not in self.choices:
                return f"MindSpeed has no such value; use {', '.join(self.choices)}"
            if self.values == "N" and not _is_whole(value):
                return "it takes a whole number; give it one"
            if self.values == "X" and not is_number(value):
                return "it takes a number; give it one"
        return None

    def ruling(self, value: str, line: CommandLine) -> Ruling:
        """What becomes of it with this value in this command line."""
        return self.rule(value, line) if self.rule else Ruling(self.disposition, self.here)


def _is_whole(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def is_number(text: str) -> bool:
    """Whether it is a number, and a finite one."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def records(disposition: Disposition, there: str, here: str, flags: str) -> tuple[Record, ...]:
    """Records that share what they do and what becomes of them: a flag a line, with what it takes.

    A number after ` =` is the value that switches the flag off, which is noted whatever the disposition.
    """
    made = []
    for line in flags.strip().splitlines():
        usage, _, off = line.strip().partition(" =")
        name, _, values = usage.partition(" ")
        made.append(Record(name, values, there, disposition, here, _unless_off(float(off), here) if off else None))
    return tuple(made)


def _unless_off(off: float, here: str) -> Rule:
    def rule(value: str, line: CommandLine) -> Ruling:
        if float(value) == off:
            return Ruling(Disposition.NOTED, "it is off")
        return Ruling(Disposition.REFUSED, here)

    return rule


def noted(there: str, here: str, flags: str) -> tuple[Record, ...]:
    """Flags that change no result: taken, and said in one line."""
    return records(Disposition.NOTED, there, here, flags)


def refused(there: str, here: str, flags: str) -> tuple[Record, ...]:
    """Flags that change the results and have no counterpart."""
    return records(Disposition.REFUSED, there, here, flags)


def spelled_otherwise(there: str, pairs: Mapping[str, str]) -> tuple[Record, ...]:
    """Flags that Megatron has under another name, with the same values and meaning: `{"--theirs N": "--megatrons"}`.

    Whole numbers are sizes: 0 is "not given" in some of MindSpeed's releases, and no size in Megatron.
    """
    made = []
    for line, target in pairs.items():
        name, _, values = line.partition(" ")

        def rule(value: str, line: CommandLine, target: str = target, values: str = values) -> Ruling:
            if values == "N" and int(value) < 1:
                return Ruling(Disposition.REFUSED, "it has to be 1 or more; give it such a number, or leave it out")
            if values == "X" and float(value) < 0:
                return Ruling(Disposition.REFUSED, "it has to be 0 or more; give it such a number, or leave it out")
            return Ruling(Disposition.TRANSLATED, f"Megatron's {target}", (*target.split(), *value.split()))

        made.append(Record(name, values, there, Disposition.TRANSLATED, f"Megatron's {target}", rule))
    return tuple(made)
