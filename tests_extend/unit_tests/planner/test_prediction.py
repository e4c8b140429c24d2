"""Predictions: bytes by formula and by events, times on networks that can be done in the head."""

import pytest

from mindspeed_cp.benchmark.cases import Algorithm, algorithms_for
from mindspeed_cp.benchmark.expected import ExpectedPass
from mindspeed_cp.planner import AttentionShape, Compute, Network, Post, Wait, predicted_bytes, predicted_seconds
from mindspeed_cp.program import Phase
from mindspeed_cp.topology import CPTopology

ULYSSES = Algorithm(name="Ulysses", topology=CPTopology(ulysses=4))
HEADS = {"mha": (24, 24), "gqa": (24, 12), "mqa": (24, 1)}


def network(num_ranks: int, ranks_per_node: int = 1, slow: float = 1.0, **options: object) -> Network:
    """Links of 1000 MB/s inside a node, of `slow` MB/s between nodes."""
    return Network(num_ranks=num_ranks, ranks_per_node=ranks_per_node, fast_mbit=8000.0, slow_mbit=8 * slow, **options)


def case(num_tokens: int, num_heads: int = 1, num_kv_heads: int = 1, head_size: int = 1) -> AttentionShape:
    return AttentionShape(num_tokens=num_tokens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size)


def ring(size: int, *, overlap: bool) -> Algorithm:
    return Algorithm(name="ring", topology=CPTopology(inner=size), overlap=overlap)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8, 12])
def test_programs_send_what_the_formula_says(size, heads, phase):
    shape = case(48 * size, *HEADS[heads])
    for algorithm in algorithms_for(shape, size, policies=("full", "half")):
        expected = ExpectedPass(algorithm, shape, phase, flops_per_s=1.0)
        sent = [predicted_bytes(network(size), expected.events(rank), rank) for rank in range(size)]
        assert sum(sum(each) for each in sent) == expected.num_bytes(), algorithm.name


def test_formulas_on_four_ranks_with_one_kilobyte_of_keys_and_of_queries():
    # 256 tokens a rank: 1 KB of keys and values, 0.5 KB of queries.
    shape = case(1024)
    hybrid = Algorithm(name="hybrid", topology=CPTopology(inner=2, ulysses=2))
    gathered = Algorithm(name="all-gather", kind="all-gather", topology=CPTopology(inner=4))
    by_pass = {
        algorithm.name: [ExpectedPass(algorithm, shape, phase, 1.0).num_bytes() / 1024 for phase in Phase]
        for algorithm in (ring(4, overlap=False), ULYSSES, hybrid, gathered)
    }
    assert by_pass == {
        "ring": [12 - 1.5, 12 - 1.5 + 9],  # Three hops of rank 0's block hold half of it.
        "Ulysses": [4 * 3 / 4 * 2, 4 * 3 / 4 * 2],
        "hybrid": [4 + 3, 4 + 3 + 3],
        "all-gather": [12, 12],
    }


def test_what_a_rank_holds_of_others_is_read_off_its_program():
    # 256 tokens a rank: 1 KB of keys and values.
    shape, grid = case(1024), CPTopology(inner=4)
    held = {
        "ring": ring(4, overlap=False),
        "ring that keeps": Algorithm(name="ring", topology=grid, policy="full"),
        "Ulysses": ULYSSES,
        "hybrid": Algorithm(name="hybrid", topology=CPTopology(inner=2, ulysses=2)),
        "all-gather": Algorithm(name="all-gather", kind="all-gather", topology=grid),
    }
    assert {name: ExpectedPass(each, shape, Phase.FORWARD, 1.0).held_bytes() / 1024 for name, each in held.items()} == {
        "ring": 2,
        "ring that keeps": 2 + 3,
        "Ulysses": 0,
        "hybrid": 1,
        "all-gather": 3,
    }


def test_every_grid_that_fits_the_heads_is_measured():
    names = [algorithm.name for algorithm in algorithms_for(case(64, 8, 2), 8) if not algorithm.overlap]
    grids = ["ring", "double ring 2", "double ring 4", "hybrid 2x4"]
    assert names == ["single device", "all-gather K/V", *grids]
    assert "Ulysses" in [algorithm.name for algorithm in algorithms_for(case(64, 8, 8), 8)]


def test_algorithms_flags_give_their_own_grid():
    for algorithm in algorithms_for(case(64, 8, 8), 8):
        if algorithm.kind == "context parallel":
            assert algorithm.config.topology == algorithm.topology
            assert algorithm.config.use_cp_send_recv_overlap == algorithm.overlap


@pytest.mark.parametrize("slow", [0.5, 2.0], ids=["transfer is longer", "kernel is longer"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [2, 4, 5])
def test_ring_takes_the_larger_of_kernel_and_transfer_with_overlap_and_their_sum_without(size, overlap, slow):
    # A block is 10^6 bytes, and its kernel takes a second: half of its scores are seen.
    shape = case(250_000 * size)
    tokens = 250_000
    kernel, transfer = 1.0, 1.0 / slow
    expected = ExpectedPass(ring(size, overlap=overlap), shape, Phase.FORWARD, flops_per_s=2 * 2 * tokens**2 / 2)
    step = max(kernel, transfer) if overlap else kernel + transfer
    seconds = predicted_seconds(network(size, slow=slow), expected.events)
    assert seconds == pytest.approx(kernel + (size - 1) * step, rel=1e-4)


def test_backward_without_overlap_adds_the_gradients_of_half_or_whole_blocks():
    # Two ranks: rank 1 sends half of its partial gradient to rank 0, which sends all of its own.
    expected = ExpectedPass(ring(2, overlap=False), case(500_000), Phase.BACKWARD, flops_per_s=5 * 2 * 250_000**2 / 2)
    assert predicted_seconds(network(2), expected.events) == pytest.approx(2 * 1.0 + 1.0 + 1.0, rel=1e-4)


def test_double_ring_crosses_between_nodes_once_an_inner_ring_and_hides_it_behind_the_whole_of_it():
    # 4 MB of keys and values a rank take 4 s between nodes; a node's two steps take 2 s each.
    shape, double = case(4_000_000), Algorithm(name="", topology=CPTopology(outer=2, inner=2), overlap=True)
    expected = ExpectedPass(double, shape, Phase.FORWARD, flops_per_s=2 * 2 * 1e12 / 2 / 2)
    sent = [predicted_bytes(network(4, 2), expected.events(rank), rank) for rank in range(4)]
    # What others need of rank 0 and of rank 1, and of rank 2 within its node, is a half.
    assert sent == [(6_000_000, 2_000_000), (8_000_000, 2_000_000), (4_000_000, 4_000_000), (6_000_000, 4_000_000)]
    assert predicted_seconds(network(4, 2), expected.events) == pytest.approx(4 + 4)


def test_all_to_all_shares_the_slow_link_among_the_peers_beyond_it():
    # Queries 2 MB, keys and values 4 MB a rank: of the four quarters of 6 MB two go to the other node, then of 2 MB.
    expected = ExpectedPass(
        Algorithm(name="", topology=CPTopology(ulysses=4)), case(4_000_000, 4, 4), Phase.FORWARD, flops_per_s=1e30
    )
    queries = 4 * 2e6
    assert predicted_seconds(network(4, 2), expected.events) == pytest.approx((3 * queries + queries) / 4 * 2 / 1e6)


def test_slow_link_of_a_node_is_shared_by_its_ranks():
    expected = ExpectedPass(
        Algorithm(name="", topology=CPTopology(ulysses=4)), case(4_000_000, 4, 4), Phase.FORWARD, flops_per_s=1e30
    )
    own = predicted_seconds(network(4, 2), expected.events)
    assert predicted_seconds(network(4, 2, slow_link="node"), expected.events) == pytest.approx(2 * own)


def test_message_flows_from_when_its_receiver_is_ready():
    def program(rank):
        if rank == 0:
            yield Post("it", {1: 1_000_000}, ())
        else:
            yield Compute(3.0)
            yield Post("it", {}, (0,))
        yield Wait("it")

    assert predicted_seconds(network(2), program) == pytest.approx(3.0 + 1.0)


def test_ranks_that_wait_for_ever_are_an_error():
    def program(rank):
        yield Post("it", {}, (1 - rank,))
        yield Wait("it")

    with pytest.raises(ValueError, match="wait for each other for ever"):
        predicted_seconds(network(2), program)
