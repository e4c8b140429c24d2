"""Which token is drawn: by its probability, among those that are asked for, and by seed, sample and position alone."""

from collections import Counter

import pytest
import torch

from mindspeed_cp.inference import Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 1.0])
"""Best first: 1, 3, 4, 0, 2, of probabilities 0.43, 0.26, 0.16, 0.10, 0.02 (and 0.03 of rounding)."""
BY_RANK = (1, 3, 4, 0, 2)


def drawn(count=1500, **settings):
    """How often each token is drawn at so many positions."""
    sampling = Sampling(**{"temperature": 1.0} | settings)
    return Counter(sampling.choose(LOGITS, 0, position).token for position in range(count))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, 5),
        ({"temperature": 0.5}, 5),
        ({"temperature": 3.0}, 5),
        ({"top_k": 2}, 2),
        ({"top_k": 1}, 1),
        ({"top_k": 9}, 5),
        ({"top_p": 0.4}, 1),  # The best alone has more.
        ({"top_p": 0.6}, 2),  # It takes two to have as much.
        ({"top_p": 0.999}, 5),
        ({"top_k": 3, "top_p": 0.75}, 2),  # Of the probability of the three best.
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probability_says(settings, kept):
    found, count = drawn(**settings), 1500
    among = torch.tensor(BY_RANK[:kept])
    expected = (LOGITS[among].double() / settings.get("temperature", 1.0)).softmax(0)
    assert set(found) <= set(among.tolist())
    for token, share in zip(among.tolist(), expected.tolist(), strict=True):
        assert abs(found[token] / count - share) < 4 * (share * (1 - share) / count) ** 0.5 + 1e-9


def test_what_is_drawn_depends_on_seed_sample_and_position_alone():
    def tokens(seed, sample, first):
        sampling = Sampling(temperature=1.0, seed=seed)
        return [sampling.choose(LOGITS, sample, first + each).token for each in range(40)]

    assert tokens(1, 0, 0) == tokens(1, 0, 0)
    assert len({tuple(tokens(*case)) for case in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 40), (-1, 0, 0))}) == 5


def test_the_margin_is_that_of_the_best_two_whatever_is_drawn():
    choices = [Sampling(temperature=5.0, seed=seed).choose(LOGITS, 0, 0) for seed in range(20)]
    assert len({choice.token for choice in choices}) > 2
    assert {choice[1:] for choice in choices} == {(2.0, 0.5)}
