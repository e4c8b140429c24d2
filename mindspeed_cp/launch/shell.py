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

Nothing is guessed. shell_syntax.py parses into what shell_nodes.py has, shell_expansion.py expands,
shell_arithmetic.py computes, shell_conditions.py decides, and reading.py has what comes out.
"""

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from mindspeed_cp.launch.reading import Command, Field, Omission, Reading, Unresolved
from mindspeed_cp.launch.shell_arithmetic import names_assigned
from mindspeed_cp.launch.shell_conditions import evaluate_conditional, evaluate_test, opposite
from mindspeed_cp.launch.shell_expansion import POSITIONAL, Expansion, Variable
from mindspeed_cp.launch.shell_nodes import Arithmetic, Assignment, Block, Literal, Opaque, Simple, Statement, Word
from mindspeed_cp.launch.shell_syntax import DECLARATIONS, parse


def read_script(text: str, *, arguments: Sequence[str] = (), environment: Mapping[str, str], folder: Path) -> Reading:
    """What a shell script would run.

    arguments: its positional parameters. environment: the variables that are set before it starts.
    folder: the working directory, where `source` looks for files.

    Raises ShellSyntaxError where the text is no shell script.
    """
    variables = {name: Variable((Field((value,)),)) for name, value in environment.items()}
    shell = _Shell(variables, [Field((each,)) for each in arguments], folder)
    shell.run(parse(text))
    return Reading(tuple(shell.commands), tuple(shell.omissions))


class _Exit(Exception):
    """The script ends here."""


class _Return(_Exit):
    """The function, or the script that was sourced, ends here."""


class _Scope(NamedTuple):
    """A call of a function. hidden: what its local variables hide. depth: how many conditions it is called under."""

    hidden: dict[str, Variable | None]
    depth: int


class _State(NamedTuple):
    """What a subshell, or a branch, does not share with what comes after it."""

    variables: dict[str, Variable]
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
_NAME_AND_VALUE = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_TO_BE_FILLED_IN = re.compile(r"your(\s+(?!-)\S+)+\s*", re.IGNORECASE)
"""What stands in published scripts where a path belongs: `your data path`."""


class _Shell:
    """Variables, positional parameters among them, and functions, as they are at one point of a script.

    Of a function there are several bodies where it is not known which it has. An exported variable has the reason why
    it may not be, empty where it is.
    """

    def __init__(self, variables: dict[str, Variable], arguments: Sequence[Field], folder: Path | None) -> None:
        self.commands: list[Command] = []
        self.omissions: list[Omission] = []
        self._words = Expansion(variables, arguments, folder, self._forget)
        self._exported = dict.fromkeys(variables, "")
        self._functions: dict[str, tuple[Sequence[Statement], ...]] = {}
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
            return evaluate_conditional(
                statement.words, lambda word: Field.joined(self._words.expand(word, split=False))
            )
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
            self._words.variables[name] = self._unknown(name, f"it is set by the loop in line {block.line}")
        self._perhaps(bodies, block.text, block.line, again=loops)

    def _perhaps(self, bodies: Sequence[Sequence[Statement]], text: str, line: int, *, again: bool) -> None:
        """Follow each body from the state before it; what any of them sets is unknown afterwards.

        again: the bodies belong to one loop, so that what one sets may be there when it starts.
        """
        before = dict(self._words.variables)
        changed: dict[str, _Change] = {}
        exported: set[str] = set()
        functions: dict[str, tuple[Sequence[Statement], ...]] = {}
        for is_last in (False, True) if again else (True,):
            commands, omissions, start = len(self.commands), len(self.omissions), self._state()
            for body in bodies:
                self._conditions.append(f"`{text}` (line {line})")
                self.run(body)
                self._conditions.pop()
                for name, change in _differences(start.variables, self._words.variables):
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
                    self._words.variables[name] = unknown
                else:
                    between = [Variable((Field((" ",)),))] if change is _Change.MORE_WORDS else []
                    self._words.variables[name] = functools.reduce(Variable.followed_by, [*between, unknown], kept)
            self._exported |= dict.fromkeys(exported, f"line {line}, which may or may not run, exports it")
            self._functions |= functions

    def _state(self) -> _State:
        variables, exported, functions = dict(self._words.variables), dict(self._exported), dict(self._functions)
        return _State(variables, exported, functions, self._words.folder, self._integers, self._constants)

    def _restore(self, state: _State) -> None:
        variables, exported, functions, self._words.folder, self._integers, self._constants = state
        self._words.variables, self._exported, self._functions = dict(variables), dict(exported), dict(functions)

    def _omit(self, omission: Omission) -> None:
        if omission not in self.omissions:
            self.omissions.append(omission)

    def _unknown(self, name: str, why: str) -> Variable:
        spelling = "$@" if name == POSITIONAL else f"${{{name}}}"
        return Variable((Field((Unresolved(spelling, why),)),))

    def _forget(self, names: Sequence[str], line: int, text: str) -> None:
        """Count variables as not known that a line sets to what is not read."""
        if names:
            spelled = ", ".join("$@" if name == POSITIONAL else name for name in names)
            self._omit(Omission(line, _first_line(text), f"it sets {spelled}"))
        for name in names:
            self._words.variables[name] = self._unknown(name, f"line {line} sets it, and is not read")

    # Simple commands

    def _simple(self, command: Simple) -> bool | None:
        """Follow a command; whether it succeeds, None where that is not known."""
        words = tuple(field for word in command.words for field in self._words.expand(word))
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
                self._words.variables.pop(field.text, None)
                self._exported.pop(field.text, None)
        elif name == "cd":
            self._change_folder(arguments)
        elif name in ("exit", "return"):
            if name == "exit" and not self._conditions and [field.text for field in arguments] not in ([], ["0"]):
                self._omit(Omission(command.line, _first_line(command.text), "the script ends here"))
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
            self._forget([POSITIONAL], command.line, command.text)
            return
        number += texts[number] in ("-", "--")
        self._words.variables[POSITIONAL] = Variable(tuple(arguments[number:]), True)
        self._words.arguments_are_set = True

    def _shift(self, count: str, command: Simple) -> None:
        fields = self._words.variables[POSITIONAL].fields
        if not count.isdecimal() or any(field.is_unknown for field in fields[: int(count)]):
            self._forget([POSITIONAL], command.line, command.text)
        elif int(count) <= len(fields):
            # Bash shifts nothing where there are fewer.
            self._words.variables[POSITIONAL] = Variable(fields[int(count) :], True)

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
            elif name in self._words.variables and self._words.variables[name].fields:
                found[name] = self._words.variables[name].fields[0]
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
            rest = Field.of([found.group(3), *field.fragments[1:]])
            self._put(found.group(1), Variable((rest,)), bool(found.group(2)), command.line)
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
            hidden = self._words.variables.get(name)
            if not certain:
                hidden = self._unknown(name, "whether a function changes it, or hides it, is not known")
            if name not in scope.hidden:
                scope.hidden[name] = hidden
                if name in bare:
                    self._words.variables.pop(name, None)

    def _assign(self, assignment: Assignment) -> None:
        for word in assignment.values:
            self._omit_opaque(word)
        name, line = assignment.name, assignment.line
        if assignment.is_array:
            fields = tuple(field for word in assignment.values for field in self._words.expand(word))
            self._put(name, Variable(fields, True), assignment.append, line)
            return
        value = Variable((Field.joined(self._words.expand(assignment.values[0], split=False)),))
        if assignment.subscript:
            before = self._words.variables.get(name, Variable((), True))
            number = int(assignment.subscript) if assignment.subscript.isdecimal() else -1
            splits = any(field.is_unknown for field in before.fields[: number + 1])
            if not 0 <= number <= len(before.fields) or splits:
                self._forget([name], line, f"{name}[{assignment.subscript}]=")
                return
            if assignment.append:
                value = Variable((Field.joined([*before.fields[number : number + 1], *value.fields], ""),))
            whole = Variable((*before.fields[:number], *value.fields, *before.fields[number + 1 :]), True)
            self._put(name, whole, False, line)
            return
        self._put(name, value, assignment.append, line)

    def _put(self, name: str, value: Variable, append: bool, line: int) -> None:
        """Give a variable a value, or more of it."""
        if name in self._constants:
            self._omit(Omission(line, f"{name}=", f"{name} is read-only, so that bash refuses to set it"))
            return
        before = self._words.variables.get(name) if append else None
        if name in self._integers:
            if before is not None or value.is_array:
                self._forget([name], line, f"{name}=")
                return
            fragments = value.fields[0].fragments
            word = Word(tuple(Literal(fragment, True) for fragment in fragments if isinstance(fragment, str)), line)
            if len(word.parts) == len(fragments):
                value = Variable((Field((self._words.compute(Arithmetic(word, True, value.fields[0].text), line),)),))
        elif not value.is_array and _TO_BE_FILLED_IN.fullmatch(text := value.fields[0].text):
            # Three words where it is not quoted; the path that takes its place will be one.
            value = self._unknown(name, f"line {line}: '{text}' is yet to be filled in")
        self._words.variables[name] = value if before is None else before.followed_by(value)

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
        if self._words.folder is None and not path.is_absolute():
            self._omit(Omission(command.line, text, "the working directory is not known after `cd`"))
            return
        path = (self._words.folder or Path()) / path
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

    def _reset(self, name: str, value: Variable | None) -> None:
        if value is None:
            self._words.variables.pop(name, None)
        else:
            self._words.variables[name] = value

    @contextlib.contextmanager
    def _arguments(self, arguments: Sequence[Field]) -> Iterator[None]:
        """Positional parameters for the time being."""
        before, are_set = self._words.variables[POSITIONAL], self._words.arguments_are_set
        self._words.variables[POSITIONAL], self._words.arguments_are_set = (
            Variable(tuple(arguments), True),
            True,
        )
        try:
            yield
        finally:
            self._words.variables[POSITIONAL], self._words.arguments_are_set = before, are_set

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
            self._words.variables = {name: Variable((field,)) for name, field in only.items()}
            self._exported = dict.fromkeys(only, "")
            self._words.variables[POSITIONAL] = Variable(tuple(arguments), True)
            self._deeper(lambda: self.run(statements), command)
            self._restore(kept)
        finally:
            self.commands[before:] = [each._replace(line=command.line) for each in self.commands[before:]]

    def _change_folder(self, arguments: Sequence[Field]) -> None:
        known = len(arguments) == 1 and not arguments[0].unresolved and not arguments[0].text.startswith(("-", "~"))
        self._words.folder = self._words.folder / arguments[0].text if known and self._words.folder else None


class _Change(IntEnum):
    """What happened to a variable; of two changes, the smaller says less about what is kept."""

    REPLACED = 0
    LONGER = 1
    MORE_WORDS = 2


def _differences(before: Mapping[str, Variable], after: Mapping[str, Variable]) -> Iterator[tuple[str, _Change]]:
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


def _known_start(field: Field) -> str:
    """The text of a field up to the first part that is not known."""
    return field.fragments[0] if field.fragments and isinstance(field.fragments[0], str) else ""


def _set_by_env(words: Sequence[Field]) -> dict[str, Field]:
    """The variables that `env name=value ... command` sets, also behind a command that runs it."""
    names = [field.text.rpartition("/")[2] for field in words]
    found = {}
    behind = words[names.index("env") + 1 :] if "env" in names else ()
    for option, field in itertools.pairwise((Field(("",)), *behind)):
        if option.text in ("-u", "-C"):
            continue
        if assignment := _NAME_AND_VALUE.match(_known_start(field)):
            found[assignment.group(1)] = Field.of([assignment.group(3), *field.fragments[1:]])
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
