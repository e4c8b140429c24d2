"""A call of attention that a checkpoint runs again: it makes no tensor, runs no kernel, and is examined as before."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mindspeed_cp.attention import Recomputation
from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.testing.rank_pool import LIMIT_S
from unit_tests.attention.test_recomputation import Rank
from unit_tests.call_cases import ALGORITHMS
from unit_tests.ring_cases import case_on


class Made(TorchDispatchMode):
    """Bytes of the storages that operations make or write to."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (func._schema.is_mutable or x.untyped_storage().data_ptr() not in given):
                self.bytes += x.nbytes
        return result


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_recomputed_call_makes_no_tensor(algorithm):
    case = case_on(ALGORITHMS[algorithm], tokens=4, head_size=4, value_head_size=4)

    def on_rank(rank: int) -> list[int]:
        recomputation, made = Recomputation(), list[int]()
        here = Rank(case, world, rank, recomputation)

        def run(x: Tensor) -> Tensor:
            with Made() as counted:
                out = here.attention(x, x, x)
            made.append(counted.bytes)
            return torch.sin(out)

        recomputation.around(checkpoint)(run, here.inputs[0], use_reentrant=True).sum().backward()
        return made

    world = VirtualWorld(case.size, LIMIT_S)
    for first, again in world.run(on_rank):
        assert first > 0 == again


def test_a_call_that_is_refused_in_the_recomputation_alone_stops_there():
    case = case_on(ALGORITHMS["hybrid"], tokens=4, head_size=4, value_head_size=4)

    def on_rank(rank: int) -> tuple[int, bool]:
        here, scales = Rank(case, world, rank, recomputation := Recomputation()), iter((0.5, math.nan))

        def run(x: Tensor) -> Tensor:
            return torch.sin(here.attention(x, x, x, scale=next(scales)))

        out = recomputation.around(checkpoint)(run, here.inputs[0], use_reentrant=True)
        sent = here.sent
        with pytest.raises(ValueError, match="scale is nan"):
            out.sum().backward()
        return here.sent - sent, here.inputs[0].grad is None

    world = VirtualWorld(case.size, LIMIT_S)
    assert world.run(on_rank) == [(0, True)] * case.size
