"""One configuration over other numbers of ranks: degrees and inner rings become what divides these."""

import pytest

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.topology import CPTopology

ULYSSES, RING, HYBRID, GATHER = "ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"
GRIDS = {
    (ULYSSES, None, 1): {1: (1, 1, 1), 2: (1, 1, 2), 8: (1, 1, 8)},
    (RING, None, 1): {1: (1, 1, 1), 2: (1, 2, 1), 6: (1, 6, 1)},
    (GATHER, None, 1): {2: (1, 2, 1), 8: (1, 8, 1)},
    (RING, None, 4): {2: (1, 2, 1), 4: (1, 4, 1), 6: (3, 2, 1), 8: (2, 4, 1)},
    (HYBRID, 2, 2): {1: (1, 1, 1), 2: (1, 1, 2), 3: (1, 3, 1), 4: (1, 2, 2), 8: (2, 2, 2)},
    (HYBRID, 4, 1): {2: (1, 1, 2), 4: (1, 1, 4), 6: (1, 3, 2), 8: (1, 2, 4)},
}
"""By algorithm, Ulysses degree and inner ring at 8 ranks: outer ring, inner ring and Ulysses group of so many."""


@pytest.mark.parametrize("named", GRIDS)
def test_grid_of_other_numbers_of_ranks_is_the_largest_that_fits(named):
    algorithm, degree, inner = named
    config = ContextParallelConfig(
        context_parallel_size=8,
        context_parallel_algo=algorithm,
        ulysses_degree_in_cp=degree,
        cp_window_size=inner,
        use_cp_send_recv_overlap=True,
    )
    for size, (outer, ring, ulysses) in GRIDS[named].items():
        fewer = config.over(size)
        assert fewer.topology == CPTopology(outer=outer, inner=ring, ulysses=ulysses), size
        assert fewer.use_cp_send_recv_overlap
    assert config.over(8) == config
