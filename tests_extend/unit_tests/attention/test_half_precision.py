"""fp16 and bf16 on every algorithm: as exact as on one rank, and the same bits again in deterministic mode."""

from collections.abc import Iterator

import pytest
import torch

from mindspeed_cp.topology import CPTopology
from unit_tests.attention.test_ring import assert_same_bits
from unit_tests.call_cases import ALGORITHMS
from unit_tests.ring_cases import attend_virtually, case_on, dense
from unit_tests.ulysses_cases import restored

TOKENS, HEADS = 64, 4


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_results_are_as_exact_as_on_one_rank_and_the_same_in_every_run(name, dtype):
    def errors(topology: CPTopology) -> list[float]:
        case = case_on(
            topology,
            heads=HEADS // topology.ulysses,
            kv_heads=HEADS // topology.ulysses,
            tokens=TOKENS // topology.size,
            dtype=dtype,
        )
        shards, exact = attend_virtually(case), dense(case)
        for one, other in zip(shards, attend_virtually(case), strict=True):
            assert_same_bits(one, other)
        pairs = zip(restored(case, shards), (exact.out, exact.dq, exact.dk, exact.dv), strict=True)
        return [float((found.double() - right).norm() / right.norm()) for found, right in pairs]

    for found, alone in zip(errors(ALGORITHMS[name]), errors(CPTopology()), strict=True):
        assert found <= 1.5 * alone
