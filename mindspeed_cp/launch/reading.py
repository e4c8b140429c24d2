"""What was read of a shell script: commands, the words of each, and what of them is not known."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias


class Unresolved(NamedTuple):
    """A part of a word that is not known.

    spelling: how it is written in the script. why: the reason, a clause that names the line.
    name: the variable that is not set, where that is the reason.
    """

    spelling: str
    why: str
    name: str = ""


Fragment: TypeAlias = str | Unresolved


class Field(NamedTuple):
    """A word after expansion."""

    fragments: tuple[Fragment, ...]

    @classmethod
    def of(cls, fragments: Sequence[Fragment]) -> "Field":
        """A field whose neighbouring texts are one fragment."""
        merged: list[Fragment] = []
        for fragment in fragments:
            if isinstance(fragment, str) and merged and isinstance(merged[-1], str):
                merged[-1] += fragment
            elif fragment != "" or not isinstance(fragment, str):
                merged.append(fragment)
        return cls(tuple(merged))

    @classmethod
    def joined(cls, fields: Sequence["Field"], between: str = " ") -> "Field":
        """Several fields as one."""
        fragments: list[Fragment] = []
        for number, field in enumerate(fields):
            fragments += [between] * bool(number) + list(field.fragments)
        return cls.of(fragments)

    @property
    def text(self) -> str:
        """Its text, with what is not known as it is spelt."""
        return "".join(fragment if isinstance(fragment, str) else fragment.spelling for fragment in self.fragments)

    @property
    def unresolved(self) -> tuple[Unresolved, ...]:
        """What is not known of it."""
        return tuple(fragment for fragment in self.fragments if isinstance(fragment, Unresolved))

    @property
    def is_unknown(self) -> bool:
        """Whether nothing of it is known, so that it may as well be no word or several."""
        return bool(self.fragments) and all(isinstance(fragment, Unresolved) for fragment in self.fragments)


class Omission(NamedTuple):
    """Something in a script that was not read: where, what, and why."""

    line: int
    text: str
    why: str


class Command(NamedTuple):
    """A command that the script would run.

    words: its words after expansion. environment: what the script exports to it.
    condition: the blocks around it that decide whether it runs at all; empty where nothing does.
    lost: lines below it that were meant to go on with it, and do not.
    """

    line: int
    words: tuple[Field, ...]
    environment: Mapping[str, Field]
    condition: str
    lost: tuple[Omission, ...] = ()


class Reading(NamedTuple):
    """What a script would run, in order, and what was not read of it."""

    commands: tuple[Command, ...]
    omissions: tuple[Omission, ...]
