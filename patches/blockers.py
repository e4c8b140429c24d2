"""What stands in the way of a command line, all of it at once."""

import argparse
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from mindspeed_cp.config import ConfigurationError


class Blocker(NamedTuple):
    """One thing that stands in the way.

    flag: the name of the flag that it is about, the first where there are several.
    sentence: flag, value, rule and way out, in a line.
    """

    flag: str
    sentence: str


class UnknownValueError(Exception):
    """A rule has read an argument whose value is not known, so that it says nothing."""


class PartialArguments(argparse.Namespace):
    """Parsed arguments of which some are not known; whoever reads one of those gets UnknownValueError."""

    def __init__(self, args: argparse.Namespace, unknown: Collection[str]) -> None:
        super().__init__(**{name: value for name, value in vars(args).items() if name not in unknown})
        self._unknown = frozenset(unknown)

    def __getattr__(self, name: str) -> Any:
        if name != "_unknown" and name in self._unknown:
            raise UnknownValueError(name)
        raise AttributeError(name)


def none_for_unknown(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with None for those that are not known, for rules that take None for what nobody gave."""
    if not isinstance(args, PartialArguments):
        return args
    return argparse.Namespace(**dict.fromkeys(args._unknown), **vars(args))


def blockers_of(error: ConfigurationError) -> list[Blocker]:
    """What an error tells of; each sentence begins with the flag."""
    return [Blocker(sentence.partition(" ")[0].rstrip(":,"), sentence) for sentence in error.sentences]


def found_by(*checks: Callable[[], object]) -> list[Blocker]:
    """What stands in the way by checks that raise ConfigurationError; each is made, whatever the others say.

    Those that read an unknown value say nothing.
    """
    blockers = []
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            blockers += blockers_of(error)
        except UnknownValueError:
            continue
    return blockers


def raise_for(blockers: Iterable[Blocker]) -> None:
    """Raise ConfigurationError with all of them; nothing where there are none."""
    if sentences := [blocker.sentence for blocker in blockers]:
        raise ConfigurationError(*sentences)
