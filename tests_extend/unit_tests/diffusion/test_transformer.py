"""A transformer on a mesh gives what it gives on one rank."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mindspeed_cp.diffusion import (
    Gather,
    MeshShape,
    ParallelMesh,
    Split,
    TransformerPlan,
    on_virtual_ranks,
    parallelize,
)
from unit_tests.diffusion.mesh_cases import MESHES, ODD_MESHES, SOME_MESHES, denoised, inputs, model, plan


def assert_one_picture(meshes, *, joint, tokens, branches=2):
    """Every mesh's result is that of one rank, and the same to the bit on all of its ranks."""
    whole = model(joint=joint)
    expected = denoised(ParallelMesh(), whole, joint=joint, branches=branches, tokens=tokens)
    for shape in meshes:
        case = {"joint": joint, "branches": branches, "tokens": tokens}
        found = on_virtual_ranks(lambda mesh, case=case: denoised(mesh, whole, **case), shape)
        for each in found:
            torch.testing.assert_close(each, expected, rtol=0, atol=1e-10, msg=lambda text, at=shape: f"{at}: {text}")
            assert torch.equal(each, found[0]), f"{shape}: ranks differ"


@pytest.mark.parametrize("joint", [False, True], ids=["cross", "joint"])
def test_meshes_give_the_picture_of_one_rank(joint):
    assert_one_picture(SOME_MESHES[joint::2], joint=joint, tokens=35)


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True], ids=["cross", "joint"])
def test_every_mesh_gives_the_picture_of_one_rank(joint):
    assert_one_picture((*MESHES, *ODD_MESHES), joint=joint, tokens=35)


@pytest.mark.parametrize(
    ("joint", "shape"), [(False, MeshShape(ulysses=4)), (True, MeshShape(ring=2, ulysses=2))], ids=["cross", "joint"]
)
def test_seventeen_by_twenty_three_patches_need_no_padding(joint, shape):
    assert_one_picture([shape], joint=joint, tokens=17 * 23)


def test_three_branches_are_shared_by_two_ranks_and_by_four():
    assert_one_picture([MeshShape(cfg=2), MeshShape(cfg=4)], joint=False, tokens=35, branches=3)


def test_order_of_the_axes_changes_no_result():
    order = ("tp", "ulysses", "cfg", "ring")
    assert_one_picture([MeshShape(cfg=2, tp=2, order=order)], joint=True, tokens=35)


def call(model, **changes):
    """One prediction."""
    x, prompts = inputs(tokens=12)
    with torch.no_grad():
        return model(**{"x": x, "time": torch.ones(1, dtype=torch.float64), "text": prompts[0]} | changes)


@pytest.mark.parametrize("argument", ["x", "text", "time"])
def test_inputs_that_differ_between_ranks_are_refused_on_all_of_them(argument):
    whole, errors = model(joint=False), []

    def run(mesh):
        made = copy.deepcopy(whole)
        parallelize(made, mesh, plan())
        x, prompts = inputs(tokens=12)
        own = {"x": x, "text": prompts[0], "time": torch.ones(1, dtype=torch.float64)}[argument] + (mesh.rank == 2)
        try:
            call(made, **{argument: own})
        except ValueError as error:
            errors.append(str(error))

    on_virtual_ranks(run, MeshShape(ring=2, tp=2))
    assert len(errors) == 4
    for error in errors:
        assert error.startswith(f"{argument} of TinyDiT differs between ranks [0, 1, 3] and ranks [2]")
        assert error.endswith("give them the same prompts, and a generator of the same seed.")


def test_forward_is_the_models_own_after_removal():
    made, shape = model(joint=False), MeshShape(ring=2)
    expected = call(made)

    def run(mesh):
        copied = copy.deepcopy(made)
        parallel = parallelize(copied, mesh, plan())
        inside = call(copied)
        parallel.remove()
        mesh.traffic["ring"].clear()
        after = call(copied)
        return inside, after, mesh.traffic["ring"].calls.total()

    for inside, after, sent in on_virtual_ranks(run, shape):
        torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)
        assert torch.equal(after, expected)
        assert sent == 0


PLAN = plan()


@pytest.mark.parametrize(
    ("shape", "said", "sentence"),
    [
        (
            MeshShape(ring=2),
            replace(PLAN, splits=(Split("block.0", "x"),)),
            "TinyDiT has no module 'block.0'; the plan",
        ),
        (
            MeshShape(ring=2),
            replace(PLAN, splits=(Split("blocks.0", "hidden"),)),
            "takes x, text, condition and no 'hid",
        ),
        (
            MeshShape(ring=2),
            replace(PLAN, gathers=(Gather("final", "y"),)),
            "gathers what no split begins; name one of x",
        ),
        (
            MeshShape(ring=2),
            replace(PLAN, splits=(), gathers=()),
            "the plan of TinyDiT splits no tokens; give it splits",
        ),
        (MeshShape(tp=2), TransformerPlan(), "tp=2: the plan of TinyDiT splits no layers; give columns and rows"),
        (MeshShape(tp=2), replace(PLAN, columns={"blocks.*.qvk": 3}), "no layer of TinyDiT is named 'blocks.*.qvk'"),
        (
            MeshShape(tp=2),
            replace(PLAN, columns={"blocks.0": 1}),
            "blocks.0 is a Block, and torch.nn.Linear alone is spl",
        ),
        (MeshShape(tp=3), PLAN, "tp=3 does not divide the 32 outputs of a layer; use a divisor of 32"),
        (MeshShape(tp=16), PLAN, "tp=16 does not divide the 8 heads of blocks.0.attn; use a divisor of 8"),
        (
            MeshShape(tp=2, ulysses=8),
            PLAN,
            "ulysses=8 is more than the 4 query heads of a rank .tp=2., .*; use ulysses=4",
        ),
    ],
)
def test_plan_that_does_not_fit_is_refused(shape, said, sentence):
    whole = model(joint=False)

    def run(mesh):
        made = copy.deepcopy(whole)
        parallelize(made, mesh, said)
        call(made)

    with pytest.raises(ValueError, match=sentence):
        on_virtual_ranks(run, shape)


def test_gradients_are_refused():
    made = model(joint=False)
    parallelize(made, ParallelMesh(), plan())
    x, prompts = inputs(tokens=12)
    with pytest.raises(ValueError, match=r"TinyDiT on a mesh computes no gradients; call it within torch.no_grad\(\)"):
        made(x, torch.ones(1, dtype=torch.float64), prompts[0])


class Pair(nn.Module):
    """Says how it is called; for what a plan says of outputs."""

    def __init__(self):
        super().__init__()
        self.place, self.block = Places(), Sum()

    def forward(self, x):
        return self.block(x, *self.place(x))


class Places(nn.Module):
    """Two outputs of a number for each token."""

    def forward(self, x):
        return x[..., :1] * 0 + torch.arange(x.size(1), dtype=x.dtype)[:, None], x[..., :1]


class Sum(nn.Module):
    """Attends, so that the transformer does."""

    def forward(self, x, place, scale):
        return torch.nn.functional.scaled_dot_product_attention(*(x[:, None],) * 3)[:, 0] + place * scale


def test_outputs_of_a_module_are_split_by_their_place():
    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    said = TransformerPlan(
        splits=(Split("block", "x"), Split("place", 0), Split("place", 1)), gathers=(Gather("block", "x"),)
    )

    def run(mesh):
        made = Pair()
        parallelize(made, mesh, said)
        with torch.no_grad():
            return made(x)

    for found in on_virtual_ranks(run, MeshShape(ring=2)):
        torch.testing.assert_close(found, Pair()(x), rtol=0, atol=1e-12)
