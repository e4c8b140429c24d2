"""Costs: formulas against bytes that virtual ranks count and tensors that autograd keeps, and against closed forms."""

import re

import pytest
import torch
from torch import nn

from mindspeed_cp.comm import Traffic
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.tensor_parallel import KINDS, Grid, Linear, plan_mesh, shard
from mindspeed_cp.tensor_parallel.costs import (
    AttentionShape,
    Memory,
    Volume,
    best,
    block_shapes,
    choices,
    comm_volume,
    memory,
    mlp_shapes,
)
from unit_tests.tensor_parallel.mesh_cases import MESHES, MeshCase, virtual_attention, xy

HIDDEN, FFN, SEQUENCE = 36, 72, 12
AGAIN = [MeshCase("1d-sp", 4), MeshCase("2.5d", 8), MeshCase("3d", 8), xy(4, 2)]
PANELS = [MeshCase("2d", 9), MeshCase("2.5d", 8), MeshCase("1d-sp", 4), MeshCase("3d", 8), xy(3, 2)]


def measure(mesh, batch, gathering):
    """Bytes sent in each pass of an MLP's two linear layers, parameters, and what autograd has kept of tensors."""
    first = Linear.from_linear(nn.Linear(HIDDEN, FFN), mesh, gathering=gathering)
    second = Linear.from_linear(nn.Linear(FFN, HIDDEN), mesh, input=first.layouts.output, gathering=gathering)
    parameters = [*first.parameters(), *second.parameters()]
    x = shard(torch.zeros(batch, SEQUENCE, HIDDEN), mesh.kind.outer, mesh)
    x.local.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = second(first(x))
    forward = sum(mesh.traffic.bytes_sent.values())
    y.local.sum().backward()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return (
        Volume(forward, sum(mesh.traffic.bytes_sent.values()) - forward),
        Memory(sum(each.nbytes for each in parameters), sum(each.nbytes for each in kept.values())),
    )


@pytest.mark.parametrize(
    ("case", "gathering"),
    [
        *((case, "keep") for case in MESHES),
        *((case, "again") for case in AGAIN),
        *((case, "panels") for case in PANELS),
    ],
    ids=str,
)
def test_counted_bytes_and_memory_are_those_of_the_formulas(case, gathering):
    kind, grid = plan_mesh(case.kind, case.ranks, **dict(case.sizes))
    shapes = mlp_shapes(case.batch(2), SEQUENCE, HIDDEN, FFN)
    expected = (
        comm_volume(kind, grid, shapes, gathering=gathering, itemsize=4),
        memory(kind, grid, shapes, gathering=gathering, itemsize=4),
    )
    assert case.run(lambda mesh: measure(mesh, case.batch(2), gathering)) == [expected] * case.ranks


def test_counted_bytes_of_attention_over_y_are_those_of_the_formula():
    case, batch, keys = xy(2, 2, context=2), 2, 2 * HIDDEN
    sequence = 16  # Two chunks for each of four ranks.
    kind, grid = plan_mesh(case.kind, case.ranks, **dict(case.sizes))
    shape = AttentionShape(batch, sequence, keys)
    projections = block_shapes(batch, sequence, HIDDEN, FFN)[:3]
    assert shape == projections[1]

    def measure(mesh):
        config = ContextParallelConfig(
            context_parallel_size=4, context_parallel_algo="megatron_cp_algo", attention_mask_type="general"
        )
        traffic = Traffic()
        attend = virtual_attention(config, mesh.within_attention, traffic)
        heads = HIDDEN // 2
        q, k, v = (torch.zeros(batch, heads, sequence // 4, 1, requires_grad=True) for _ in range(3))
        out = attend(q, k, v)
        forward = sum(traffic.bytes_sent.values())
        out.sum().backward()
        return Volume(forward, sum(traffic.bytes_sent.values()) - forward)

    linears = [each for each in projections if each != shape]
    of_linears, of_all = (comm_volume(kind, grid, each, itemsize=4) for each in (linears, projections))
    expected = Volume(of_all.forward - of_linears.forward, of_all.backward - of_linears.backward)
    assert case.run(measure) == [expected] * case.ranks


X, W1, Y = 8 * 16 * 64, 64 * 256, 8 * 16 * 256
"""Numbers of an MLP's input, of its first weight, and of that layer's output."""

CLOSED_FORMS = [
    ("1d", (4,), lambda p: (2 * (p - 1) / p * X, 2 * (p - 1) / p * X)),
    ("1d-sp", (4,), lambda p: (2 * (p - 1) / p * X, 2 * (p - 1) / p * X)),
    ("2d", (4, 4), lambda q, _: ((q - 1) / q**2 * (X + Y + 2 * W1),) * 2),
    (
        "2.5d",
        (2, 4, 4),
        lambda d, q, _: (
            (q - 1) / q**2 * ((X + Y) / d + 2 * W1),
            (q - 1) / q**2 * ((X + Y) / d + 2 * W1) + 2 * (2 * (d - 1) / d * W1 / q**2),
        ),
    ),
    ("3d", (2, 2, 2), lambda q, *_: (2 * (q - 1) / q**3 * (X + W1 + Y),) * 2),
    ("xy", (2, 4), lambda y, x: ((2 * (x - 1) * X + 2 * (y - 1) * Y) / (x * y),) * 2),
]
"""An MLP's two linear layers without biases: numbers sent forward and backward, by the sizes of the axes."""


@pytest.mark.parametrize(("name", "sizes", "closed_form"), CLOSED_FORMS)
def test_volumes_are_the_closed_forms_of_the_page(name, sizes, closed_form):
    shapes = [shape._replace(bias=False) for shape in mlp_shapes(8, 16, 64, 256)]
    assert comm_volume(KINDS[name], Grid(KINDS[name].axes, sizes), shapes, itemsize=1) == closed_form(*sizes)


def test_panels_send_backward_twice_what_they_send_forward():
    grid = Grid(("i", "j"), (2, 2))
    shapes = [shape._replace(bias=False) for shape in mlp_shapes(4, 8, 16, 64)]
    volume = comm_volume(KINDS["2d"], grid, shapes, gathering="panels")
    assert volume.backward == 2 * volume.forward


def test_x_times_y_sends_eleven_fifteenths_of_1d_at_sixteen_ranks():
    hidden = 64
    shapes = mlp_shapes(1, 128, hidden, 4 * hidden)
    bsh = 128 * hidden
    sent = {
        (choice.kind, choice.grid.sizes): choice.volume.forward / bsh
        for choice in choices(16, shapes, kinds=("1d-sp", "xy"), itemsize=1)
    }
    assert sent["1d-sp", (16,)] == 1.875
    assert sent["xy", (2, 8)] == 1.375 == min(sent.values())
    assert best(16, shapes, kinds=("1d-sp", "xy")).grid.sizes == (2, 8)


def test_best_of_large_batches_replicates_weights_as_far_as_the_memory_goes():
    shapes = block_shapes(64, 512, 1024, 4096)
    assert best(2, shapes, kinds=("1d", "2d", "3d")).kind == "1d"
    assert best(64, shapes).grid == Grid(("depth", "i", "j"), (16, 2, 2))
    assert best(64, shapes, memory_limit=32e6).kind == "3d"


def test_best_respects_the_memory_and_says_what_takes_least_where_nothing_fits():
    shapes = mlp_shapes(16, 64, 64, 256)
    least = min(choices(4, shapes), key=lambda choice: sum(choice.memory))
    assert best(4, shapes, memory_limit=sum(least.memory)).memory == least.memory
    message = (
        f"nothing fits into 1,000 bytes a rank; {least.kind} on {least.grid} takes least, {sum(least.memory):,} bytes"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        best(4, shapes, memory_limit=1000)


def test_shapes_that_no_grid_divides_are_refused():
    with pytest.raises(ValueError, match="no kind of tensor parallelism cuts these layers in 7 equal parts"):
        best(7, mlp_shapes(4, 8, 16, 64))
