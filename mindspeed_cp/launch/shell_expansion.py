"""What a word of a shell script becomes, by its variables: fields, which keep what is not known as it is spelt.

Source: the Bash Reference Manual, 3.5.
"""

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mindspeed_cp.launch.reading import Field, Fragment, Unresolved
from mindspeed_cp.launch.shell_arithmetic import UnknownNumberError, compute, names_assigned
from mindspeed_cp.launch.shell_nodes import Arithmetic, Literal, Opaque, Parameter, Word

_WORD_AND_BLANKS = re.compile(r"[ \t\n]+|[^ \t\n]+")
_PATTERN_OF_FILES = re.compile(r"[*?]|\[[^\]]+\]")

POSITIONAL = "@"
"""The name of the positional parameters among the variables."""

_BLANKS = " \t\n"
"""What bash splits words at, unless IFS says otherwise."""


class Variable(NamedTuple):
    """A variable's value; a scalar is an array of one element here."""

    fields: tuple[Field, ...]
    is_array: bool = False

    def followed_by(self, more: "Variable") -> "Variable":
        """The value that `+=` makes of this one."""
        if self.is_array or more.is_array:
            return Variable((*self.fields, *more.fields), True)
        return Variable((Field.of([*self.fields[0].fragments, *more.fields[0].fragments]),))


class Expansion:
    """Variables, positional parameters among them, and what words become by them.

    folder: where names of files are looked for; None where it is not known. arguments_are_set: whether it is known how
    many there are; a script that is checked without any is not told that it has none. forget: is told of variables
    that arithmetic sets to what is not read, with the line and the text.
    """

    def __init__(
        self,
        variables: dict[str, Variable],
        arguments: Sequence[Field],
        folder: Path | None,
        forget: Callable[[Sequence[str], int, str], None],
    ) -> None:
        self.variables = {**variables, POSITIONAL: Variable(tuple(arguments), True)}
        self.folder = folder
        self.arguments_are_set = bool(arguments)
        self._forget = forget

    def expand(self, word: Word, *, split: bool = True) -> list[Field]:
        """The fields that a word becomes; without `split` what is not quoted is not split into several."""
        fields: list[list[Fragment]] = []
        current: list[Fragment] | None = None
        for part in word.parts:
            if isinstance(part, Literal):
                found: Fragment = part.text
                if not part.quoted:
                    found = self._file_names(part.text, word.line, starts=part is word.parts[0], split=split)
                current = [*(current or []), found]
                continue
            # What is not split is as if it stood in quotes.
            quoted = part.quoted or not split
            values = self._values(part._replace(quoted=quoted), word.line)
            for number, value in enumerate(values):
                if number and current is not None:
                    fields.append(current)
                    current = None
                if quoted:
                    current = [*(current or []), *value.fragments]
                    continue
                if doubt := self._doubt_about_words(value, word.line):
                    current = [*(current or []), Unresolved(value.text, doubt)]
                    continue
                for fragment in value.fragments:
                    for chunk in [fragment] if isinstance(fragment, Unresolved) else _WORD_AND_BLANKS.findall(fragment):
                        if isinstance(chunk, str) and chunk.isspace():
                            if current is not None:
                                fields.append(current)
                            current = None
                        else:
                            current = [*(current or []), chunk]
        if current is not None:
            fields.append(current)
        return [Field.of(fragments) for fragments in fields]

    def _file_names(self, text: str, line: int, *, starts: bool, split: bool) -> Fragment:
        """A text that is not quoted, in which a tilde is a folder, and of which a pattern makes names of files."""
        if starts and text.startswith("~"):
            home = self.variables.get("HOME")
            if home is None or not re.match(r"~(/|$)", text) or home.fields[0].unresolved:
                return Unresolved(text, f"line {line}: which folder ~ is is not known")
            text = home.fields[0].text + text[1:]
        if split and _PATTERN_OF_FILES.search(text):
            # Path.glob does not take every pattern that bash takes.
            matches = self.folder is None or any(glob.iglob(text, root_dir=self.folder))  # noqa: PTH207
            # Bash leaves a pattern that no file matches as it is.
            return (
                Unresolved(text, f"line {line}: which files match is known when the script runs") if matches else text
            )
        return text

    def _doubt_about_words(self, value: Field, line: int) -> str:
        """Why it is not known which words a value becomes that is not quoted."""
        if (separators := self.variables.get("IFS")) is None or separators.fields[0].text == _BLANKS:
            return ""
        splits = bool({*value.text} & {*_BLANKS, *separators.fields[0].text}) or separators.fields[0].unresolved
        return f"line {line}: IFS decides which words it is" if splits else ""

    def _values(self, part: Parameter | Arithmetic | Opaque, line: int) -> list[Field]:
        """What an expansion gives: one value, or one for each element of an array."""
        if isinstance(part, Opaque):
            return [Field((Unresolved(part.spelling, f"line {line}: {part.why}"),))]
        if isinstance(part, Arithmetic):
            return [Field((self.compute(part, line),))]
        return self._parameter(part, line)

    def _parameter(self, part: Parameter, line: int) -> list[Field]:
        fields = self._look_up(part, line)
        if part.operator == "":
            if fields is None:
                why = f"line {line}: {_positional_why(part.name) or f'{part.name} is not set'}"
                return [Field((Unresolved(part.spelling, why, part.name),))]
            return fields
        assert part.operand is not None
        is_empty = fields is None or (part.operator.startswith(":") and not any(field.text for field in fields))
        kind = part.operator[-1]
        if kind == "+":
            if fields and all(field.is_unknown for field in fields):
                return [Field((Unresolved(part.spelling, f"line {line}: whether {part.name} is set is not known"),))]
            return [] if is_empty else self.expand(part.operand, split=not part.quoted)
        if not is_empty:
            assert fields is not None
            return fields
        if kind == "?":
            return [Field((Unresolved(part.spelling, f"line {line}: {part.name} is not set", part.name),))]
        values = self.expand(part.operand, split=not part.quoted)
        if kind == "=":
            self.variables[part.name] = Variable((Field.joined(values),))
        return values or [Field(("",))]

    def _look_up(self, part: Parameter, line: int) -> list[Field] | None:
        """The values of a parameter; None where it is not set."""
        positional = self.variables[POSITIONAL].fields
        if part.name in ("@", "*"):
            fields = list(positional)
            return [self._in_one_word(fields, part, line)] if part.name == "*" and part.quoted else fields
        if part.name == "#":
            for field in positional:
                if field.is_unknown:
                    return [Field((field.unresolved[0]._replace(spelling=part.spelling),))]
            if not positional and not self.arguments_are_set:
                why = f"line {line}: the script is given no arguments"
                return [Field((Unresolved(part.spelling, why, "1"),))]
            return [Field((str(len(positional)),))]
        if part.name == "0" or part.name in ("?", "$", "!", "-", "RANDOM", "SECONDS"):
            return [Field((Unresolved(part.spelling, f"line {line}: it is known when the script runs"),))]
        if part.name.isdecimal():
            return _element(positional, int(part.name) - 1, part)
        if (variable := self.variables.get(part.name)) is None:
            return None
        if part.subscript in ("@", "*"):
            fields = list(variable.fields)
            return [self._in_one_word(fields, part, line)] if part.subscript == "*" and part.quoted else fields
        if part.subscript == "":
            return list(variable.fields[:1]) or None
        if part.subscript.isdecimal():
            return _element(variable.fields, int(part.subscript), part)
        return [Field((Unresolved(part.spelling, f"line {line}: which element it is is not known"),))]

    def _in_one_word(self, fields: Sequence[Field], part: Parameter, line: int) -> Field:
        """All elements, with the first character of IFS between them."""
        between = self.variables.get("IFS", Variable((Field((_BLANKS,)),))).fields[0]
        if between.unresolved:
            return Field((Unresolved(part.spelling, f"line {line}: IFS decides what stands between its elements"),))
        return Field.joined(fields, between.text[:1])

    def compute(self, part: Arithmetic, line: int) -> Fragment:
        """What an arithmetic expansion gives; names that it assigns are not known from then on."""
        expression = Field.joined(self.expand(part.expression, split=False))
        assigned = names_assigned(expression.text)
        self._forget(assigned, line, part.spelling)
        for fragment in expression.unresolved:
            return Unresolved(part.spelling, fragment.why, fragment.name)
        if assigned:
            return Unresolved(part.spelling, f"line {line}: arithmetic of this kind is not computed here")
        try:
            return str(compute(expression.text, self._number))
        except UnknownNumberError as unknown:
            return Unresolved(part.spelling, str(unknown) or f"line {line}: {unknown.name} is not set", unknown.name)
        except ValueError:
            return Unresolved(part.spelling, f"line {line}: arithmetic of this kind is not computed here")

    def _number(self, name: str) -> Field | None:
        variable = self.variables.get(name)
        return variable.fields[0] if variable is not None and variable.fields else None


def _element(fields: Sequence[Field], number: int, part: Parameter) -> list[Field] | None:
    """An element of an array; a part that is not known may be any number of elements."""
    for field in fields[: number + 1]:
        if field.is_unknown:
            return [Field((field.unresolved[0]._replace(spelling=part.spelling),))]
    return [fields[number]] if number < len(fields) else None


def _positional_why(name: str) -> str:
    return f"the script is given no argument ${name}" if name.isdecimal() else ""
