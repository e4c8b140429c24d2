"""Branches of guidance, shared among ranks."""

import pytest
import torch

from mindspeed_cp.diffusion import GuidanceParallel, MeshShape, guide, on_virtual_ranks
from mindspeed_cp.diffusion.pending import PendingBranches

SHAPE = (2, 3, 5)


def predictions(number, as_tuple=False):
    """A branch's output."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (x, x[0, :2]) if as_tuple else x


def test_guided_prediction_is_the_formula():
    negative, positive = predictions(0), predictions(1)
    plain = negative + 3.0 * (positive - negative)
    torch.testing.assert_close(guide(positive, negative, 3.0), plain)
    normalized = guide(positive, negative, 3.0, normalize=True)
    torch.testing.assert_close(normalized, plain * (positive.norm(dim=-1) / plain.norm(dim=-1))[..., None])
    factor = (positive.flatten(1).std(1) / plain.flatten(1).std(1)).view(-1, 1, 1)
    rescaled = guide(positive, negative, 3.0, rescale=0.7)
    torch.testing.assert_close(rescaled, plain * (0.7 * factor + 0.3))
    assert guide(0 * positive, 0 * negative, 3.0, normalize=True, rescale=1.0).isfinite().all()
    with pytest.raises(ValueError, match=r"rescale=1.5 is a share of the way; give 0 \(off\) to 1"):
        guide(positive, negative, 3.0, rescale=1.5)
    with pytest.raises(ValueError, match="give them alike"):
        guide(positive[:1], negative, 3.0)


@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
def test_every_rank_gets_every_branch_in_order_with_one_message(as_tuple):
    def run(mesh, num_branches):
        guidance, computed = GuidanceParallel(mesh), []

        def predict(x, number):
            computed.append(number)
            return predictions(number, as_tuple)

        def step():
            branches = [{"x": torch.zeros(3), "number": number} for number in range(num_branches)]
            return guidance(predict, branches, lambda *outputs: outputs)

        step()
        mesh.traffic["cfg"].clear()
        return step(), computed, dict(mesh.traffic["cfg"].calls), mesh.traffic["cfg"].bytes_sent["exchange"]

    for ranks in (1, 2, 3, 4):
        for num_branches in (2, 3, 4):
            numbers = sum(part.numel() for part in predictions(0, True)) if as_tuple else predictions(0).numel()
            found = on_virtual_ranks(lambda mesh, count=num_branches: run(mesh, count), MeshShape(cfg=ranks))
            for rank, (outputs, computed, calls, sent) in enumerate(found):
                own = list(range(rank, num_branches, ranks))
                assert computed == own * 2
                torch.testing.assert_close(outputs, tuple(predictions(each, as_tuple) for each in range(num_branches)))
                assert sent == len(own) * numbers * 8 * (ranks - 1)
                assert set(calls) <= {"exchange"}, "ranks that are left over are told once"
                assert calls.get("exchange", 0) == (ranks - 1) * bool(own), "one message to each other rank"


def test_branches_asked_for_one_after_another_are_shared_at_the_first_use():
    def run(mesh):
        computed, guidance = [], PendingBranches(GuidanceParallel(mesh))

        def ask(number):
            return guidance.ask(lambda: computed.append(number) or predictions(number), torch.zeros(3))

        results = []
        for step in (0, 2):
            positive, negative = ask(step), ask(step + 1)
            sent_before = mesh.traffic["cfg"].calls["exchange"]
            results.append(negative + 3.0 * (positive - negative))
            assert mesh.traffic["cfg"].calls["exchange"] == sent_before + (mesh.index("cfg") < 2) * (mesh.shape.cfg - 1)
        return computed, results

    for ranks in (2, 3):
        for rank, (computed, results) in enumerate(on_virtual_ranks(run, MeshShape(cfg=ranks))):
            assert computed == [number for number in range(4) if number % 2 == rank]
            for step, result in zip((0, 2), results, strict=True):
                expected = guide(predictions(step), predictions(step + 1), 3.0)
                torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["refused", "forgotten"])
def test_step_that_was_given_up_leaves_nothing_to_the_next(how):
    def run(mesh):
        guidance = PendingBranches(GuidanceParallel(mesh))
        promise = guidance.ask(lambda: predictions(7), torch.zeros(3))
        if how == "refused":
            with pytest.raises(ValueError, match="guidance is off"):
                promise + 1
        else:
            del promise
        positive, negative = (
            guidance.ask(lambda number=number: predictions(number), torch.zeros(3)) for number in (1, 0)
        )
        return guide(positive, negative, 3.0)

    for found in on_virtual_ranks(run, MeshShape(cfg=2)):
        torch.testing.assert_close(found, guide(predictions(1), predictions(0), 3.0), rtol=0, atol=0)


def test_one_branch_for_several_ranks_is_refused():
    def run(mesh):
        GuidanceParallel(mesh)(lambda x: x, [{"x": torch.zeros(1)}], lambda x: x)

    def run_pending(mesh):
        return PendingBranches(GuidanceParallel(mesh)).ask(lambda: predictions(0), torch.zeros(1)) + 1

    for each in (run, run_pending):
        with pytest.raises(ValueError, match="a step has 1 branch and cfg=2: guidance is off"):
            on_virtual_ranks(each, MeshShape(cfg=2))
