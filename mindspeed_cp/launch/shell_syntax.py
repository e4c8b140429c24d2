"""The syntax of a shell script: text in, statements out; nothing is expanded, looked up or run.

It knows the part of bash that launch scripts are written in. What has no meaning without running something (a command
substitution, a pattern operator) becomes an `Opaque` part, so that whoever expands the word can say why it stays so.
Source: the Bash Reference Manual, chapter 3.
"""

import re
from collections.abc import Collection

from mindspeed_cp.launch.shell_nodes import (
    Arithmetic,
    Assignment,
    Block,
    Literal,
    Opaque,
    Parameter,
    Part,
    Simple,
    Statement,
    Word,
)

DECLARATIONS = frozenset({"export", "declare", "typeset", "local", "readonly"})
"""Builtins whose arguments are assignments."""


class ShellSyntaxError(ValueError):
    """A text that is no shell script: the line, and what is wrong with it."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")


_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_ASSIGNMENT = re.compile(rf"({_NAME})(\[[^\]\n]*\])?(\+?)=")
_ELEMENT = re.compile(r"\[[^\]\s]*\]\+?=")
_REDIRECTION = re.compile(r"(?:\d+|\{\w+\})?(<<<|<<-|<<|&>>|&>|>>|>&|<&|>\||<>|<(?!\()|>(?!\())")
_RESERVED = re.compile(
    r"(?:if|then|elif|else|fi|for|while|until|select|do|done|case|esac|function|time|\[\[|[{}!])(?=[\s;()&|<>]|$)"
)
_FUNCTION = re.compile(r"([A-Za-z_][\w:.-]*)[ \t]*\([ \t]*\)")
_EXPANSION = re.compile(rf"({_NAME}|[0-9]+|[@*])(?:\[([^\]]*)\])?(?:(:?[-=+?])|(?=\}}))")
_PATTERN_OF_CASE = re.compile(r"\(?(?:[^)\\'\"\n]|\\.|'[^']*'|\"[^\"]*\")*\)")
_CONNECTOR = re.compile(r"&&|\|\||\|&?|;;&|;;|;&|;|&(?!>)")
_END_OF_CONDITIONAL = re.compile(r"\]\](?=[\s;()&|]|$)")
_OPERATOR_OF_CONDITIONAL = re.compile(r"&&|\|\||[;&|()<>]")
_METACHARACTERS = " \t\n;&|()<>"
_CASE_END = frozenset({";;", ";&", ";;&"})


def parse(text: str, line: int = 1) -> tuple[Statement, ...]:
    """The statements of a script, whose first line has this number.

    Raises ShellSyntaxError where a quote, a bracket or a block is not closed.
    """
    return _Parser(text, line).statements()


class _Parser:
    """A position in a text, and what is expected from there on."""

    def __init__(self, text: str, line: int) -> None:
        self._text = text
        self._first_line = line
        self._at = 0
        self._heredocs: list[tuple[str, bool]] = []

    # Position

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + self._first_line

    def _error(self, what: str, line: int | None = None) -> ShellSyntaxError:
        return ShellSyntaxError(line or self._line(), what)

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _skip(self, *, newlines: bool) -> None:
        """Go past blanks, continued lines and comments, with `newlines` past ends of lines too."""
        while self._at < len(self._text):
            if self._peek("\\\n"):
                self._at += 2
            elif self._text[self._at] in " \t\r":
                self._at += 1
            elif self._peek("#"):
                self._at = self._end_of_line()
            elif newlines and self._peek("\n"):
                self._newline()
            else:
                return

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _newline(self) -> None:
        """Go past the end of a line, and past the here-documents that begin after it."""
        self._at += 1
        for delimiter, indented in self._heredocs:
            while self._at < len(self._text):
                end = self._end_of_line()
                line = self._text[self._at : end]
                self._at = min(end + 1, len(self._text))
                if (line.lstrip("\t") if indented else line) == delimiter:
                    break
        self._heredocs.clear()

    # Statements

    def statements(self, closers: Collection[str] = (), opened: int = 0) -> tuple[Statement, ...]:
        """Those up to one of the closing words, which is not consumed, or to the end of the text."""
        found: list[Statement] = []
        joined, in_pipe = "", False
        while True:
            self._skip(newlines=True)
            if self._at >= len(self._text):
                if closers:
                    raise self._error(f"{' or '.join(sorted(closers))} is missing", opened)
                return tuple(found)
            if self._closer(closers):
                return tuple(found)
            if self._peek(")") or _CONNECTOR.match(self._text, self._at):
                raise self._error(f"{self._text[self._at]!r} stands where a command is expected")
            statement = self._statement(joined)
            self._skip(newlines=False)
            connector = _CONNECTOR.match(self._text, self._at)
            operator = connector.group() if connector and connector.group() not in _CASE_END else ""
            self._at += len(operator)
            joined = operator if operator in ("&&", "||") else ""
            piped = operator.startswith("|") and operator != "||"
            found.append(statement._replace(subshell=piped or in_pipe or operator == "&"))
            in_pipe = piped

    def _closer(self, closers: Collection[str]) -> bool:
        reserved = _RESERVED.match(self._text, self._at)
        if reserved and reserved.group() in closers:
            return True
        return any(self._peek(closer) for closer in closers if closer in (")", ";;", ";&"))

    def _statement(self, joined: str) -> Statement:
        start, negated = self._at, False
        while (reserved := _RESERVED.match(self._text, self._at)) and reserved.group() in ("!", "time"):
            negated ^= reserved.group() == "!"
            self._at = reserved.end()
            self._skip(newlines=False)
        line = self._line()
        kind = reserved.group() if reserved else "((" if self._peek("((") else "(" if self._peek("(") else ""
        name, words = "", tuple[Word, ...]()
        bodies: tuple[tuple[Statement, ...], ...] | None = None
        if kind == "[[":
            self._at += len(kind)
            bodies, words = (), self._conditional(line)
        elif kind and kind not in ("then", "do", "}", "fi", "done", "esac", "elif", "else"):
            self._at += len(kind)
            name, bodies = self._compound(kind, line)
        elif kind:
            raise self._error(f"{kind!r} stands where a command is expected")
        elif function := _FUNCTION.match(self._text, self._at):
            self._at = function.end()
            kind, name, bodies = "function", function.group(1), self._function_body()
        if bodies is None:
            return self._simple(joined, start)._replace(negated=negated)
        self._skip(newlines=False)
        while self._redirection():
            self._skip(newlines=False)
        first_line = self._text[start : self._at].partition("\n")[0].strip()
        return Block(kind, name, bodies, words, line, self._line(), first_line, joined, negated=negated)

    def _compound(self, kind: str, line: int) -> tuple[str, tuple[tuple[Statement, ...], ...]]:
        """What is within a compound command whose opening word was consumed: a name, where it has one, and bodies."""
        if kind == "if":
            return "", self._branches(line)
        if kind in ("while", "until"):
            condition = self._body({"do"}, line)
            return "", (condition, self._body({"done"}, line))
        if kind in ("for", "select"):
            return self._loop(line)
        if kind == "case":
            return "", ((), *self._cases(line))
        if kind == "function":
            self._skip(newlines=False)
            name = self._match(re.compile(r"[\w:.-]+"), "a function's name is expected")
            self._skip(newlines=False)
            if self._peek("("):
                self._balanced("(", ")")
            return name, self._function_body()
        if kind == "((":
            self._at -= len(kind)
            start = self._at
            self._balanced("(", ")")
            return self._text[start : self._at], ()
        return "", (self._body({"}" if kind == "{" else ")"}, line),)

    def _body(self, closers: Collection[str], opened: int) -> tuple[Statement, ...]:
        body = self.statements(closers, opened)
        self._at += len(next(closer for closer in closers if self._peek(closer)))
        return body

    def _branches(self, line: int) -> tuple[tuple[Statement, ...], ...]:
        bodies = [self._body({"then"}, line)]
        while True:
            bodies.append(self.statements({"elif", "else", "fi"}, line))
            if self._peek("elif"):
                self._at += len("elif")
                bodies.append(self._body({"then"}, line))
            elif self._peek("else"):
                self._at += len("else")
                bodies.append(self._body({"fi"}, line))
                return tuple(bodies)
            else:
                self._at += len("fi")
                return tuple(bodies)

    def _loop(self, line: int) -> tuple[str, tuple[tuple[Statement, ...], ...]]:
        self._skip(newlines=False)
        if self._peek("(("):
            start = self._at
            self._balanced("(", ")")
            name = self._text[start : self._at]
        else:
            name = self._match(re.compile(_NAME), "a loop's variable is expected")
        header = re.compile(r"(?:(?!\bdo\b)[^;\n\\]|\\\n|\\.)*").match(self._text, self._at)
        assert header is not None
        self._at = header.end()
        self._skip(newlines=True)
        if self._peek(";"):
            self._at += 1
            self._skip(newlines=True)
        self._match(re.compile(r"do\b|\{"), "do is missing")
        return name, ((), self._body({"done", "}"}, line))

    def _cases(self, line: int) -> list[tuple[Statement, ...]]:
        self._match(re.compile(r"(?s).*?\bin\b"), "in is missing")
        bodies: list[tuple[Statement, ...]] = []
        while True:
            self._skip(newlines=True)
            if re.compile(r"esac\b").match(self._text, self._at):
                self._at += len("esac")
                return bodies
            self._match(_PATTERN_OF_CASE, "a pattern of case is expected", line)
            bodies.append(self.statements({";;", ";&", "esac"}, line))
            if connector := re.compile(r";;&|;;|;&").match(self._text, self._at):
                self._at = connector.end()

    def _function_body(self) -> tuple[tuple[Statement, ...], ...]:
        self._skip(newlines=True)
        body = self._statement("")
        return body.bodies if isinstance(body, Block) and body.kind in "({" else ((body,),)

    def _conditional(self, line: int) -> tuple[Word, ...]:
        words: list[Word] = []
        while True:
            self._skip(newlines=True)
            if self._at >= len(self._text):
                raise self._error("]] is missing", line)
            if end := _END_OF_CONDITIONAL.match(self._text, self._at):
                self._at = end.end()
                return tuple(words)
            if operator := _OPERATOR_OF_CONDITIONAL.match(self._text, self._at):
                self._at = operator.end()
                words.append(Word((Literal(operator.group(), False),), self._line()))
            else:
                words.append(self._word())

    def _match(self, pattern: "re.Pattern[str]", what: str, line: int | None = None) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(what, line)
        self._at = found.end()
        return found.group()

    def _simple(self, joined: str, start: int) -> Simple:
        assignments: list[Assignment] = []
        words: list[Word] = []
        line, end, heredocs = self._line(), start, len(self._heredocs)
        while True:
            self._skip(newlines=False)
            if self._at >= len(self._text) or self._text[self._at] in ("\n", ";", "|", ")"):
                break
            if self._redirection():
                end = self._at
                continue
            if self._text[self._at] in "&(":
                if self._peek("("):
                    raise self._error("'(' stands within a command")
                break
            declares = bool(words) and _literal(words[0]) in DECLARATIONS
            assignment = _ASSIGNMENT.match(self._text, self._at) if declares or not words else None
            if assignment:
                assignments.append(self._assignment(assignment))
            else:
                words.append(self._word())
            end = self._at
        has_heredoc, text = len(self._heredocs) > heredocs, self._text[start:end].strip()
        return Simple(tuple(assignments), tuple(words), has_heredoc, line, text, joined)

    def _redirection(self) -> bool:
        """Go past a redirection; a here-document's text follows at the end of the line."""
        found = _REDIRECTION.match(self._text, self._at)
        if found is None:
            return False
        self._at = found.end()
        self._skip(newlines=False)
        if found.group(1) in ("<<", "<<-"):
            delimiter = "".join(part.text for part in self._word().parts if isinstance(part, Literal))
            self._heredocs.append((delimiter, found.group(1) == "<<-"))
        elif self._starts_word():
            self._word()
        return True

    def _starts_word(self) -> bool:
        substitutes = self._peek("<(") or self._peek(">(")
        return substitutes or (self._at < len(self._text) and self._text[self._at] not in _METACHARACTERS)

    def _assignment(self, found: "re.Match[str]") -> Assignment:
        line = self._line()
        name, subscript, plus = found.groups()
        self._at = found.end()
        if self._peek("("):
            self._at += 1
            values = []
            while True:
                self._skip(newlines=True)
                if self._at >= len(self._text):
                    raise self._error(f"the array {name} is not closed", line)
                if self._peek(")"):
                    self._at += 1
                    break
                if not self._starts_word():
                    raise self._error(f"{self._text[self._at]!r} stands within the array {name}")
                begin = self._at
                value = self._word()
                if _ELEMENT.match(self._text, begin):
                    value = Word((Opaque(self._text[begin : self._at], "elements have subscripts", False),), line)
                values.append(value)
            return Assignment(name, "", bool(plus), tuple(values), True, line)
        value = self._word() if self._starts_word() else Word((), line)
        return Assignment(name, (subscript or "")[1:-1], bool(plus), (value,), False, line)

    # Words

    def _word(self) -> Word:
        line, start = self._line(), self._at
        parts: list[Part] = []
        while self._at < len(self._text):
            character = self._text[self._at]
            if character in "<>" and self._text[self._at + 1 : self._at + 2] == "(":
                begin = self._at
                self._at += 1
                self._command_in_brackets()
                parts.append(Opaque(self._text[begin : self._at], "a process substitution runs a command", False))
            elif character in _METACHARACTERS or self._peek("\\\n"):
                if self._peek("\\\n"):
                    self._at += 2
                    continue
                break
            elif character == "'":
                parts.append(Literal(self._single_quoted(), True))
            elif character == '"':
                self._at += 1
                parts += self._double_quoted('"', line)
            elif character == "\\":
                parts.append(Literal(self._text[self._at + 1 : self._at + 2], True))
                self._at += 2
            elif character in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                begin = self._at
                while self._at < len(self._text) and self._text[self._at] not in _METACHARACTERS + "'\"\\$`":
                    self._at += 1
                parts.append(Literal(self._text[begin : self._at], False))
        spelling = self._text[start : self._at]
        if any(isinstance(part, Literal) and not part.quoted and "{" in part.text for part in parts) and re.search(
            r"(?<!\$)\{[^{}\s\"']*(?:,|\.\.)[^{}\s]*\}", spelling
        ):
            return Word((Opaque(spelling, "braces make several words of it", False),), line)
        return Word(tuple(parts), line)

    def _single_quoted(self) -> str:
        line = self._line()
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise self._error("a single quote is not closed", line)
        text = self._text[self._at + 1 : end]
        self._at = end + 1
        return text

    def _double_quoted(self, closer: str, line: int) -> list[Part]:
        """The parts up to a closing quote or bracket, which is consumed; the opening one was."""
        parts: list[Part] = []
        text = ""
        while not self._peek(closer):
            if self._at >= len(self._text):
                raise self._error(f"what closes with {closer} is not closed", line)
            if self._peek("\\\n"):
                self._at += 2
            elif self._text[self._at] == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\"):
                text += self._text[self._at + 1]
                self._at += 2
            elif self._text[self._at] in "$`":
                parts += [Literal(text, True), self._expansion(quoted=True)]
                text = ""
            elif self._peek('"'):
                # Quotes within "${name:-"..."}".
                self._at += 1
                parts += [Literal(text, True), *self._double_quoted('"', line)]
                text = ""
            else:
                text += self._text[self._at]
                self._at += 1
        self._at += len(closer)
        parts = [part for part in [*parts, Literal(text, True)] if part != Literal("", True)]
        # Empty quotes are a word, but "$@" without arguments is none.
        return parts or [Literal("", True)]

    def _expansion(self, *, quoted: bool) -> Part:
        """The part that a dollar or a backtick begins."""
        start, line = self._at, self._line()
        if self._peek("`"):
            end = self._at + 1
            while end < len(self._text) and self._text[end] != "`":
                end += 2 if self._text[end] == "\\" else 1
            if end >= len(self._text):
                raise self._error("a backtick is not closed", line)
            self._at = end + 1
            return Opaque(self._text[start : self._at], "a command would have to run", quoted)
        if self._peek("$(("):
            return self._arithmetic(start, line, quoted)
        if self._peek("$("):
            self._at += 1
            self._command_in_brackets()
            return Opaque(self._text[start : self._at], "a command would have to run", quoted)
        if self._peek("${"):
            return self._braced(start, line, quoted)
        self._at += 1
        if not quoted and self._peek("'"):
            text = self._single_quoted()
            return Opaque(self._text[start : self._at], "escapes", True) if "\\" in text else Literal(text, True)
        if not quoted and self._peek('"'):
            return Literal("", True)
        if name := re.compile(rf"{_NAME}|[0-9@*#?$!-]").match(self._text, self._at):
            self._at = name.end()
            return Parameter(name.group(), "", "", None, quoted, self._text[start : self._at])
        return Literal("$", quoted)

    def _arithmetic(self, start: int, line: int, quoted: bool) -> Part:
        self._at += 1
        self._balanced("(", ")")
        spelling = self._text[start : self._at]
        if not spelling.endswith("))"):
            return Opaque(spelling, "a command would have to run", quoted)
        inner = _Parser(spelling[3:-2], line)
        parts: list[Part] = []
        while inner._at < len(inner._text):
            if inner._text[inner._at] in "$`":
                parts.append(inner._expansion(quoted=True))
            else:
                parts.append(Literal(inner._text[inner._at], True))
                inner._at += 1
        return Arithmetic(Word(tuple(parts), line), quoted, spelling)

    def _braced(self, start: int, line: int, quoted: bool) -> Part:
        self._at += 2
        found = _EXPANSION.match(self._text, self._at)
        if found is None:
            self._at = start + 1
            self._balanced("{", "}")
            spelling = self._text[start : self._at]
            return Opaque(spelling, "the operator within the braces is not known here", quoted)
        name, subscript, operator = found.groups()
        self._at = found.end()
        parts = self._operand(quoted, line)
        operand = Word(tuple(parts), line) if operator else None
        return Parameter(name, subscript or "", operator or "", operand, quoted, self._text[start : self._at])

    def _operand(self, quoted: bool, line: int) -> list[Part]:
        """The parts up to the closing brace of a parameter."""
        if quoted:
            return self._double_quoted("}", line)
        parts: list[Part] = []
        while not self._peek("}"):
            if self._at >= len(self._text):
                raise self._error("a brace is not closed", line)
            if self._text[self._at] in _METACHARACTERS:
                parts.append(Literal(self._text[self._at], False))
                self._at += 1
                continue
            begin = self._at
            # A word, but one that ends before the brace.
            if self._text[self._at] == "'":
                parts.append(Literal(self._single_quoted(), True))
            elif self._text[self._at] == '"':
                self._at += 1
                parts += self._double_quoted('"', line)
            elif self._text[self._at] in "$`":
                parts.append(self._expansion(quoted=False))
            elif self._text[self._at] == "\\":
                parts.append(Literal(self._text[self._at + 1 : self._at + 2], True))
                self._at += 2
            else:
                while self._at < len(self._text) and self._text[self._at] not in _METACHARACTERS + "'\"\\$`}":
                    self._at += 1
                parts.append(Literal(self._text[begin : self._at], False))
        self._at += 1
        return parts

    def _command_in_brackets(self) -> None:
        """Go past a command in round brackets, whose comments and here-documents may hold any quotes and brackets."""
        start, heredocs, self._heredocs = self._at, self._heredocs, []
        self._at += 1
        try:
            self._body({")"}, self._line())
        except ShellSyntaxError:
            # It stays as it is spelt, so that its end is all that has to be known.
            self._at = start
            self._balanced("(", ")")
        self._heredocs = heredocs

    def _balanced(self, opener: str, closer: str) -> None:
        """Go past a bracket and all that is within, to the one that closes it."""
        line, depth = self._line(), 0
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "\\":
                self._at += 2
                continue
            if character == "'":
                self._single_quoted()
                continue
            if character == '"':
                begun = self._line()
                self._at += 1
                self._double_quoted('"', begun)
                continue
            depth += (character == opener) - (character == closer)
            self._at += 1
            if depth == 0:
                return
        raise self._error(f"{opener!r} is not closed", line)


def _literal(word: Word) -> str:
    """The text of a word that has nothing to expand; empty where it has."""
    return "".join(part.text if isinstance(part, Literal) else "\0" for part in word.parts)
