"""What a recomputation asks for is what was found first, also of attention that has no gradients in either run."""

import pytest
import torch
from torch import Tensor

from mindspeed_cp.attention import Recomputation
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.testing.rank_pool import LIMIT_S
from unit_tests.attention.test_recomputation import CHECKPOINTS, Rank
from unit_tests.call_cases import ALGORITHMS
from unit_tests.ring_cases import case_on


@pytest.mark.parametrize("checkpointed", CHECKPOINTS)
def test_frozen_attention_with_lse_sends_nothing_when_it_is_recomputed(checkpointed):
    case = case_on(ALGORITHMS["hybrid"], tokens=4, head_size=4, value_head_size=4)

    def on_rank(rank: int) -> int:
        recomputation = Recomputation()
        here = Rank(case, world, rank, recomputation)
        frozen = here.inputs[1].detach()

        def run(x: Tensor) -> Tensor:
            out, lse = here.attention.with_lse(frozen, frozen, frozen)
            return torch.sin(x * lse.unsqueeze(-1)) * out

        loss = recomputation.around(CHECKPOINTS[checkpointed])(run, here.inputs[0]).sum()
        sent = here.sent
        loss.backward()
        return here.sent - sent

    world = VirtualWorld(case.size, LIMIT_S)
    assert world.run(on_rank) == [0] * case.size
