"""Linear layers of every kind against nn.Linear in fp64: outputs and all gradients, and the layouts they refuse."""

import re

import pytest
import torch
from torch import nn

from mindspeed_cp.tensor_parallel import KINDS, Layout, Linear, Sharded, shard, unshard
from unit_tests.tensor_parallel.mesh_cases import MESHES, MeshCase, gradients, numbers, xy

IN, MIDDLE, OUT, SEQUENCE = 36, 72, 36, 12
"""Every mesh divides these."""

SQUARE = [case for case in MESHES if case.kind in ("2d", "2.5d") and case.ranks > 1]
BY_ROWS = [MeshCase("1d-sp", 4), MeshCase("3d", 8), xy(3, 2), xy(4, 1), xy(1, 4)]


def layers(widths=(IN, MIDDLE, OUT), dtype=torch.float64):
    """Two whole layers, which every rank makes alike."""
    generator = torch.Generator().manual_seed(0)
    pair = nn.Sequential(nn.Linear(*widths[:2]), nn.Linear(*widths[1:])).to(dtype)
    for parameter in pair.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return pair


def run_whole(shape, widths):
    """Output and gradients of the pair on one rank; the gradient of the output is random too."""
    pair, x = layers(widths), numbers(*shape, seed=1).requires_grad_()
    y = pair(x)
    y.backward(numbers(*y.shape, seed=1).cos())
    return {"y": y.detach(), "dx": x.grad} | {name: each.grad for name, each in pair.named_parameters()}


def run_sharded(mesh, shape, widths=(IN, MIDDLE, OUT), dtype=torch.float64, **options):
    """The same on a mesh: whole tensors, gathered."""
    first, second = layers(widths, dtype)
    first = Linear.from_linear(first, mesh, **options)
    second = Linear.from_linear(second, mesh, input=first.layouts.output, **options)
    pair = nn.ModuleList([first, second])
    x = shard(numbers(*shape, seed=1).to(dtype), mesh.kind.outer, mesh, uneven=True)
    x.local.requires_grad_()
    y = second(first(x))
    dy = numbers(*shape[:-1], widths[-1], seed=1).cos().to(dtype)
    y.local.backward(shard(dy, y.layout, mesh, uneven=True).local)
    return {"y": unshard(y, mesh), "dx": unshard(Sharded(x.local.grad, x.layout), mesh)} | gradients(pair)


def assert_as_whole(case, shape, widths=(IN, MIDDLE, OUT), **options):
    expected = run_whole(shape, widths)
    for result in case.run(lambda mesh: run_sharded(mesh, shape, widths, **options)):
        assert result.keys() == expected.keys()
        for name, value in result.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "micro_batch"),
    [
        pytest.param(case, size, marks=pytest.mark.slow if case.ranks * size == 54 else ())
        for case in MESHES
        for size in (1, 2)
    ],
    ids=str,
)
def test_two_linears_give_the_outputs_and_gradients_of_one_rank(case, micro_batch):
    assert_as_whole(case, (case.batch(micro_batch), SEQUENCE, IN))


@pytest.mark.parametrize("case", [MeshCase("1d-sp", 4), MeshCase("2d", 4), MeshCase("3d", 8), xy(2, 2)], ids=str)
def test_what_is_gathered_again_for_the_backward_pass_gives_the_same(case):
    assert_as_whole(case, (case.batch(2), SEQUENCE, IN), gathering="again")


@pytest.mark.parametrize("case", SQUARE + BY_ROWS, ids=str)
def test_panels_give_the_outputs_and_gradients_of_one_rank(case):
    assert_as_whole(case, (case.batch(2), SEQUENCE, IN), gathering="panels")


@pytest.mark.parametrize(("case", "shape"), [(xy(3, 2), (1, SEQUENCE, IN)), (MeshCase("3d", 8), (8, IN))], ids=str)
def test_panels_of_activations_that_are_one_slice_give_them_too(case, shape):
    assert_as_whole(case, shape, gathering="panels")


@pytest.mark.parametrize("case", SQUARE, ids=str)
def test_panels_of_uneven_widths_and_batches_give_them_too(case):
    assert_as_whole(case, (1, 5, IN), widths=(IN, 10, 7), gathering="panels")


@pytest.mark.parametrize("case", [MeshCase("2.5d", 8), MeshCase("1d-sp", 4), xy(2, 2), MeshCase("3d", 8)], ids=str)
def test_panels_give_the_same_bits_with_overlap_and_without(case):
    shape, dtype = (case.batch(2), SEQUENCE, IN), torch.bfloat16
    runs = [
        case.run(lambda mesh, o=overlap: run_sharded(mesh, shape, dtype=dtype, gathering="panels", overlap=o))
        for overlap in (False, True)
    ]
    for without, with_overlap in zip(*runs, strict=True):
        assert all(torch.equal(value, with_overlap[name]) for name, value in without.items())


@pytest.mark.parametrize("gathering", ["keep", "panels"])
def test_a_sum_of_bf16_over_ranks_is_rounded_once(gathering):
    # Added up in bf16, 256 and three ones are 256; in fp32, 259, which bf16 has as 260.
    def run(mesh):
        row = Linear(torch.ones(4, 4), None, mesh, input=KINDS["1d-sp"].inner, gathering=gathering).bfloat16()
        x = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().expand(1, 4, 4)
        return unshard(row(shard(x, row.layouts.input, mesh)), mesh)

    for y in MeshCase("1d-sp", 4).run(run):
        assert torch.equal(y, torch.full((1, 4, 4), 260.0).bfloat16())


def test_no_rank_sends_two_panels_of_an_operand_in_one_step():
    def receivers(mesh):
        layer = Linear.from_linear(layers()[0], mesh, gathering="panels")
        return list(zip(*(route.users for route in layer.product.routes), strict=True))

    for steps in MeshCase("2d", 9).run(receivers):
        for users in zip(*steps, strict=True):
            assert sorted(users) == [0, 1, 2]


@pytest.mark.parametrize("case", [MeshCase("1d", 4), MeshCase("2.5d", 8), xy(2, 2)], ids=str)
def test_activations_without_a_sequence_are_taken(case):
    assert_as_whole(case, (8, IN))


def test_an_input_that_lies_otherwise_is_refused():
    def give_another(mesh):
        first = Linear.from_linear(layers()[0], mesh)
        first(Sharded(numbers(2, SEQUENCE, IN, seed=1), Layout(features=("i",))))

    message = (
        "this 2d linear layer takes an input with batch by i, features by j, and is given one with features by i; "
        "make it for that one, Linear.from_linear(..., input=x.layout)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("2d", 4).run(give_another)


def test_a_kind_has_no_layer_for_a_layout_of_another():
    message = "a 3d linear layer takes an input with batch by i and j, features by k or with batch by i and k, features"
    with pytest.raises(ValueError, match=re.escape(message)):
        KINDS["3d"].linear(KINDS["2d"].outer)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 7), "dim 1 of an activation (2, 7) is cut in 2 parts along j, which do not divide it; use 6 or 8."),
        ((1, 8), "dim 0 of an activation (1, 8) is cut in 2 parts along i, which do not divide it; use 2."),
    ],
)
def test_sizes_that_the_grid_does_not_divide_are_refused_with_those_that_it_does(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("2d", 4).run(lambda mesh: shard(numbers(*shape, seed=1), mesh.kind.outer, mesh))


def test_a_width_whose_parts_would_be_gathered_unevenly_is_refused():
    message = "dim 1 of weight (8, 7) is cut in 2 parts along i, which do not divide it; use 6 or 8."
    with pytest.raises(ValueError, match=re.escape(message)):
        MeshCase("2d", 4).run(lambda mesh: Linear.from_linear(nn.Linear(7, 8), mesh))


def test_another_gathering_than_there_is_is_refused():
    with pytest.raises(ValueError, match=re.escape("there is no gathering='panel'; use one of keep, again, panels.")):
        MeshCase("1d", 1).run(lambda mesh: Linear.from_linear(nn.Linear(8, 8), mesh, gathering="panel"))
