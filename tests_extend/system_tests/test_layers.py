"""Layers of megatron.core without megatron.training: with context parallelism they compute what they do with CP = 1."""

from importlib.util import find_spec

import pytest
import torch

needs_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
pytestmark = [needs_megatron, pytest.mark.every_release]

RING = {"context_parallel_algo": "megatron_cp_algo"}

# Each row: algorithm, tensor-parallel and context-parallel size, and further flags. By default the first and the last.
GRIDS = [
    ("ring", 2, 2, RING),
    ("ulysses", 2, 2, {}),
    ("ulysses", 1, 4, {}),
    ("ring", 1, 4, RING | {"use_cp_send_recv_overlap": True}),
    ("double ring", 1, 4, RING | {"cp_window_size": 2}),
    ("hybrid", 1, 4, {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-12, id="fp64"),
        pytest.param(torch.float32, 1e-5, id="fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("algorithm", "tp", "cp", "flags"),
    [
        pytest.param(
            *row, marks=[] if row in (GRIDS[0], GRIDS[-1]) else [pytest.mark.slow], id="{} tp{} cp{}".format(*row)
        )
        for row in GRIDS
    ],
)
def test_transformer_layer_computes_what_it_does_with_cp_1(
    training, record_property, algorithm, tp, cp, flags, dtype, tolerance
):
    differences = training.compare_layers(tp * cp, tp, dtype, {"context_parallel_size": cp, **flags})
    largest = max(max(each) for each in differences)
    record_property("check", f"layer, TP {tp} x CP {cp}, {str(dtype).removeprefix('torch.')}")
    record_property("algorithm", algorithm)
    record_property("result", f"{largest:.1e}")
    assert largest <= tolerance, differences


def test_a_wrong_chunk_order_changes_the_layer(training):
    flags = {"context_parallel_size": 2}
    for differences in training.compare_layers(4, 2, torch.float64, flags, sabotage="chunk order"):
        assert min(differences) > 1e-3
