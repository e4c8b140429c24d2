"""What a shell script would run, as far as that can be told without running anything.

followed        assignments, `+=`, arrays and their elements; `export`, `declare`, `local`, `readonly`, `unset`
                `$X`, `${X}`, `${X[0]}`, `"${X[@]}"`, `"$*"`, `${X:-d}` and `=`, `?`, `+`; `$((...))`; `~`; `IFS`
                `$1`, `"$@"`, `$#`, `set`, `shift`, `cd`; functions, `return`, `exit`, `exec`; groups and subshells
                `source` of a file that is there, `eval`, `bash -c "..."`, `env X=... command`
                the branch of `if` that `[ ... ]`, `[[ ... ]]`, `true` or `false` choose, and what follows `&&` and `||`
either way      branches of other conditions, or of what is not known; bodies of `case`, `for`, `while`: what they run
                has that condition, and what they set is not known afterwards
not known       `$(...)`, patterns (`${X%.sh}`, `*.py` where files match, `{1,2}`), a variable that nobody sets or that
                is yet to be filled in ("your data path"): the word keeps its spelling, as `Unresolved`, and knows why
not read        here-documents, `read`, `let`, `((X++))`, another script's file: listed as an `Omission`, and what they
                set is not known afterwards

Nothing is guessed. shell_syntax.py parses, shell_arithmetic.py computes, shell_conditions.py decides, and reading.py
has what comes out.
"""

import contextlib
import functools
import glob
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from mindspeed_cp.launch.reading import Command, Field, Omission, Piece, Reading, Unresolved
from mindspeed_cp.launch.shell_arithmetic import UnknownNumberError, compute, names_assigned
from mindspeed_cp.launch.shell_conditions import evaluate_conditional, evaluate_test, opposite
from mindspeed_cp.launch.shell_syntax import (
    DECLARATIONS,
    Arithmetic,
    Assignment,
    Block,
    Literal,
    Opaque,
    Parameter,
    Simple,
    Statement,
    Word,
    parse,
)


def read_script(text: str, *, arguments: Sequence[str] = (), environment: Mapping[str, str], folder: Path) -> Reading:
    """What a shell script would run.

    arguments: its positional parameters. environment: the variables that are set before it starts.
    folder: the working directory, where `source` looks for files.

    Raises ShellSyntaxError where the text is no shell script.
    """
    variables = {name: _Variable((Field((value,)),)) for name, value in environment.items()}
    shell = _Shell(variables, [Field((each,)) for each in arguments], folder)
    shell.run(parse(text))
    return Reading(tuple(shell.commands), tuple(shell.omissions))


class _Variable(NamedTuple):
    """A variable's value; a scalar is an array of one element here."""

    fields: tuple[Field, ...]
    is_array: bool = False


class _Exit(Exception):
    """The script ends here."""


class _Return(_Exit):
    """The function, or the script that was sourced, ends here."""


class _Scope(NamedTuple):
    """A call of a function. hidden: what its local variables hide. depth: how many conditions it is called under."""

    hidden: dict[str, _Variable | None]
    depth: int


class _State(NamedTuple):
    """What a subshell, or a branch, does not share with what comes after it."""

    variables: dict[str, _Variable]
    exported: dict[str, str]
    functions: dict[str, tuple[Sequence[Statement], ...]]
    folder: Path | None
    integers: frozenset[str]
    constants: frozenset[str]


_MAX_DEPTH = 16
"""Scripts that source each other, or functions that call themselves, end here."""

_ARGUMENTS_BEFORE_NAMES = {"read": 0, "mapfile": 0, "readarray": 0, "getopts": 1, "let": 0, "printf": 0}
"""Builtins that set variables from what would have to run: how many of their arguments come before the names."""

_STATUS: dict[str, Callable[[Sequence[Field]], bool | None]] = {
    "[": lambda fields: evaluate_test(fields[:-1]),
    "test": evaluate_test,
    "true": lambda fields: True,
    ":": lambda fields: True,
    "false": lambda fields: False,
}
"""Builtins of which it can be told whether they succeed, by their arguments."""

_SHELLS = ("bash", "sh")
_NAME = re.compile(r"[A-Za-z_]\w*")
_WORD_AND_BLANKS = re.compile(r"[ \t\n]+|[^ \t\n]+")
_NAME_AND_VALUE = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_PATTERN_OF_FILES = re.compile(r"[*?]|\[[^\]]+\]")
_TO_BE_FILLED_IN = re.compile(r"your(\s+(?!-)\S+)+\s*", re.IGNORECASE)
"""What stands in published scripts where a path belongs: `your data path`."""

_POSITIONAL = "@"
"""The name of the positional parameters among the variables."""

_BLANKS = " \t\n"
"""What bash splits words at, unless IFS says otherwise."""


class _Shell:
    """Variables, positional parameters among them, and functions, as they are at one point of a script.

    Of a function there are several bodies where it is not known which it has. An exported variable has the reason why
    it may not be, empty where it is.
    """

    def __init__(self, variables: dict[str, _Variable], arguments: Sequence[Field], folder: Path | None) -> None:
        self.commands: list[Command] = []
        self.omissions: list[Omission] = []
        self._exported = dict.fromkeys(variables, "")
        self._variables = {**variables, _POSITIONAL: _Variable(tuple(arguments), True)}
        self._functions: dict[str, tuple[Sequence[Statement], ...]] = {}
        self._folder = folder
        # Of a script that needs arguments, and is given none, what it does with them is what is asked for.
        self._arguments_are_set = bool(arguments)
        self._scopes: list[_Scope] = []
        self._integers: frozenset[str] = frozenset()
        self._constants: frozenset[str] = frozenset()
        self._conditions: list[str] = []
        self._depth = 0

    def run(self, statements: Sequence[Statement]) -> None:
        """Follow statements up to where the script would end."""
        try:
            self._follow(statements)
        except _Exit:
            return

    def _follow(self, statements: Sequence[Statement]) -> bool | None:
        """Whether the last of them succeeds; None where it is not known."""
        succeeded: bool | None = True
        before = ""
        for statement in statements:
            if not statement.joined or succeeded is (statement.joined == "&&"):
                succeeded = self._one(statement)
            elif succeeded is None:
                alone = statement._replace(joined="")
                self._perhaps([(alone,)], f"{before} {statement.joined}", statement.line, again=False)
            before = _first_line(statement.text)
        return succeeded

    def _one(self, statement: Statement) -> bool | None:
        if statement.subshell:
            kept = self._state()
            self._alone(statement)
            self._restore(kept)
            return None
        succeeded = self._alone(statement)
        return opposite(succeeded) if statement.negated else succeeded

    def _alone(self, statement: Statement) -> bool | None:
        if isinstance(statement, Simple):
            return self._simple(statement)
        if statement.kind == "[[":
            return evaluate_conditional(statement.words, lambda word: Field.joined(self._expand(word, split=False)))
        if statement.kind == "{":
            return self._follow(statement.bodies[0])
        if statement.kind == "if":
            self._if(statement)
        elif statement.kind == "function":
            self._functions[statement.name] = (statement.bodies[0],)
        elif statement.kind == "(":
            kept = self._state()
            self.run(statement.bodies[0])
            self._restore(kept)
        elif statement.kind == "((":
            self._forget(names_assigned(statement.name), statement.line, statement.text)
        else:
            self._block(statement, statement.bodies)
        return None

    def _if(self, block: Block) -> None:
        """The branch that is taken; that of a condition which is not known may be, or what is below it."""
        if len(block.bodies) < 2:
            for otherwise in block.bodies:
                self._follow(otherwise)
            return
        condition, body, *below = block.bodies
        rest = block._replace(bodies=tuple(below))
        holds = self._follow(condition)
        if holds is None:
            self._block(block, (body, (rest,)))
        elif holds:
            self._follow(body)
        else:
            self._if(rest)

    def _block(self, block: Block, bodies: Sequence[Sequence[Statement]]) -> None:
        """Bodies of a block that may run or not, or several times."""
        loops = block.kind in ("for", "while", "until", "select")
        why = "how often it runs is not known" if loops else "which branch is taken is not known"
        several = block.end_line > block.line
        lines = f"lines {block.line} to {block.end_line} set" if several else f"line {block.line} sets"
        self._omit(Omission(block.line, block.text, f"{why}; what {lines} counts as not known"))
        for name in [block.name] if _NAME.fullmatch(block.name) else names_assigned(block.name):
            self._variables[name] = self._unknown(name, f"it is set by the loop in line {block.line}")
        self._perhaps(bodies, block.text, block.line, again=loops)

    def _perhaps(self, bodies: Sequence[Sequence[Statement]], text: str, line: int, *, again: bool) -> None:
        """Follow each body from the state before it; what any of them sets is unknown afterwards.

        again: the bodies belong to one loop, so that what one sets may be there when it starts.
        """
        before = dict(self._variables)
        changed: dict[str, _Change] = {}
        exported: set[str] = set()
        functions: dict[str, tuple[Sequence[Statement], ...]] = {}
        for is_last in (False, True) if again else (True,):
            commands, omissions, start = len(self.commands), len(self.omissions), self._state()
            for body in bodies:
                self._conditions.append(f"`{text}` (line {line})")
                self.run(body)
                self._conditions.pop()
                for name, change in _differences(start.variables, self._variables):
                    changed[name] = min(change, changed.get(name, change))
                exported |= self._exported.keys() - start.exported.keys()
                for name, known in self._functions.items():
                    functions[name] = tuple(
                        dict.fromkeys((*functions.get(name, start.functions.get(name, ((),))), *known))
                    )
                self._restore(start)
            if not is_last:
                del self.commands[commands:], self.omissions[omissions:]
            for name, change in changed.items():
                verb = "sets" if change is _Change.REPLACED else "appends to"
                unknown = self._unknown(name, f"line {line}, which may or may not run, {verb} it")
                kept = before.get(name)
                if kept is None or change is _Change.REPLACED:
                    self._variables[name] = unknown
                else:
                    between = [_Variable((Field((" ",)),))] if change is _Change.MORE_WORDS else []
                    self._variables[name] = functools.reduce(_append, [*between, unknown], kept)
            self._exported |= dict.fromkeys(exported, f"line {line}, which may or may not run, exports it")
            self._functions |= functions

    def _state(self) -> _State:
        variables, exported, functions = dict(self._variables), dict(self._exported), dict(self._functions)
        return _State(variables, exported, functions, self._folder, self._integers, self._constants)

    def _restore(self, state: _State) -> None:
        variables, exported, functions, self._folder, self._integers, self._constants = state
        self._variables, self._exported, self._functions = dict(variables), dict(exported), dict(functions)

    def _omit(self, omission: Omission) -> None:
        if omission not in self.omissions:
            self.omissions.append(omission)

    def _unknown(self, name: str, why: str) -> _Variable:
        spelling = "$@" if name == _POSITIONAL else f"${{{name}}}"
        return _Variable((Field((Unresolved(spelling, why),)),))

    def _forget(self, names: Sequence[str], line: int, text: str) -> None:
        """Count variables as not known that a line sets to what is not read."""
        if names:
            spelled = ", ".join("$@" if name == _POSITIONAL else name for name in names)
            self._omit(Omission(line, _first_line(text), f"it sets {spelled}"))
        for name in names:
            self._variables[name] = self._unknown(name, f"line {line} sets it, and is not read")

    # Simple commands

    def _simple(self, command: Simple) -> bool | None:
        """Follow a command; whether it succeeds, None where that is not known."""
        words = tuple(field for word in command.words for field in self._expand(word))
        if command.has_heredoc:
            self._omit(Omission(command.line, _first_line(command.text), "a here-document's text is not read"))
        if not words:
            for assignment in command.assignments:
                self._assign(assignment)
            return _success(command)
        name, arguments = words[0].text, words[1:]
        if name in DECLARATIONS:
            self._declare(name, command, arguments)
            return _success(command)
        if name in _STATUS and name not in self._functions:
            self._record(command, words)
            return _STATUS[name](arguments)
        self._command(name, arguments, command, words)
        return None

    def _command(self, name: str, arguments: Sequence[Field], command: Simple, words: tuple[Field, ...]) -> None:
        """Follow a command whose success is not known. name, arguments: its words."""
        if name in ("source", ".") and arguments:
            self._source(arguments, command)
        elif name == "eval":
            self._nested(" ".join(field.text for field in arguments), command)
        elif name in self._functions:
            self._call(self._functions[name], arguments, command)
        elif name == "set":
            self._set(arguments, command)
        elif name == "shift":
            self._shift(arguments[0].text if arguments else "1", command)
        elif name == "unset":
            for field in arguments:
                self._variables.pop(field.text, None)
                self._exported.pop(field.text, None)
        elif name == "cd":
            self._change_folder(arguments)
        elif name in ("exit", "return"):
            raise _Exit if name == "exit" else _Return
        elif name in _ARGUMENTS_BEFORE_NAMES:
            self._forget(self._names_set_by(name, arguments), command.line, command.text)
        elif name.startswith("-") and not words[0].is_unknown:
            why = "no command begins with a dash: the one above it ended at a comment or at a line without a backslash"
            omission = Omission(command.line, _first_line(command.text), why)
            self._omit(omission)
            if self.commands:
                self.commands[-1] = self.commands[-1]._replace(lost=(*self.commands[-1].lost, omission))
        else:
            self._record(command, words)

    def _set(self, arguments: Sequence[Field], command: Simple) -> None:
        texts = [field.text for field in arguments]
        number = 0
        while number < len(texts) and texts[number][:1] in ("-", "+") and texts[number] not in ("-", "--"):
            number += 2 if re.fullmatch(r"[-+]\w*o", texts[number]) else 1
        if number >= len(texts):
            return
        if arguments[number].is_unknown:
            self._forget([_POSITIONAL], command.line, command.text)
            return
        number += texts[number] in ("-", "--")
        self._variables[_POSITIONAL] = _Variable(tuple(arguments[number:]), True)
        self._arguments_are_set = True

    def _shift(self, count: str, command: Simple) -> None:
        fields = self._variables[_POSITIONAL].fields
        if not count.isdecimal() or any(field.is_unknown for field in fields[: int(count)]):
            self._forget([_POSITIONAL], command.line, command.text)
        elif int(count) <= len(fields):
            # Bash shifts nothing where there are fewer.
            self._variables[_POSITIONAL] = _Variable(fields[int(count) :], True)

    def _names_set_by(self, builtin: str, arguments: Sequence[Field]) -> list[str]:
        texts = [field.text for field in arguments]
        if builtin == "printf":
            return texts[1:2] if texts[:1] == ["-v"] else []
        if builtin == "let":
            return [name for text in texts for name in names_assigned(text)]
        return [text for text in texts[_ARGUMENTS_BEFORE_NAMES[builtin] :] if _NAME.fullmatch(text)]

    def _record(self, command: Simple, words: tuple[Field, ...]) -> None:
        kept = self._state()
        for assignment in command.assignments:
            self._assign(assignment)
            self._exported[assignment.name] = ""
        environment = self._environment()
        self._restore(kept)
        environment |= _set_by_env(words)
        if (number := _text_for_another_shell(words)) is not None:
            self._nested(words[number].text, command, environment, words[number + 2 :])
            return
        if words[0].text.rpartition("/")[2] in _SHELLS and len(words) > 1:
            self._omit(
                Omission(command.line, _first_line(command.text), "it starts another script; check that one too")
            )
            return
        condition = ", within ".join(dict.fromkeys(self._conditions))
        self.commands.append(Command(command.line, words, environment, condition))
        if words[0].text == "exec" and len(words) > 1:
            raise _Exit

    def _environment(self) -> dict[str, Field]:
        """What the shell exports, as far as it is known."""
        found = {}
        for name, doubt in sorted(self._exported.items()):
            if doubt:
                found[name] = Field((Unresolved(f"${{{name}}}", doubt),))
            elif name in self._variables and self._variables[name].fields:
                found[name] = self._variables[name].fields[0]
        return found

    def _declare(self, builtin: str, command: Simple, arguments: Sequence[Field]) -> None:
        options = "".join(field.text[1:] for field in arguments if field.text.startswith("-"))
        # Of an argument that is quoted, or that a variable gives, it shows after expansion that it assigns.
        quoted = [(found, field) for field in arguments if (found := _NAME_AND_VALUE.match(_known_start(field)))]
        bare = [field.text for field in arguments if _NAME.fullmatch(field.text)]
        names = {assignment.name for assignment in command.assignments} | {found.group(1) for found, _ in quoted}
        if builtin == "local" or (builtin in ("declare", "typeset") and "g" not in options):
            self._hide({*names, *bare}, bare)
        if "i" in options:
            self._integers |= {*names, *bare}
        for assignment in command.assignments:
            self._assign(assignment)
        for found, field in quoted:
            rest = Field.of([found.group(3), *field.pieces[1:]])
            self._put(found.group(1), _Variable((rest,)), bool(found.group(2)), command.line)
        if any(field.is_unknown for field in arguments):
            self._omit(Omission(command.line, _first_line(command.text), "which variables it sets is not known"))
        if builtin == "readonly" or "r" in options:
            self._constants |= {*names, *bare}
        if builtin == "export" or "x" in options:
            self._exported |= dict.fromkeys({*names, *bare}, "")

    def _hide(self, names: Collection[str], bare: Collection[str]) -> None:
        """Let variables be those of the function that is called, without a value those that are given none."""
        if not self._scopes:
            return
        scope = self._scopes[-1]
        certain = len(self._conditions) == scope.depth
        for name in names:
            hidden = self._variables.get(name)
            if not certain:
                hidden = self._unknown(name, "whether a function changes it, or hides it, is not known")
            if name not in scope.hidden:
                scope.hidden[name] = hidden
                if name in bare:
                    self._variables.pop(name, None)

    def _assign(self, assignment: Assignment) -> None:
        for word in assignment.values:
            self._omit_opaque(word)
        name, line = assignment.name, assignment.line
        if assignment.is_array:
            fields = tuple(field for word in assignment.values for field in self._expand(word))
            self._put(name, _Variable(fields, True), assignment.append, line)
            return
        value = _Variable((Field.joined(self._expand(assignment.values[0], split=False)),))
        if assignment.subscript:
            before = self._variables.get(name, _Variable((), True))
            number = int(assignment.subscript) if assignment.subscript.isdecimal() else -1
            splits = any(field.is_unknown for field in before.fields[: number + 1])
            if not 0 <= number <= len(before.fields) or splits:
                self._forget([name], line, f"{name}[{assignment.subscript}]=")
                return
            if assignment.append:
                value = _Variable((Field.joined([*before.fields[number : number + 1], *value.fields], ""),))
            whole = _Variable((*before.fields[:number], *value.fields, *before.fields[number + 1 :]), True)
            self._put(name, whole, False, line)
            return
        self._put(name, value, assignment.append, line)

    def _put(self, name: str, value: _Variable, append: bool, line: int) -> None:
        """Give a variable a value, or more of it."""
        if name in self._constants:
            self._omit(Omission(line, f"{name}=", f"{name} is read-only, so that bash refuses to set it"))
            return
        before = self._variables.get(name) if append else None
        if name in self._integers:
            if before is not None or value.is_array:
                self._forget([name], line, f"{name}=")
                return
            pieces = value.fields[0].pieces
            word = Word(tuple(Literal(piece, True) for piece in pieces if isinstance(piece, str)), line)
            if len(word.parts) == len(pieces):
                value = _Variable((Field((self._compute(Arithmetic(word, True, value.fields[0].text), line),)),))
        elif not value.is_array and _TO_BE_FILLED_IN.fullmatch(text := value.fields[0].text):
            # Three words where it is not quoted; the path that takes its place will be one.
            value = self._unknown(name, f"line {line}: '{text}' is yet to be filled in")
        self._variables[name] = value if before is None else _append(before, value)

    def _omit_opaque(self, word: Word) -> None:
        for part in word.parts:
            if isinstance(part, Opaque):
                self._omit(Omission(word.line, part.spelling, part.why))

    def _source(self, arguments: Sequence[Field], command: Simple) -> None:
        file, rest = arguments[0], arguments[1:]
        text = _first_line(command.text)
        if file.unresolved:
            self._omit(Omission(command.line, text, f"which file it is is not known: {file.unresolved[0].why}"))
            return
        path = Path(file.text)
        if self._folder is None and not path.is_absolute():
            self._omit(Omission(command.line, text, "the working directory is not known after `cd`"))
            return
        path = (self._folder or Path()) / path
        try:
            statements = parse(path.read_text())
        except OSError:
            self._omit(Omission(command.line, text, f"there is no file {path}"))
            return
        except ValueError as error:
            self._omit(Omission(command.line, text, f"{path} is no shell script: {error}"))
            return
        if rest:
            with self._arguments(rest):
                self._deeper(lambda: self._follow(statements), command)
        else:
            self._deeper(lambda: self._follow(statements), command)

    def _call(self, bodies: Sequence[Sequence[Statement]], arguments: Sequence[Field], command: Simple) -> None:
        def follow() -> None:
            if len(bodies) == 1:
                self._follow(bodies[0])
            else:
                self._perhaps(bodies, command.text, command.line, again=False)

        self._scopes.append(_Scope({}, len(self._conditions)))
        with self._arguments(arguments):
            try:
                self._deeper(follow, command)
            finally:
                hidden = self._scopes.pop().hidden
                self._integers -= hidden.keys()
                self._constants -= hidden.keys()
                for name, value in hidden.items():
                    self._reset(name, value)

    def _reset(self, name: str, value: _Variable | None) -> None:
        if value is None:
            self._variables.pop(name, None)
        else:
            self._variables[name] = value

    @contextlib.contextmanager
    def _arguments(self, arguments: Sequence[Field]) -> Iterator[None]:
        """Positional parameters for the time being."""
        before, are_set = self._variables[_POSITIONAL], self._arguments_are_set
        self._variables[_POSITIONAL], self._arguments_are_set = _Variable(tuple(arguments), True), True
        try:
            yield
        finally:
            self._variables[_POSITIONAL], self._arguments_are_set = before, are_set

    def _deeper(self, follow: Callable[[], object], command: Simple) -> None:
        """Follow what a function or another script says, up to where it returns."""
        if self._depth == _MAX_DEPTH:
            self._omit(Omission(command.line, _first_line(command.text), f"it is nested more than {_MAX_DEPTH} deep"))
            return
        self._depth += 1
        try:
            follow()
        except _Return:
            return
        finally:
            self._depth -= 1

    def _nested(
        self,
        text: str,
        command: Simple,
        only: Mapping[str, Field] | None = None,
        arguments: Sequence[Field] = (),
    ) -> None:
        """Follow a script that is given as text; with `only`, in a shell of its own that sees these variables."""
        try:
            statements = parse(text, command.line)
        except ValueError as error:
            self._omit(Omission(command.line, _first_line(command.text), f"its text is no shell script: {error}"))
            return
        before = len(self.commands)
        try:
            if only is None:
                self._deeper(lambda: self._follow(statements), command)
                return
            kept = self._state()
            self._variables = {name: _Variable((field,)) for name, field in only.items()}
            self._exported = dict.fromkeys(only, "")
            self._variables[_POSITIONAL] = _Variable(tuple(arguments), True)
            self._deeper(lambda: self.run(statements), command)
            self._restore(kept)
        finally:
            self.commands[before:] = [each._replace(line=command.line) for each in self.commands[before:]]

    def _change_folder(self, arguments: Sequence[Field]) -> None:
        known = len(arguments) == 1 and not arguments[0].unresolved and not arguments[0].text.startswith(("-", "~"))
        self._folder = self._folder / arguments[0].text if known and self._folder else None

    # Expansion

    def _expand(self, word: Word, *, split: bool = True) -> list[Field]:
        """The fields that a word becomes; without `split` what is not quoted stays in one piece."""
        fields: list[list[Piece]] = []
        current: list[Piece] | None = None
        for part in word.parts:
            if isinstance(part, Literal):
                found: Piece = part.text
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
                    current = [*(current or []), *value.pieces]
                    continue
                if doubt := self._doubt_about_words(value, word.line):
                    current = [*(current or []), Unresolved(value.text, doubt)]
                    continue
                for piece in value.pieces:
                    for chunk in [piece] if isinstance(piece, Unresolved) else _WORD_AND_BLANKS.findall(piece):
                        if isinstance(chunk, str) and chunk.isspace():
                            if current is not None:
                                fields.append(current)
                            current = None
                        else:
                            current = [*(current or []), chunk]
        if current is not None:
            fields.append(current)
        return [Field.of(pieces) for pieces in fields]

    def _file_names(self, text: str, line: int, *, starts: bool, split: bool) -> Piece:
        """A text that is not quoted, in which a tilde is a folder, and of which a pattern makes names of files."""
        if starts and text.startswith("~"):
            home = self._variables.get("HOME")
            if home is None or not re.match(r"~(/|$)", text) or home.fields[0].unresolved:
                return Unresolved(text, f"line {line}: which folder ~ is is not known")
            text = home.fields[0].text + text[1:]
        if split and _PATTERN_OF_FILES.search(text):
            # Path.glob does not take every pattern that bash takes.
            matches = self._folder is None or any(glob.iglob(text, root_dir=self._folder))  # noqa: PTH207
            # Bash leaves a pattern that no file matches as it is.
            return (
                Unresolved(text, f"line {line}: which files match is known when the script runs") if matches else text
            )
        return text

    def _doubt_about_words(self, value: Field, line: int) -> str:
        """Why it is not known which words a value becomes that is not quoted."""
        if (separators := self._variables.get("IFS")) is None or separators.fields[0].text == _BLANKS:
            return ""
        splits = bool({*value.text} & {*_BLANKS, *separators.fields[0].text}) or separators.fields[0].unresolved
        return f"line {line}: IFS decides which words it is" if splits else ""

    def _values(self, part: Parameter | Arithmetic | Opaque, line: int) -> list[Field]:
        """What an expansion gives: one value, or one for each element of an array."""
        if isinstance(part, Opaque):
            return [Field((Unresolved(part.spelling, f"line {line}: {part.why}"),))]
        if isinstance(part, Arithmetic):
            return [Field((self._compute(part, line),))]
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
            return [] if is_empty else self._expand(part.operand, split=not part.quoted)
        if not is_empty:
            assert fields is not None
            return fields
        if kind == "?":
            return [Field((Unresolved(part.spelling, f"line {line}: {part.name} is not set", part.name),))]
        values = self._expand(part.operand, split=not part.quoted)
        if kind == "=":
            self._variables[part.name] = _Variable((Field.joined(values),))
        return values or [Field(("",))]

    def _look_up(self, part: Parameter, line: int) -> list[Field] | None:
        """The values of a parameter; None where it is not set."""
        positional = self._variables[_POSITIONAL].fields
        if part.name in ("@", "*"):
            fields = list(positional)
            return [self._in_one_word(fields, part, line)] if part.name == "*" and part.quoted else fields
        if part.name == "#":
            for field in positional:
                if field.is_unknown:
                    return [Field((field.unresolved[0]._replace(spelling=part.spelling),))]
            if not positional and not self._arguments_are_set:
                why = f"line {line}: the script is given no arguments"
                return [Field((Unresolved(part.spelling, why, "1"),))]
            return [Field((str(len(positional)),))]
        if part.name == "0" or part.name in ("?", "$", "!", "-", "RANDOM", "SECONDS"):
            return [Field((Unresolved(part.spelling, f"line {line}: it is known when the script runs"),))]
        if part.name.isdecimal():
            return _element(positional, int(part.name) - 1, part)
        if (variable := self._variables.get(part.name)) is None:
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
        between = self._variables.get("IFS", _Variable((Field((_BLANKS,)),))).fields[0]
        if between.unresolved:
            return Field((Unresolved(part.spelling, f"line {line}: IFS decides what stands between its elements"),))
        return Field.joined(fields, between.text[:1])

    def _compute(self, part: Arithmetic, line: int) -> Piece:
        expression = Field.joined(self._expand(part.expression, split=False))
        assigned = names_assigned(expression.text)
        self._forget(assigned, line, part.spelling)
        for piece in expression.unresolved:
            return Unresolved(part.spelling, piece.why, piece.name)
        if assigned:
            return Unresolved(part.spelling, f"line {line}: arithmetic of this kind is not computed here")
        try:
            return str(compute(expression.text, self._number))
        except UnknownNumberError as unknown:
            return Unresolved(part.spelling, str(unknown) or f"line {line}: {unknown.name} is not set", unknown.name)
        except ValueError:
            return Unresolved(part.spelling, f"line {line}: arithmetic of this kind is not computed here")

    def _number(self, name: str) -> Field | None:
        variable = self._variables.get(name)
        return variable.fields[0] if variable is not None and variable.fields else None


def _element(fields: Sequence[Field], number: int, part: Parameter) -> list[Field] | None:
    """An element of an array; a part that is not known may be any number of elements."""
    for field in fields[: number + 1]:
        if field.is_unknown:
            return [Field((field.unresolved[0]._replace(spelling=part.spelling),))]
    return [fields[number]] if number < len(fields) else None


def _append(before: _Variable, more: _Variable) -> _Variable:
    if before.is_array or more.is_array:
        return _Variable((*before.fields, *more.fields), True)
    return _Variable((Field.of([*before.fields[0].pieces, *more.fields[0].pieces]),))


class _Change(IntEnum):
    """What happened to a variable; of two changes, the smaller says less about what is kept."""

    REPLACED = 0
    LONGER = 1
    MORE_WORDS = 2


def _differences(before: Mapping[str, _Variable], after: Mapping[str, _Variable]) -> Iterator[tuple[str, _Change]]:
    """The variables that differ, and how."""
    for name in sorted({*before, *after}):
        was, now = before.get(name), after.get(name)
        if was == now:
            continue
        if was is None or now is None or was.is_array != now.is_array:
            yield name, _Change.REPLACED
        elif was.is_array:
            # Elements are words of their own.
            yield name, _Change.LONGER if now.fields[: len(was.fields)] == was.fields else _Change.REPLACED
        else:
            old, new = was.fields[0].text, now.fields[0].text
            grown = bool(old) and new.startswith(old)
            more_words = grown and new[len(old) :][:1].isspace()
            yield name, _Change.MORE_WORDS if more_words else _Change.LONGER if grown else _Change.REPLACED


def _success(command: Simple) -> bool | None:
    """Of a command that does nothing but assign: it succeeds, unless something that has to run decides it."""
    words = (word for assignment in command.assignments for word in assignment.values)
    return None if any(isinstance(part, Opaque) for word in words for part in word.parts) else True


def _first_line(text: str) -> str:
    first, newline, _ = text.partition("\n")
    return first.rstrip("\\ ") + (" ..." if newline else "")


def _positional_why(name: str) -> str:
    return f"the script is given no argument ${name}" if name.isdecimal() else ""


def _known_start(field: Field) -> str:
    """The text of a field up to the first part that is not known."""
    return field.pieces[0] if field.pieces and isinstance(field.pieces[0], str) else ""


def _set_by_env(words: Sequence[Field]) -> dict[str, Field]:
    """The variables that `env name=value ... command` sets, also behind a command that runs it."""
    names = [field.text.rpartition("/")[2] for field in words]
    found = {}
    behind = words[names.index("env") + 1 :] if "env" in names else ()
    for option, field in itertools.pairwise((Field(("",)), *behind)):
        if option.text in ("-u", "-C"):
            continue
        if assignment := _NAME_AND_VALUE.match(_known_start(field)):
            found[assignment.group(1)] = Field.of([assignment.group(3), *field.pieces[1:]])
        elif not field.text.startswith("-"):
            break
    return found


def _text_for_another_shell(words: Sequence[Field]) -> int | None:
    """Which word is the script in `... bash -c script`; None where there is none."""
    for number, (first, second) in enumerate(itertools.pairwise(words)):
        is_shell = first.text.rpartition("/")[2] in _SHELLS
        if is_shell and re.fullmatch(r"-\w*c", second.text) and number + 2 < len(words):
            return number + 2
    return None
