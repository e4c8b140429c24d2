"""Which commands start a training, on how many ranks, with which flags."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mindspeed_cp.launch.shell import Command, Field

_PYTHON = re.compile(r"(?:.*/)?(?:python|pypy)[\d.]*")
_LAUNCHER = re.compile(r"(?:.*/)?torchrun")
_LAUNCHER_MODULES = ("torch.distributed.run", "torch.distributed.launch")
_OF_A_TRAINING = "--micro-batch-size"
"""Megatron trains with no command line that lacks it; its tools for data and checkpoints do not have it."""


class Launch(NamedTuple):
    """A command that starts a training.

    script: the training script. flags: the words after it. ranks: how many processes are started; None where the
    command does not tell. environment: the variables that the training sees. condition: what decides whether it runs.
    """

    line: int
    script: str
    flags: tuple[Field, ...]
    ranks: int | None
    environment: Mapping[str, Field]
    condition: str


def find_launches(commands: Sequence[Command]) -> list[Launch]:
    """Those of a script's commands that start a training."""
    return [launch for command in commands if (launch := _launch(command)) is not None]


def _launch(command: Command) -> Launch | None:
    texts = [field.text for field in command.words]
    number = next((number for number, text in enumerate(texts) if text.endswith(".py")), None)
    if number is None:
        return None
    before, flags = texts[:number], command.words[number + 1 :]
    is_distributed = any(_LAUNCHER.fullmatch(text) or text in _LAUNCHER_MODULES for text in before)
    runs_python = is_distributed or any(
        _PYTHON.fullmatch(text) or field.unresolved for text, field in zip(before, command.words, strict=False)
    )
    if not runs_python and number > 0:
        return None
    if not is_distributed and not any(re.split("=", field.text)[0] == _OF_A_TRAINING for field in flags):
        return None
    ranks = _ranks(before) if is_distributed else None
    return Launch(command.line, texts[number], flags, ranks, command.environment, command.condition)


def _ranks(words: Sequence[str]) -> int | None:
    """The product of torchrun's nodes and processes a node; both are 1 where they are not given."""
    counts = [_value(words, ("--nnodes",)), _value(words, ("--nproc-per-node", "--nproc_per_node"))]
    if not all(count.isdecimal() for count in counts):
        return None
    return int(counts[0]) * int(counts[1])


def _value(words: Sequence[str], names: Sequence[str]) -> str:
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return "1"
