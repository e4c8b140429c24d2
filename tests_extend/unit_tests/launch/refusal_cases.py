"""The tables of Megatron's options that say what is refused beside what, and what is said of launches with these."""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from mindspeed_cp.launch.check import examine_launch
from mindspeed_cp.launch.launcher import Launch
from mindspeed_cp.launch.reading import Field
from mindspeed_cp.launch.report import Verdict

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "megatron_options.md").read_text()
MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0 --distributed-backend gloo"
)
"""Flags that are accepted."""


def table(name: str) -> str:
    """The page's table that stands between the comment of this name and that of an end."""
    return PAGE.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0]


def rows(name: str) -> list[tuple[str, str]]:
    """Flags and the reason of each row of a table."""
    return re.findall(r"^\| `(--.*?)` \| (.*) \|$", table(name), re.MULTILINE)


class Said(NamedTuple):
    """What is said of a launch: all of it, and what blocks it; and the flags that this release does not have."""

    everything: list[str]
    blocked: list[str]
    unknown: set[str]


def said_of(parser: argparse.ArgumentParser, flags: str, num_ranks: int = 8) -> Said:
    """Of a launch with these flags beside the model's."""
    fields = tuple(Field((word,)) for word in f"{MODEL} {flags}".split())
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": Field(("1",))}
    found = examine_launch(Launch(0, "pretrain_gpt.py", fields, num_ranks, environment, ""), parser).rows
    known = parser._option_string_actions
    return Said(
        [row.text for row in found],
        [row.text for row in found if row.verdict is Verdict.BLOCKED],
        {word for word in flags.split() if word.startswith("--") and word not in known},
    )
