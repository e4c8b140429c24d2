"""Validation on packed conversations: a mean of rows, whose tokens the ranks share."""

import pytest

from mindspeed_cp.testing.toy_flags import TOY_FLAGS
from mindspeed_cp.testing.toy_models import sizes
from system_tests.compare_losses import VALIDATION, largest_difference, losses_in
from system_tests.training_cases import READS_CONVERSATIONS

pytestmark = [
    pytest.mark.skipif(not READS_CONVERSATIONS, reason="no script of this release reads conversations"),
    pytest.mark.slow,
]
FLAGS = """
    --global-batch-size 2 --distributed-backend gloo --distributed-timeout-minutes 4 --split 80,10,10 --eval-iters 2
    --sft --data-path made_up --no-create-attention-mask-in-dataloader --eval-interval 2
"""


def test_validation_losses_of_conversations_are_those_of_cp_1(training):
    flags = (*TOY_FLAGS, *sizes(64), *FLAGS.split())
    alone, shared = (
        losses_in(training.log(size, (*flags, "--context-parallel-size", str(size))), VALIDATION) for size in (1, 4)
    )
    assert len(alone) == 2
    assert largest_difference(alone, shared) <= 1e-6
