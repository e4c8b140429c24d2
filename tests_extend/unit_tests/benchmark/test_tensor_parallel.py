"""The benchmark of tensor parallelism: recorded programs hold the bytes of the formula and all products."""

import pytest

from mindspeed_cp.benchmark.tensor_parallel import SETTINGS, Case, Setting, hideable, overlapped, record
from mindspeed_cp.planner import Compute, Network, Post
from mindspeed_cp.tensor_parallel import comm_volume, mlp_shapes, plan_mesh

CASE = Case(batch=8, sequence=8, hidden=16, ffn=64, flops_per_s=1.0)
SAMPLE = [(8, setting) for setting in overlapped(8) if setting.overlap] + [(8, setting) for setting in SETTINGS[8][2:5]]


@pytest.mark.parametrize(("ranks", "setting"), SAMPLE, ids=str)
def test_recorded_programs_hold_the_bytes_of_the_formula_and_every_product(ranks, setting):
    kind, grid = plan_mesh(setting.kind, ranks, **setting.sizes)
    shapes = [shape._replace(bias=False) for shape in mlp_shapes(*CASE[:4])]
    sent = comm_volume(kind, grid, shapes, gathering=setting.gathering, itemsize=4).total
    for program in record(ranks, setting, CASE):
        assert sum(sum(each.sends.values()) for each in program if isinstance(each, Post)) == sent
        # Forward, and for the gradients of both operands, of two layers.
        flops = 3 * 2 * (2 * CASE.batch * CASE.sequence * CASE.hidden * CASE.ffn) / ranks
        assert sum(each.seconds for each in program if isinstance(each, Compute)) == flops


def test_panels_of_x_times_y_hide_most_of_both_what_is_gathered_and_what_is_scattered():
    case = Case(batch=8, sequence=8, hidden=16, ffn=64, flops_per_s=4e5)
    network = Network(num_ranks=4, ranks_per_node=1, fast_mbit=1000, slow_mbit=1)
    most = hideable(network, Setting("xy", {"x": 2}, "panels"), case)
    assert most.saved > 0.8 * most.shorter
