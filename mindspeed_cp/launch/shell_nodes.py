"""What a shell script is made of: statements, words and their parts, as shell_syntax.py reads them; not expanded."""

from typing import NamedTuple, TypeAlias


class Literal(NamedTuple):
    """Characters that stand for themselves."""

    text: str
    quoted: bool


class Parameter(NamedTuple):
    """`$name`, `${name}`, `${name[subscript]}`, `${name<operator>operand}`.

    operator: one of "", "-", "=", "+", "?", with a colon before it where the empty text counts as not set.
    """

    name: str
    subscript: str
    operator: str
    operand: "Word | None"
    quoted: bool
    spelling: str


class Arithmetic(NamedTuple):
    """`$((expression))`; the expression is expanded as if in double quotes before it is computed."""

    expression: "Word"
    quoted: bool
    spelling: str


class Opaque(NamedTuple):
    """What cannot be known without running something."""

    spelling: str
    why: str
    quoted: bool


Part: TypeAlias = Literal | Parameter | Arithmetic | Opaque


class Word(NamedTuple):
    """One word of a command, before expansion."""

    parts: tuple[Part, ...]
    line: int


class Assignment(NamedTuple):
    """`name=value`, `name[subscript]=value` or with `+=`; several values where it is an array."""

    name: str
    subscript: str
    append: bool
    values: tuple[Word, ...]
    is_array: bool
    line: int


class Simple(NamedTuple):
    """A simple command. Assignments without words change the shell's variables.

    has_heredoc: whether it is given a here-document.
    joined: the operator between the command before it and this one, "&&", "||" or nothing.
    subshell: a member of a pipeline or in the background, so that its assignments are lost.
    negated: whether an exclamation mark stands before it.
    """

    assignments: tuple[Assignment, ...]
    words: tuple[Word, ...]
    has_heredoc: bool
    line: int
    text: str
    joined: str
    subshell: bool = False
    negated: bool = False


class Block(NamedTuple):
    """A compound command.

    kind: the word that opens it: if, case, for, while, until, select, function, `(`, `{`, `((` or `[[`.
    bodies: lists of statements, of which the first always runs; those after it may run or not.
    name: the function's, the loop's variable, or the expression of `((` and of `for ((`.
    words: within `[[`, its operators among them.
    """

    kind: str
    name: str
    bodies: tuple[tuple["Statement", ...], ...]
    words: tuple[Word, ...]
    line: int
    end_line: int
    text: str
    joined: str
    subshell: bool = False
    negated: bool = False


Statement: TypeAlias = Simple | Block
