"""Conditions of the shell: what `[ ... ]` and `[[ ... ]]` come to, without looking at files or running anything.

Each is True, False, or None where that decides it, or a variable that is not known.
Source: the Bash Reference Manual, 3.2.5.2 and 6.4.
"""

import fnmatch
import glob
import re
from collections.abc import Callable, Sequence

from mindspeed_cp.launch.reading import Field
from mindspeed_cp.launch.shell_nodes import Literal, Word

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)")
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "-eq": int.__eq__,
    "-ne": int.__ne__,
    "-lt": int.__lt__,
    "-le": int.__le__,
    "-gt": int.__gt__,
    "-ge": int.__ge__,
}
_EQUALITIES = {"=": True, "==": True, "!=": False}
_MEANT_AS_OPERATORS = {"!", "(", ")", "-z", "-n", *_EQUALITIES, *_COMPARISONS}


def both(*conditions: bool | None) -> bool | None:
    """Whether all hold."""
    return False if False in conditions else None if None in conditions else True


def either(*conditions: bool | None) -> bool | None:
    """Whether any holds."""
    return opposite(both(*map(opposite, conditions)))


def opposite(condition: bool | None) -> bool | None:
    """Whether it does not hold."""
    return None if condition is None else not condition


def evaluate_test(fields: Sequence[Field]) -> bool | None:
    """What `[ fields ]` and `test fields` come to, by how many fields there are."""
    if any(field.unresolved for field in fields):
        return None
    return _test([field.text for field in fields])


def _test(words: Sequence[str]) -> bool | None:
    match words:
        case []:
            return False
        case [word]:
            return word != ""
        case [left, operator, right] if operator in _EQUALITIES:
            return (left == right) is _EQUALITIES[operator]
        case [left, operator, right] if operator in _COMPARISONS:
            return _compare(left, operator, right)
        case ["!", *rest] if len(rest) < 4:
            return opposite(_test(rest))
        case ["-z" | "-n" as operator, word]:
            return (word == "") is (operator == "-z")
    return _joined(words)


def _split(words: Sequence[str], joint: str) -> list[list[str]]:
    """The words between those that are the joint."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == joint:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _joined(words: Sequence[str]) -> bool | None:
    """What conditions joined by -a and -o come to; None where it may not be conditions that they join."""
    alternatives = [_split(each, "-a") for each in _split(words, "-o")]
    parts = [part for alternative in alternatives for part in alternative]
    # Bash looks for operators in all of it, and takes an error in one condition for the whole.
    if len(parts) == 1 or not all(map(_is_plain, parts)) or None in map(_test, parts):
        return None
    return any(all(map(_test, alternative)) for alternative in alternatives)


def _is_plain(condition: Sequence[str]) -> bool:
    """Whether no operand of a condition could be taken for an operator."""
    words = condition[1:] if condition[:1] == ["!"] else condition
    operands = words[1:] if words[:1] in (["-z"], ["-n"]) else words[::2]
    return len(operands) in (1, 2) and not {*operands} & _MEANT_AS_OPERATORS


def _compare(left: str, operator: str, right: str) -> bool | None:
    numbers = left.strip(), right.strip()
    if not all(map(_NUMBER.fullmatch, numbers)):
        return None
    return _COMPARISONS[operator](int(numbers[0]), int(numbers[1]))


def evaluate_conditional(words: Sequence[Word], expand: Callable[[Word], Field]) -> bool | None:
    """What `[[ words ]]` comes to, operators among them. expand: a word's only field, which is not split."""
    conditional = _Conditional(words, expand)
    value = conditional.any_of()
    return value if conditional.is_at_end else None


class _Conditional:
    """A position in the words of `[[ ... ]]`, evaluated from there on; what is not known here ends it."""

    def __init__(self, words: Sequence[Word], expand: Callable[[Word], Field]) -> None:
        self._words = words
        self._expand = expand
        self._at = 0

    @property
    def is_at_end(self) -> bool:
        return self._at == len(self._words)

    def any_of(self) -> bool | None:
        value = self._all_of()
        while self._take("||"):
            value = either(value, self._all_of())
        return value

    def _all_of(self) -> bool | None:
        value = self._term()
        while self._take("&&"):
            value = both(value, self._term())
        return value

    def _term(self) -> bool | None:
        if self._take("!"):
            return opposite(self._term())
        if self._take("("):
            value = self.any_of()
            return value if self._take(")") else None
        first = self._next()
        operator = self._operator()
        if operator in _EQUALITIES or operator in _COMPARISONS:
            self._at += 1
            return self._binary(first, operator, self._next())
        name = "" if first is None else _operator(first)
        if not name.startswith("-"):
            return opposite(self._is_empty(first))
        is_empty = self._is_empty(self._next())
        # Other operators ask about a file, or whether a variable is set.
        return {"-z": is_empty, "-n": opposite(is_empty)}.get(name)

    def _is_empty(self, word: Word | None) -> bool | None:
        if word is None or (field := self._expand(word)).unresolved:
            return None
        return field.text == ""

    def _binary(self, left: Word | None, operator: str, right: Word | None) -> bool | None:
        if left is None or right is None:
            return None
        found = self._expand(left), self._expand(right)
        if any(field.unresolved for field in found):
            return None
        if operator in _COMPARISONS:
            return _compare(found[0].text, operator, found[1].text)
        pattern = self._pattern(right)
        return None if "[^" in pattern else fnmatch.fnmatchcase(found[0].text, pattern) is _EQUALITIES[operator]

    def _pattern(self, word: Word) -> str:
        """A pattern in which what is quoted stands for itself."""
        texts = ((part.quoted, self._expand(Word((part,), word.line)).text) for part in word.parts)
        return "".join(glob.escape(text) if quoted else text for quoted, text in texts)

    def _next(self) -> Word | None:
        self._at += 1
        return self._words[self._at - 1] if self._at <= len(self._words) else None

    def _operator(self) -> str:
        return "" if self._at >= len(self._words) else _operator(self._words[self._at])

    def _take(self, operator: str) -> bool:
        taken = self._operator() == operator
        self._at += taken
        return taken


def _operator(word: Word) -> str:
    """The text of a word that may be an operator; empty where any of it is quoted or expanded."""
    texts = [part.text for part in word.parts if isinstance(part, Literal) and not part.quoted]
    return "".join(texts) if len(texts) == len(word.parts) else ""
