"""Linear layers split over ranks give what the whole layers give."""

import pytest
import torch
from torch import nn

from mindspeed_cp.diffusion import ColumnLinear, MeshShape, RowLinear, on_virtual_ranks
from mindspeed_cp.diffusion.linear import ColumnRMSNorm


def layer(inputs, outputs, seed=0, bias=True):
    """The same each time, whichever thread asks."""
    made = nn.Linear(inputs, outputs, bias=bias).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


X = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_columns_feed_rows_with_one_all_reduce(bias):
    first, second = layer(12, 24, bias=bias), layer(24, 8, seed=1, bias=bias)
    expected = second(first(X).relu())

    def run(mesh):
        along = mesh.communicators["tp"]
        columns, rows = ColumnLinear(first, along), RowLinear(second, along)
        with torch.no_grad():
            return rows(columns(X).relu()), mesh.traffic["tp"].bytes_sent.total()

    for ranks in (2, 4):
        for found, sent in on_virtual_ranks(run, MeshShape(tp=ranks)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            # An all-reduce of [2, 3, 8] in fp64: 2 (P - 1) / P of it; between two ranks each sends the whole.
            assert sent == (2 * 3 * 8 * 8 if ranks == 2 else 2 * (ranks - 1) * 2 * 3 * 8 * 8 // ranks)


@torch.no_grad()
def test_gathered_columns_are_the_whole_output():
    whole = layer(12, 8)

    def run(mesh):
        with torch.no_grad():
            return ColumnLinear(whole, mesh.communicators["tp"], gather=True)(X)

    for found in on_virtual_ranks(run, MeshShape(tp=4)):
        torch.testing.assert_close(found, whole(X), rtol=0, atol=1e-12)


@torch.no_grad()
def test_each_block_of_outputs_and_of_inputs_is_cut():
    """q, k and v in one layer; and inputs that two column-split layers of other widths have made."""
    qkv, out = layer(12, 24), layer(12, 5)

    def run(mesh):
        along, rank = mesh.communicators["tp"], mesh.rank
        part = ColumnLinear(qkv, along, blocks=3)
        inputs = torch.cat([each.chunk(2, -1)[rank] for each in X.split([8, 4], -1)], -1)
        with torch.no_grad():
            return part(X).chunk(3, -1), RowLinear(out, along, widths=[8, 4])(inputs)

    found = on_virtual_ranks(run, MeshShape(tp=2))
    for number, block in enumerate(qkv(X).chunk(3, -1)):
        torch.testing.assert_close(torch.cat([each[0][number] for each in found], -1), block)
    for _, rows in found:
        torch.testing.assert_close(rows, out(X), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_norm_over_split_features_is_the_whole_norm(eps):
    norm = nn.RMSNorm(12, eps=eps).double()
    norm.weight.data = torch.arange(1.0, 13.0, dtype=torch.float64)

    def run(mesh):
        with torch.no_grad():
            return ColumnRMSNorm(norm, mesh.communicators["tp"])(X.chunk(2, -1)[mesh.rank])

    found = torch.cat(on_virtual_ranks(run, MeshShape(tp=2)), -1)
    torch.testing.assert_close(found, norm(X), rtol=0, atol=1e-12)


def test_whole_weights_are_cut_when_they_are_loaded():
    old, new = layer(12, 8), layer(12, 8, seed=2)

    def run(mesh):
        parts = nn.ModuleList(make(old, mesh.communicators["tp"]) for make in (ColumnLinear, RowLinear))
        state = {f"{place}.{name}": value for place in (0, 1) for name, value in new.state_dict().items()}
        parts.load_state_dict(state)
        reloaded = nn.ModuleList(make(old, mesh.communicators["tp"]) for make in (ColumnLinear, RowLinear))
        reloaded.load_state_dict(parts.state_dict())
        return [(each[0].weight, each[0].bias, each[1].weight, each[1].bias) for each in (parts, reloaded)]

    for rank, both in enumerate(on_virtual_ranks(run, MeshShape(tp=2))):
        for weight, bias, row_weight, row_bias in both:
            assert torch.equal(weight, new.weight.chunk(2, 0)[rank])
            assert torch.equal(bias, new.bias.chunk(2)[rank])
            assert torch.equal(row_weight, new.weight.chunk(2, 1)[rank])
            assert torch.equal(row_bias, new.bias)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda along: ColumnLinear(layer(4, 6), along), "tp=4 does not divide the 6 outputs of a layer"),
        (lambda along: RowLinear(layer(6, 4), along), "tp=4 does not divide the 6 inputs of a layer"),
        (lambda along: ColumnLinear(layer(4, 8), along, blocks=3), "8 outputs in 3 blocks: give a number that divides"),
        (lambda along: ColumnLinear(layer(4, 8), along, blocks=2, gather=True), "in 2 blocks gathered in order: give"),
        (lambda along: RowLinear(layer(8, 4), along, widths=[4, 8]), "blocks of .* are no 8 inputs"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        on_virtual_ranks(lambda mesh: make(mesh.communicators["tp"]), MeshShape(tp=4))
