"""Bytes that a compiled attention holds and copies, counted: those of the eager one."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.attention import Latent, LatentHeads
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.memory import MemoryCase, composed, count, join_fake_group, ours
from mindspeed_cp.topology import CPTopology

CASE = MemoryCase()
NUMBERS = 64
"""Bytes of single numbers: the handle of the attention, the token of the run, the beginning of its graph."""
RING, ULYSSES = CPTopology(inner=4), CPTopology(ulysses=4)
DOUBLE, HYBRID = CPTopology(outer=2, inner=2), CPTopology(inner=2, ulysses=2)


@pytest.fixture(autouse=True)
def fake_group() -> Iterator[None]:
    assert not dist.is_initialized()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("topology", "policy"),
    [
        (RING, "full"),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in ((RING, None), (DOUBLE, "half"), (ULYSSES, None), (HYBRID, None))
        ),
    ],
    ids=str,
)
def test_a_compiled_pass_holds_and_copies_what_the_eager_one_does(topology, policy):
    """q, k, v, output and log-sum-exp between the passes, and what a policy keeps."""
    join_fake_group(0, CASE.num_ranks)
    attention = ours(Algorithm(name="", topology=topology, policy=policy).config, 0)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    q, k, v, dout = CASE.inputs()
    # As the output lies: a graph copies a gradient that is given to it in another memory.
    dout = dout.as_strided(dout.shape, attention(q, k, v).stride())
    plain, found = (count(each, [q, k, v, dout]) for each in (attention, compiled))
    assert (found.copied_forward, found.copied_backward) == (plain.copied_forward, plain.copied_backward)
    assert 0 < found.saved - plain.saved < NUMBERS
    assert 0 < found.peak - plain.peak < NUMBERS


@pytest.mark.parametrize("topology", [pytest.param(RING, marks=pytest.mark.slow), ULYSSES], ids=str)
def test_a_compiled_pass_holds_a_latent_and_the_weights_beside_it_once(topology):
    """Neither the payload, which travels as keys of one head, nor a rank's share of the weights is kept twice."""
    join_fake_group(0, CASE.num_ranks)
    heads, tokens = LatentHeads(latent=64, unshared=32), 2048
    attention = composed(Algorithm(name="", topology=topology).config, 0)

    def attend(q: Tensor, payload: Tensor, up: Tensor) -> Tensor:
        return attention.of_latent(q, Latent(payload, heads.expand, (up,)))

    sizes = (1, 8, tokens, 48), (1, tokens, 80), (8, 64, 64)
    given = [torch.zeros(size, dtype=CASE.dtype, requires_grad=True) for size in sizes]
    dout = torch.zeros(1, 8, tokens, 32, dtype=CASE.dtype).as_strided((1, 8, tokens, 32), attend(*given).stride())
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    plain, found = (count(each, [*given, dout]) for each in (attend, compiled))
    assert found.copied_forward == plain.copied_forward
    assert 0 < found.saved - plain.saved < NUMBERS
