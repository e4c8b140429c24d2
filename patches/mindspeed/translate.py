"""A command line with MindSpeed's flags, and the one that Megatron is given instead.

Words are turned into words, before Megatron parses them. What Megatron then has is what its own spelling gives, with
its types, defaults and derived values, and both command lines can be shown. Done after parsing, a translation would
have to know what Megatron derives from what, in each release. A YAML configuration passes by the parser, untranslated.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from mindspeed_cp.patches.mindspeed.record import CommandLine, Disposition, Record, Ruling, is_number
from mindspeed_cp.patches.mindspeed.table import FLAGS, VALUES


class Given(NamedTuple):
    """A flag as it was given: its name, its values, and its words on the command line."""

    name: str
    values: tuple[str, ...]
    words: tuple[str, ...]


class Finding(NamedTuple):
    """What became of a flag.

    flag: name and values as given. sentence: why; no full stop. flags: what takes its place. differs: see Ruling.
    """

    flag: str
    disposition: Disposition
    sentence: str
    flags: tuple[str, ...] = ()
    differs: bool = False


class Translation(NamedTuple):
    """What became of each of MindSpeed's flags, and what is left for Megatron's parser."""

    findings: tuple[Finding, ...]
    argv: tuple[str, ...]


def split_flags(argv: Sequence[str], known: Collection[str]) -> list[Given]:
    """The command line flag by flag; words before the first flag have an empty name. As argparse sees it."""
    parts: list[list[str]] = [[]]
    for position, word in enumerate(argv):
        if word == "--":
            parts[-1] += argv[position:]
            break
        if _is_flag(word, known):
            parts.append([])
        parts[-1].append(word)
    return [_given(part, known) for part in parts if part]


def _is_flag(word: str, known: Collection[str]) -> bool:
    if word in known or word.partition("=")[0] in known:
        return True
    if not word.startswith("-") or len(word) == 1 or " " in word:
        return False
    return not word[1:].replace(".", "", 1).isdigit()


def _given(words: Sequence[str], known: Collection[str]) -> Given:
    head, *values = words
    if not _is_flag(head, known):
        return Given("", tuple(words), tuple(words))
    name, attached, value = (head, "", "") if head in known else head.partition("=")
    return Given(name, (value, *values) if attached else tuple(values), tuple(words))


def translate(argv: Sequence[str], known: Mapping[str, Collection[str] | None]) -> Translation:
    """What becomes of MindSpeed's flags in this command line.

    known: Megatron's flags, each with its choices where it has some. A flag or value that Megatron has is Megatron's.
    """
    names = {*known, *FLAGS}
    given = split_flags(argv, names)
    line = CommandLine({each.name: each.values for each in given if each.name})
    ruled = [(each, _ruling(each, line, known)) for each in given]
    # What the translation of one flag says of another goes with it.
    spoken_for = {name: each.name for each, ruling in ruled if ruling is not None for name in ruling.drops}
    findings: list[Finding] = []
    words: list[str] = []
    for each, ruling in ruled:
        if each.name in spoken_for and (ruling is None or ruling.disposition is Disposition.NOTED):
            ruling = Ruling(Disposition.TRANSLATED, f"with {spoken_for[each.name]}")
        if ruling is None:
            words += each.words
            continue
        findings.append(
            Finding(" ".join(each.words), ruling.disposition, ruling.sentence, ruling.flags, ruling.differs)
        )
        words += ruling.flags
    return Translation(tuple(findings), tuple(words))


def _ruling(each: Given, line: CommandLine, known: Mapping[str, Collection[str] | None]) -> Ruling | None:
    """What becomes of a flag; None where it is Megatron's, or nobody's."""
    record = _value_record(each, known) if each.name in known else FLAGS.get(each.name)
    if record is None or record.disposition is Disposition.SAME:
        return None
    if misfit := record.misfit(each.values) if each.name not in known else None:
        return Ruling(Disposition.REFUSED, misfit)
    ruling = record.ruling(" ".join(each.values), line)
    if contradicted := _contradicted(each, ruling, line):
        return Ruling(Disposition.REFUSED, f"{contradicted} says otherwise; leave out one of them")
    return ruling


def _value_record(each: Given, known: Mapping[str, Collection[str] | None]) -> Record | None:
    if not each.values or each.values[0] in (known[each.name] or ()):
        return None
    return next((record for record in VALUES if record.name == each.name and _matches(record, each.values)), None)


def _matches(record: Record, values: Sequence[str]) -> bool:
    first, *others = values
    if record.values.endswith("*"):
        return first.startswith(record.values[:-1])
    if others or record.values != "X":
        return not others and record.values == first
    # A number that is not written as a whole one.
    return is_number(first) and not first.lstrip("+-").isdigit()


def _contradicted(each: Given, ruling: Ruling, line: CommandLine) -> str | None:
    """A flag of Megatron's beside a translation that says something else than it."""
    for name, value in _pairs(ruling.flags):
        if name != each.name and name not in ruling.drops and line.has(name) and line.text(name) != value:
            return f"{name} {line.text(name)}"
    return None


def _pairs(words: Iterable[str]) -> list[tuple[str, str]]:
    """Flags with their values joined, of words that begin with a flag."""
    pairs: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            pairs.append((word, ""))
        else:
            name, value = pairs[-1]
            pairs[-1] = (name, f"{value} {word}".strip())
    return pairs


def notes(findings: Iterable[Finding]) -> list[str]:
    """A sentence for all flags that change no result, one for all that were translated, one for each that differs."""
    findings = tuple(findings)
    by_disposition: dict[Disposition, list[Finding]] = {}
    for each in findings:
        if not (each.differs and each.disposition is Disposition.NOTED):
            by_disposition.setdefault(each.disposition, []).append(each)
    sentences = []
    if noted := by_disposition.get(Disposition.NOTED):
        names = ", ".join(dict.fromkeys(each.flag.partition(" ")[0] for each in noted))
        sentences.append(f"flags of MindSpeed's that change no result have no effect: {names}.")
    if translated := by_disposition.get(Disposition.TRANSLATED):
        pairs = "; ".join(f"{each.flag} as {' '.join(each.flags)}" for each in translated if each.flags)
        sentences.append(f"flags of MindSpeed's are taken as Megatron's: {pairs}.")
    return [*sentences, *(f"{each.flag}: {each.sentence}." for each in findings if each.differs)]
