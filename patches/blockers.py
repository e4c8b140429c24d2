"""What stands in the way of a command line, all of it at once."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from mindspeed_cp.config import ConfigurationError


class Blocker(NamedTuple):
    """One thing that stands in the way.

    flag: the name of the flag that it is about, the first where there are several.
    sentence: flag, value, rule and way out, in a line.
    """

    flag: str
    sentence: str


def blockers_of(error: ConfigurationError) -> list[Blocker]:
    """What an error tells of; each sentence begins with the flag."""
    return [Blocker(sentence.partition(" ")[0].rstrip(":,"), sentence) for sentence in error.sentences]


def found_by(*checks: Callable[[], object]) -> list[Blocker]:
    """What stands in the way by checks that raise ConfigurationError; each is made, whatever the others say."""
    blockers = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            blockers += blockers_of(error)
    return blockers


def raise_for(blockers: Iterable[Blocker]) -> None:
    """Raise ConfigurationError with all of them; nothing where there are none."""
    if sentences := [blocker.sentence for blocker in blockers]:
        raise ConfigurationError(*sentences)
