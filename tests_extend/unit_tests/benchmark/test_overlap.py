"""Overlap on links of set rates: where the kernel takes longer than the links, transfers are hidden behind it."""

import pytest

from mindspeed_cp.benchmark import ranks
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.benchmark.expected import ExpectedPass
from mindspeed_cp.planner import AttentionShape, Compute, Network, busiest_link_seconds, predicted_seconds
from mindspeed_cp.program import Phase
from mindspeed_cp.testing.emulated_cluster import Cluster, why_not_here
from mindspeed_cp.topology import CPTopology
from unit_tests.benchmark.profile_cases import exposed_in_profile

SHAPE = AttentionShape(num_tokens=8192, num_heads=8, num_kv_heads=8, head_size=32)
NETWORK = Network(num_ranks=4, ranks_per_node=2, fast_mbit=10000.0, slow_mbit=60.0)
FLOPS_PER_S = 5e9


TOPOLOGIES = pytest.mark.parametrize(
    "topology", [CPTopology(inner=4), CPTopology(outer=2, inner=2)], ids=["ring", "double ring"]
)


def passes(algorithm: Algorithm) -> list[ExpectedPass]:
    """The forward and the backward pass."""
    return [ExpectedPass(algorithm, SHAPE, phase, FLOPS_PER_S) for phase in Phase]


def links_seconds(algorithm: Algorithm) -> float:
    """What the busiest link takes for both passes."""
    return sum(busiest_link_seconds(NETWORK, each.events) for each in passes(algorithm))


def exposed_in_play(algorithm: Algorithm) -> float:
    """What both passes take longer than the kernel alone, in the programs as they are played against a clock."""
    kernel = sum(
        sum(event.seconds for event in each.events(0) if isinstance(event, Compute)) for each in passes(algorithm)
    )
    return sum(predicted_seconds(NETWORK, each.events) for each in passes(algorithm)) - kernel


@TOPOLOGIES
def test_programs_expose_below_a_tenth_of_the_transfers_with_overlap_and_not_without(topology):
    hidden = Algorithm(name="with", topology=topology, overlap=True)
    shown = Algorithm(name="without", topology=topology)
    assert exposed_in_play(hidden) < 0.1 * links_seconds(hidden)
    assert exposed_in_play(shown) > 0.5 * links_seconds(shown)


def exposed_and_sent(cluster: Cluster, algorithm: Algorithm) -> tuple[float, float]:
    """Seconds that the slowest rank waits, and that the busiest link takes for both passes."""
    cluster.call(ranks.prepare, NETWORK, algorithm, SHAPE, FLOPS_PER_S)
    exposed = max(cluster.call(exposed_in_profile, algorithm.name, SHAPE))
    return exposed, links_seconds(algorithm)


@pytest.mark.slow
@pytest.mark.skipif(why_not_here() is not None, reason=f"no emulated cluster here: {why_not_here()}")
@TOPOLOGIES
def test_overlap_hides_at_least_half_of_what_ranks_wait_for_without_it(topology):
    # About nine tenths on a quiet machine; on a busy one ranks wait for cores too, at one time more than at another.
    with Cluster(NETWORK, emulated=True, preload=["mindspeed_cp.benchmark.ranks"]) as cluster:
        for _ in range(3):
            hidden, of_links = exposed_and_sent(cluster, Algorithm(name="with", topology=topology, overlap=True))
            shown, _ = exposed_and_sent(cluster, Algorithm(name="without", topology=topology))
            if hidden < 0.5 * shown:
                break
    assert hidden < 0.5 * shown
    assert shown > 0.5 * of_links
