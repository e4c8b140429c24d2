"""What stands in the way of a command line, all of it at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mindspeed_cp.config import ConfigurationError


class Blocker(NamedTuple):
    """One thing that stands in the way.

    flag: the name of the flag that it is about, the first where there are several.
    sentence: flag, value, rule and way out, in a line.
    """

    flag: str
    sentence: str

    @classmethod
    def from_error(cls, error: ConfigurationError) -> "Blocker":
        """The blocker that an error tells of; its message begins with the flag."""
        return cls(str(error).partition(" ")[0].rstrip(":,"), str(error))


def found_by(*checks: Callable[[], object]) -> list[Blocker]:
    """What stands in the way by checks that raise ConfigurationError; each is made, whatever the others say."""
    blockers = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            blockers.append(Blocker.from_error(error))
    return blockers


def describe(blockers: Sequence[Blocker]) -> str:
    """The end of an error message: one blocker's sentence, or how many there are and a line for each."""
    sentences = list(dict.fromkeys(blocker.sentence for blocker in blockers))
    if len(sentences) == 1:
        return sentences[0]
    return "\n  ".join([f"{len(sentences)} things stand in the way:", *sentences])


def raise_for(blockers: Iterable[Blocker]) -> None:
    """Raise ConfigurationError with all of them; nothing where there are none."""
    if found := list(blockers):
        raise ConfigurationError(describe(found))
