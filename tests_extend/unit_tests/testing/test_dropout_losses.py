"""Training with attention dropout on several ranks."""

import pytest
import torch

from mindspeed_cp.testing.dropout_losses import CONFIGS, train

STEPS = 8


@pytest.mark.slow
def test_losses_with_dropout_are_those_of_one_rank_to_rounding():
    losses = {
        name: torch.tensor(train(config, STEPS, rate=0.1), dtype=torch.float64) for name, config in CONFIGS.items()
    }
    one = losses.pop("CP 1")
    without = torch.tensor(train(CONFIGS["CP 1"], STEPS, rate=0.0), dtype=torch.float64)
    assert (without - one).abs().max() > 1e-3
    for several in losses.values():
        torch.testing.assert_close(several, one, rtol=0, atol=1e-9)
