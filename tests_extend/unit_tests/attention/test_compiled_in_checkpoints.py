"""Checkpoints that keep outputs, around compiled calls and within compiled functions."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mindspeed_cp.attention import Recomputation, build_attention, ring
from mindspeed_cp.attention.interface import WITH_LSE, Told
from mindspeed_cp.attention.operators import attend
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.testing.rank_pool import LIMIT_S
from unit_tests.attention.test_recomputation import Rank
from unit_tests.call_cases import ALGORITHMS
from unit_tests.ring_cases import case_on


@pytest.mark.parametrize("name", ["ulysses", "ring"])
def test_results_that_are_written_over_are_recomputed_as_they_were(name):
    case = case_on(ALGORITHMS[name], tokens=4, head_size=4, value_head_size=4)

    def on_rank(rank: int) -> tuple[Tensor, Tensor]:
        recomputation = Recomputation()
        here = Rank(case, world, rank, recomputation)

        def run(x: Tensor) -> Tensor:
            # What a compiled function calls.
            out, lse = attend(here.attention, WITH_LSE, x, (x, x), Told())
            found = out.sin() * lse.unsqueeze(-1)
            if not torch.is_grad_enabled():  # As inductor does where no backward pass needs them.
                out.data.zero_()
                lse.data.zero_()
            return found

        (x, y) = here.inputs[0], here.inputs[0].detach().clone().requires_grad_()
        recomputation.around(checkpoint)(run, x, use_reentrant=True).sum().backward()
        run(y).sum().backward()
        assert x.grad is not None and y.grad is not None
        return x.grad, y.grad

    world = VirtualWorld(case.size, LIMIT_S)
    for found, expected in world.run(on_rank):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [False, True])
def test_a_layer_that_is_recomputed_within_a_compiled_function_attends_once(bound):
    recomputation = Recomputation()
    attention = build_attention(ContextParallelConfig(), recomputation=recomputation)
    named = {"use_reentrant": False}
    around = recomputation.around(partial(checkpoint, **named) if bound else checkpoint)

    def layer(x: Tensor) -> Tensor:
        return attention(x.sin(), x.cos(), x).tanh()

    def model(x: Tensor) -> Tensor:
        out: Tensor = around(layer, x) if bound else around(layer, x, **named)
        return out

    x = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch._dynamo.reset()
    with mock.patch.object(ring, "_forward", wraps=ring._forward) as attended:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert attended.call_count == 1
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
