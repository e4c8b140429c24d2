"""The kernel that computed a tile forward computes it backward too, whatever would be chosen by then."""

from dataclasses import dataclass, field

import pytest
from torch import Tensor

from mindspeed_cp.comm import VirtualWorld
from mindspeed_cp.kernels import KERNELS, KernelRegistry, TileCase, TileGradients, TileOutput, TileTerms
from mindspeed_cp.topology import CPTopology
from unit_tests.ring_cases import case_on, grid_name, virtual_attention
from unit_tests.ulysses_cases import inputs, shard_of


@dataclass
class Fickle:
    """A kernel that is able until it is told otherwise, and whose state is its own name."""

    name: str
    able: bool = True
    backward_calls: list[int] = field(default_factory=list)

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        return [] if self.able else ["has changed its mind"]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        output = KERNELS.choose(TileCase.of(q, k, v, terms)).forward(q, k, v, terms)
        return output._replace(state=(q.new_full((), float(len(self.name))),))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        assert output.state[0] == len(self.name), "the state of another kernel"
        self.backward_calls.append(q.size(2))
        kernel = KERNELS.choose(TileCase.of(q, k, v, terms))
        return kernel.backward(dout, q, k, v, output._replace(state=()), terms)


@pytest.mark.parametrize("topology", [CPTopology(), CPTopology(inner=2), CPTopology(inner=2, ulysses=2)], ids=grid_name)
def test_kernel_of_the_forward_pass_is_kept_for_the_backward_pass(topology):
    case, world = case_on(topology, tokens=8), VirtualWorld(topology.size)
    first, second = Fickle("first"), Fickle("the second one")
    registry = KernelRegistry((first, second))
    q, k, v, dout = inputs(case)[:4]
    outs: dict[int, Tensor] = {}

    def forward(rank: int) -> None:
        shards = [shard_of(case, x, rank).requires_grad_() for x in (q, k, v)]
        outs[rank] = virtual_attention(case, world, rank, kernels=registry)(*shards)

    world.run(forward)
    first.able = False
    world.run(lambda rank: outs[rank].backward(shard_of(case, dout, rank)))
    # What has changed its mind is not asked for parts: the own block is done as a whole.
    assert len(first.backward_calls) == topology.size * topology.ring_size
    assert not second.backward_calls
