"""Which commands start a training, on how many ranks, with which flags."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mindspeed_cp.launch.reading import Command, Field, Omission

_PYTHON = re.compile(r"(?:.*/)?(?:python|pypy)[\d.]*")
_LAUNCHER = re.compile(r"(?:.*/)?torchrun")
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_OF_A_TRAINING = "--micro-batch-size"
"""Megatron trains with no command line that lacks it; its tools for data and checkpoints do not have it."""


_MODULE = frozenset({"-m", "--module"})
_WITHOUT_VALUE = _MODULE | frozenset(
    {
        "--standalone",
        "--no-python",
        "--no_python",
        "--run-path",
        "--run_path",
        "--use-env",
        "--use_env",
    }
)
"""Options of torchrun that take no value."""
_NOTHING_IS_RUN = frozenset({"echo", ":", "which", "type", "[", "test"})
_SUBMIT = re.compile(r"(?:.*/)?(?:sbatch|qsub|bsub)")


class Launch(NamedTuple):
    """A command that starts a training.

    script: the training script. flags: the words after it. ranks: how many processes are started; None where the
    command does not tell. environment: the variables that the training sees. condition: what decides whether it runs.
    lost: lines that were meant to be flags, and are not.
    """

    line: int
    script: str
    flags: tuple[Field, ...]
    ranks: int | None
    environment: Mapping[str, Field]
    condition: str
    lost: tuple[Omission, ...] = ()


def find_launches(commands: Sequence[Command]) -> list[Launch]:
    """Those of a script's commands that start a training."""
    return [launch for command in commands if (launch := _launch(command)) is not None]


def find_unread(commands: Sequence[Command]) -> list[Omission]:
    """Those of a script's commands that start something, of which it is not known whether it is a training."""
    found = []
    for command in commands:
        if _launch(command) is not None or command.words[0].text in _NOTHING_IS_RUN:
            continue
        text = " ".join(field.text for field in command.words[:4]) + " ..." * (len(command.words) > 4)
        if _SUBMIT.fullmatch(command.words[0].text):
            found.append(Omission(command.line, text, "it hands over another script; check that one too"))
        elif _launcher(command) is not None or _has_flags_of_a_training(command.words):
            found.append(Omission(command.line, text, "which training script it starts is not known"))
        elif command.words[0].is_unknown and not any(field.text.endswith(".py") for field in command.words):
            found.append(Omission(command.line, text, "which command it is is not known"))
    return found


def _launch(command: Command) -> Launch | None:
    words = command.words
    if words[0].text in _NOTHING_IS_RUN:
        return None
    launcher = _launcher(command)
    number = _script_of_any(words) if launcher is None else _script_of_torchrun(words, launcher + 1)
    if number is None:
        return None
    flags = words[number + 1 :]
    if launcher is None and not _has_flags_of_a_training(flags):
        return None
    ranks = None if launcher is None else _ranks(words[launcher + 1 : number], command.environment)
    return Launch(command.line, words[number].text, flags, ranks, command.environment, command.condition, command.lost)


def _launcher(command: Command) -> int | None:
    """Which word starts the ranks; None where none does."""
    texts = [field.text for field in command.words]
    return next((n for n, text in enumerate(texts) if _LAUNCHER.fullmatch(text) or text in _LAUNCHER_MODULES), None)


def _has_flags_of_a_training(words: Sequence[Field]) -> bool:
    return any(field.text.partition("=")[0] == _OF_A_TRAINING for field in words)


def _script_of_torchrun(words: Sequence[Field], first: int) -> int | None:
    """Which word is the script, behind torchrun's options and `-m mindspeed_cp`.

    Other words are gone past: an address that is still a placeholder has blanks, often.
    """
    number = first
    while number < len(words):
        text = words[number].text
        if text.endswith(".py") and not text.startswith("-"):
            return number
        if text in _MODULE and [field.text for field in words[number + 1 : number + 2]] != ["mindspeed_cp"]:
            return None
        takes_next = text.startswith("-") and "=" not in text and text not in _WITHOUT_VALUE
        number += 2 if takes_next else 1
    return None


def _script_of_any(words: Sequence[Field]) -> int | None:
    """Which word is the script of a command that runs Python, or is a script itself."""
    number = next((number for number, field in enumerate(words) if field.text.endswith(".py")), None)
    if not number or any(_PYTHON.fullmatch(field.text) or field.unresolved for field in words[:number]):
        return number
    return None


def _ranks(options: Sequence[Field], environment: Mapping[str, Field]) -> int | None:
    """The product of torchrun's nodes and processes a node; both are 1 where they are not given."""
    counts = [_value(options, environment, name) for name in ("nnodes", "nproc-per-node")]
    # What is not known may give either, unless it is an option's value.
    loose = any(
        field.is_unknown and (not before.startswith("-") or "=" in before or before in _WITHOUT_VALUE)
        for before, field in zip(["", *(option.text for option in options)], options, strict=False)
    )
    if loose or not all(count.isdecimal() for count in counts):
        return None
    return int(counts[0]) * int(counts[1])


def _value(options: Sequence[Field], environment: Mapping[str, Field], name: str) -> str:
    """The value of an option, the last where there are several, else that of the variable for it, else 1."""
    variable = f"PET_{name.replace('-', '_').upper()}"
    value = environment[variable].text if variable in environment else "1"
    texts = [field.text for field in options]
    for text, following in itertools.pairwise([*texts, ""]):
        spelled, equals, attached = text.partition("=")
        if spelled.startswith("--") and spelled[2:].replace("_", "-") == name:
            value = attached if equals else following
    return value
