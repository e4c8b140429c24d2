"""Dropout by position: the generator's published answers, and the statistics of the masks."""

import itertools
from dataclasses import replace

import pytest
import torch

from mindspeed_cp.kernels import Dropout
from mindspeed_cp.kernels.philox import philox, survives

# From Random123's table of known answers, philox4x32 of 10 rounds: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
DROPOUT = Dropout(rate=0.1, seed=1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert [int(word) for word in philox(tuple(map(torch.tensor, counter)), tuple(key))] == expected


def mask(dropout: Dropout, samples: int = 2, heads: int = 3, length: int = 96) -> torch.Tensor:
    places = torch.arange(length).expand(samples, -1)
    of_sample = torch.arange(samples)[:, None].expand(-1, length)
    numbers = torch.arange(heads) + dropout.first_head
    return survives(dropout.rate, dropout.key, of_sample, numbers, places, places)


def test_masks_of_a_job_drop_at_the_rate_and_know_nothing_of_each_other():
    others = [{"seed": 2}, {"layer": 1}, {"micro_batch": 1}, {"data_parallel_rank": 1}]
    jobs = [mask(DROPOUT), *(mask(replace(DROPOUT, **other)) for other in others)]
    masks = [head for job in jobs for sample in job for head in sample]
    pairs, rate = masks[0].numel(), 0.1
    for each in masks:  # Within 5 standard deviations.
        assert abs(each.double().mean() - (1 - rate)) < 5 * (rate * (1 - rate) / pairs) ** 0.5
    both = (1 - rate) ** 2
    for one, other in itertools.combinations(masks, 2):
        assert abs((one & other).double().mean() - both) < 5 * (both * (1 - both) / pairs) ** 0.5


def test_heads_of_another_tensor_parallel_rank_go_on_where_those_of_this_one_end():
    assert torch.equal(mask(DROPOUT, heads=4)[:, 2:], mask(replace(DROPOUT, first_head=2), heads=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rate": 1.0}, r"rate=1.0 is not in \[0, 1\)"), ({"layer": -1}, "layer=-1 is no integer from 0 on")],
    ids=["rate", "layer"],
)
def test_dropout_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Dropout(**{"rate": 0.1, "seed": 1} | wrong)
