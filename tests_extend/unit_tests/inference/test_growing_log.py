"""What a registry remembers to say each thing once does not grow with a sequence."""

import logging

import torch

from mindspeed_cp.kernels import KERNELS, TileCase, TileTerms


def test_cases_that_differ_in_their_numbers_of_tokens_are_announced_once(caplog):
    registry = KERNELS.only(["reference", "cpu_flash"])
    q = torch.zeros(1, 2, 1, 8)
    with caplog.at_level(logging.INFO):
        for length in range(1, 30):
            k = torch.zeros(1, 2, length, 8)
            registry.announce(registry.kernels[0], TileCase.of(q, k, k, TileTerms(1.0)))
    assert len(caplog.records) == len(registry._announced) == 1
