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


Piece: TypeAlias = str | Unresolved


class Field(NamedTuple):
    """A word after expansion."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Field":
        """A field whose neighbouring texts are one piece."""
        merged: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, str) and merged and isinstance(merged[-1], str):
                merged[-1] += piece
            elif piece != "" or not isinstance(piece, str):
                merged.append(piece)
        return cls(tuple(merged))

    @classmethod
    def joined(cls, fields: Sequence["Field"], between: str = " ") -> "Field":
        """Several fields as one."""
        pieces: list[Piece] = []
        for number, field in enumerate(fields):
            pieces += [between] * bool(number) + list(field.pieces)
        return cls.of(pieces)

    @property
    def text(self) -> str:
        """Its text, with what is not known as it is spelt."""
        return "".join(piece if isinstance(piece, str) else piece.spelling for piece in self.pieces)

    @property
    def unresolved(self) -> tuple[Unresolved, ...]:
        """What is not known of it."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Unresolved))

    @property
    def is_unknown(self) -> bool:
        """Whether nothing of it is known, so that it may as well be no word or several."""
        return bool(self.pieces) and all(isinstance(piece, Unresolved) for piece in self.pieces)


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
