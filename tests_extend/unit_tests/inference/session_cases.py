"""Prompts, and what gloo ranks run for test_session.py."""

import os
import signal

import torch

from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.inference import Session
from unit_tests.inference.toy_model import VOCABULARY, ToyModel

SMALL = {"interleave": 3, "page": 4}
"""Of a cache: many stripes and pages for few tokens."""


def prompts(*lengths, seed=0):
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def write(group, given, num_tokens):
    """The tokens of each sequence."""
    session = Session(ToyModel(), len(given), ProcessGroupCommunicator(group), chunk=16, **SMALL)
    steps = list(session.generate(given, num_tokens))
    return [[step.choices[sample].token for step in steps] for sample in range(len(given))]


def write_until_killed(group, given, victim):
    """The error of a rank whose peer is killed while it decodes; the victim gives none."""
    communicator = ProcessGroupCommunicator(group)
    session = Session(ToyModel(), len(given), communicator, **SMALL)
    for number, _ in enumerate(session.generate(given, 10)):
        if number == 3 and communicator.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
