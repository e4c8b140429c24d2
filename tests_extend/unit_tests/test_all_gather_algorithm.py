"""kvallgather_cp_algo: the ranks of a ring, whose K/V are gathered at once."""

from mindspeed_cp.attention import compose_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.algorithm import start_line
from mindspeed_cp.program import Transport
from mindspeed_cp.topology import CPTopology

CONFIG = ContextParallelConfig(context_parallel_size=4, context_parallel_algo="kvallgather_cp_algo", cp_window_size=3)


def test_it_has_one_ring_whatever_the_window_and_says_so():
    assert CONFIG.topology == CPTopology(inner=4)
    (sentence,) = CONFIG.ineffective_flags()
    assert sentence.startswith("--cp-window-size has no effect with --context-parallel-algo kvallgather_cp_algo")
    assert "all-gather of K/V 4, overlap off" in start_line(CONFIG, None, "any")


def test_its_k_and_v_are_gathered_unless_another_transport_is_named():
    for named, used in ((None, Transport.ALL_GATHER), (Transport.DIRECT, Transport.DIRECT)):
        planned = compose_attention(CONFIG, rank=0, ulysses=None, ring=None, transport=named)
        assert planned.attention.transport is used
