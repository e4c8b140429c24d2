"""Attention in torch.compile(fullgraph=True): what the eager call gives, in one graph for every plan."""

import copy
import gc
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mindspeed_cp.attention import AttentionTerms, Dropout, Recomputation, build_attention
from mindspeed_cp.attention.operators import num_kept
from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.handles import with_handle
from mindspeed_cp.plan import AttentionPlan
from unit_tests.attention.test_recomputation import Rank
from unit_tests.call_cases import ALGORITHMS, VirtualWorld
from unit_tests.compiled_cases import DOCUMENTS, Graphs, Layer, Results, Step, on_virtual_ranks, over_gloo
from unit_tests.pairwise import pairwise
from unit_tests.ring_cases import case_on
from unit_tests.ulysses_cases import Case


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_the_same(results: list[Results], rtol: float = 1e-12, atol: float = 1e-12) -> None:
    for plain, compiled in results:
        for actual, expected in zip(compiled, plain, strict=True):
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_stride=False)


def case_of(name: str, **options: object) -> Case:
    degree = ALGORITHMS[name].ulysses
    return case_on(ALGORITHMS[name], heads=4 // degree, **options)


def test_one_graph_serves_every_plan_and_every_algorithm_of_a_kind():
    layer, graphs = Layer(), Graphs()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    counts = []
    for name in ("ulysses", "hybrid", "ring", "double ring"):
        for documents in DOCUMENTS:
            assert_the_same(on_virtual_ranks(case_of(name), layer, compiled, Step(documents)))
            counts.append(len(graphs.operators))
    first, ring = counts[0], counts[4]
    # Ranks that come at the same time may each compile it.
    assert counts == [first] * 4 + [ring] * 4 and first <= 4 and ring <= 8
    assert all(operators == ["mindspeed_cp.attention"] for operators in graphs.operators)
    assert num_kept() == 0
