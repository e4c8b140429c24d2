"""Ranks that come to relayout or gather with what does not go together: one error on all, before shards are sent."""

import pytest
import torch

from mindspeed_cp.batch import PackedBatch
from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.layouts import Contiguous, DocumentZigzag, Zigzag
from mindspeed_cp.relayout import gather, relayout
from mindspeed_cp.sharding import SequenceLayout
from unit_tests.layout_cases import gather_twice

ODD, THIRD = Zigzag(2, ((9,),)), Zigzag(3, ((9,),))
EVEN, STRETCH = Zigzag(2, ((8,),)), Contiguous(2, ((8,),))
TWO = Zigzag(2, ((8,), (4, 4)))
REFUSED = r"rank 0: refused: .*; rank 1: "


def of(layout, rank, samples=1, dtype=torch.float32):
    return torch.zeros(samples, layout.num_tokens(rank), dtype=dtype)


CASES = {
    "gather of a shard too short": (
        lambda c: gather(of(ODD, c.rank)[:, : 3 + c.rank], ODD, c, 1),
        REFUSED + "gather of .* by the same layouts, and",
    ),
    "gather of a shard too long": (lambda c: gather(torch.zeros(1, 7 - 2 * c.rank), ODD, c, 1), REFUSED),
    "gather of each other's shards": (lambda c: gather(of(ODD, 1 - c.rank), ODD, c, 1), REFUSED + "refused"),
    "gather of other samples": (lambda c: gather(of(TWO, c.rank, 3 - c.rank), TWO, c, 1), REFUSED),
    "gather, batches differ": (
        lambda c: gather(of(ODD, c.rank, 1 + c.rank), ODD, c, 1),
        r"rank 0: gather of \(1, tokens\) float32 on cpu, by .* rank 1: gather of \(2, tokens\)",
    ),
    "gather, dtypes differ": (
        lambda c: gather(of(EVEN, c.rank, dtype=(torch.int32, torch.float32)[c.rank]), EVEN, c, 1),
        r"rank 0: gather of \(1, tokens\) int32 .* rank 1: gather of \(1, tokens\) float32",
    ),
    "gather, layouts differ": (
        lambda c: gather(of(EVEN, c.rank), (EVEN, STRETCH)[c.rank], c, 1),
        r"rank 0: .* by Zigzag of 8 tokens .* rank 1: .* by Contiguous of 8 tokens",
    ),
    "gather by a layout of other ranks": (
        lambda c: gather(of(THIRD, c.rank), THIRD, c, 1),
        r"^Zigzag of 9 tokens of 1 samples on 3 ranks over a group of 2 is no layout .*; give one that is",
    ),
    "gather where another rank relays out": (
        lambda c: relayout(of(EVEN, 1), EVEN, EVEN, c, 1) if c.rank else gather(of(EVEN, 0), EVEN, c, 1),
        r"rank 0: gather of .* rank 1: relayout of",
    ),
    "gather along no dim": (lambda c: gather(of(EVEN, c.rank), EVEN, c, 5), r"^a tensor of \(1, 4\) has 2 dims, and"),
    "gather of an array": (lambda c: gather(of(EVEN, c.rank).numpy(), EVEN, c, 1), r"^a ndarray is given .*as_tensor"),
    "relayout, one shard too short": (
        lambda c: relayout(of(EVEN, 0)[:, : 3 + c.rank], EVEN, STRETCH, c, 1),
        REFUSED + "relayout of",
    ),
    "relayout, batches differ": (
        lambda c: relayout(of(EVEN, 0, 1 + c.rank), EVEN, STRETCH, c, 1),
        r"relayout of \(1, tokens\) .* relayout of \(2, tokens\)",
    ),
    "relayout, targets differ": (
        lambda c: relayout(of(EVEN, 0), EVEN, (EVEN, STRETCH)[c.rank], c, 1),
        r"rank 0: .* to Zigzag .* rank 1: .* to Contiguous",
    ),
    "relayout, documents differ": (
        lambda c: relayout(of(EVEN, 0), EVEN, DocumentZigzag(2, (((4, 4), (2, 6))[c.rank],)), c, 1),
        r"rank 0: .* to DocumentZigzag of 8 tokens .* rank 1: .* to DocumentZigzag of 8 tokens",
    ),
    "relayout, a gradient on one rank alone": (
        lambda c: relayout(of(EVEN, 0).requires_grad_(bool(c.rank)), EVEN, STRETCH, c, 1),
        r"rank 1: .* with gradients; .* gradients on all or none\.$",
    ),
    "relayout of all with too many tokens": (
        lambda c: relayout(torch.zeros(2, 5), EVEN, DocumentZigzag(2, ((8,),)), c, 1),
        r"a shard of \(2, 5\), and the source layout gives it 4 tok",
    ),
    "relayout to another stream": (
        lambda c: relayout(of(EVEN, 0), EVEN, ODD, c, 1),
        r"^Zigzag of 8 tokens of 1 samples on 2 ranks and Zigzag of 9 tokens .* are no two layouts of one batch",
    ),
    "relayout to other ranks": (
        lambda c: relayout(of(EVEN, 0), EVEN, Zigzag(3, ((8,),)), c, 1),
        "on 2 ranks and .* on 3 ranks over a group of 2 are no two .*; give those, and the group",
    ),
    "relayout to a batch": (
        lambda c: relayout(of(EVEN, 0), EVEN, PackedBatch.from_cu_seqlens([0, 8], 2), c, 1),
        r"^a PackedBatch is given in place of a layout; give batch\.layout\.$",
    ),
    "relayout from shards of no length": (
        lambda c: relayout(of(EVEN, 0), SequenceLayout(size=2), EVEN, c, 1),
        r"^a SequenceLayout is given in place of a layout; give layout\.of\(tokens of a rank\)\.$",
    ),
    "gather by nothing": (
        lambda c: gather(of(EVEN, 0), None, c, 1),
        r"^a NoneType is given in place of a layout; give one of mindspeed_cp\.layouts\.$",
    ),
    "relayout to other samples": (
        lambda c: relayout(of(TWO, 0, 2), TWO, Zigzag(2, ((8,),) * 3), c, 1),
        "2 samples .* 3 samples .*are no two",
    ),
}


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_ranks_that_do_not_go_together_all_get_one_error_before_shards_are_sent(call, message):
    world = VirtualWorld(2, timeout_s=10.0)

    def refusal(rank):
        communicator = VirtualCommunicator(world, (0, 1), rank, "relayout")
        with pytest.raises(ValueError, match=message) as refused:
            call(communicator)
        assert not communicator.traffic.calls
        return str(refused.value)

    first, second = world.run(refusal)
    assert first == second
    assert "\n" not in first


def test_what_is_no_communicator_is_refused():
    for given in (None, object()):
        with pytest.raises(ValueError, match=r"^communicator is a \w+; give ProcessGroupCommunicator\(group\)"):
            gather(of(EVEN, 0), EVEN, given, 1)


def test_agreement_sends_eight_bytes_to_each_rank_and_is_counted_apart():
    world, layout = VirtualWorld(3), Zigzag(3, ((9,),))

    def sent(rank):
        communicator = VirtualCommunicator(world, (0, 1, 2), rank, "relayout")
        gather(of(layout, rank), layout, communicator, 1)
        return communicator.traffic.bytes_sent, communicator.apart.traffic.bytes_sent

    assert world.run(sent) == [({"all_gather": 2 * 3 * 4}, {"exchange": 2 * 8})] * 3


def test_processes_agree_too_and_go_on_after_a_refusal(gloo):
    layout, whole = Zigzag(3, ((4, 5), (9,))), torch.arange(18).view(2, 9)
    for message, gathered in gloo.run(3, gather_twice, layout, whole):
        assert "rank 0: gather of" in message
        assert "ranks 1 to 2: gather of" in message
        assert torch.equal(gathered, whole)
