"""From any layout to any other, on virtual ranks: tokens, gradients and bytes."""

import random

import torch

from mindspeed_cp.comm import Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, EqualChunks, Zigzag
from mindspeed_cp.relayout import gather, relayout
from mindspeed_cp.sharding import order, shard
from unit_tests.layout_cases import random_layouts, relayout_and_back


def on_ranks(num_ranks, function):
    """What `function(communicator)` gives on each rank, and the bytes that each has sent."""
    world, traffic = VirtualWorld(num_ranks), [Traffic() for _ in range(num_ranks)]
    ranks = range(num_ranks)
    results = world.run(lambda rank: function(VirtualCommunicator(world, ranks, rank, "relayout", traffic[rank])))
    return results, traffic


def pairs(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        source, target = rng.sample(list(random_layouts(rng)), 2)
        yield source, target, len(source.samples) if len(source.samples) > 1 else rng.randrange(1, 3)
    # One side knows documents, and the other none.
    packed = Balanced(3, ((5, 7), (12,)))
    yield packed, EqualChunks(3, 4), 2
    yield EqualChunks(3, 4), packed, 2


def holders(layout):
    """The rank that holds each token: [1 or B, S]."""
    ranks = [torch.full((layout.num_tokens(rank),), rank) for rank in range(layout.num_ranks)]
    return torch.empty_like(order(layout)).scatter_(1, order(layout), torch.cat(ranks).expand_as(order(layout)))


def test_relayout_gives_the_other_layout_s_shard_and_its_gradient_the_way_back():
    for source, target, batch in pairs(1, 12):
        whole = torch.randn(3, sum(source.samples[0]), batch, dtype=torch.float64)
        grad = torch.randn_like(whole)
        dims = {"dim": 1, "batch_dim": 2}

        def move(communicator, whole=whole, grad=grad, source=source, target=target, dims=dims):
            mine = shard(whole, source, communicator.rank, **dims).requires_grad_()
            moved = relayout(mine, source, target, communicator, **dims)
            moved.backward(shard(grad, target, communicator.rank, **dims))
            return moved.detach(), mine.grad

        results, _ = on_ranks(source.num_ranks, move)
        for rank, (moved, gradient) in enumerate(results):
            assert torch.equal(moved, shard(whole, target, rank, **dims))
            assert torch.equal(gradient, shard(grad, source, rank, **dims))


def test_only_tokens_that_another_rank_holds_are_sent_and_each_once():
    for source, target, batch in pairs(2, 8):
        whole = torch.randn(batch, sum(source.samples[0]), 3)
        _, traffic = on_ranks(
            source.num_ranks,
            lambda communicator, whole=whole, source=source, target=target: relayout(
                shard(whole, source, communicator.rank, 1), source, target, communicator, 1
            ),
        )
        before, after = holders(source).expand(batch, -1), holders(target).expand(batch, -1)
        for rank in range(source.num_ranks):
            leaving = int(((before == rank) & (after != rank)).sum())
            assert sum(traffic[rank].bytes_sent.values()) == leaving * 3 * whole.element_size()
            assert traffic[rank].calls == {"all_to_all": 1}


def test_relayout_between_zigzag_and_contiguous_sends_by_hand():
    # Of four ranks' chunks 0..7 rank 0 holds 0 and 7, and wants 0 and 1.
    source, target = Zigzag(4, ((16,),)), Contiguous(4, ((16,),))
    _, traffic = on_ranks(
        4, lambda communicator: relayout(torch.zeros(4, 8, dtype=torch.bfloat16), source, target, communicator, 0)
    )
    assert [each.bytes_sent["all_to_all"] for each in traffic] == [2 * 16, 4 * 16, 2 * 16, 4 * 16]


def test_a_shard_that_stays_is_not_copied():
    layout, tensor = Zigzag(1, ((4, 3),)), torch.randn(7)
    results, traffic = on_ranks(1, lambda communicator: relayout(tensor, layout, Zigzag(1, ((4, 3),)), communicator, 0))
    assert results[0] is tensor
    assert not traffic[0].calls


def test_gather_brings_all_tokens_back_in_order_to_every_rank():
    for source, _, batch in pairs(3, 6):
        whole = torch.randn(batch, 2, sum(source.samples[0]))
        results, traffic = on_ranks(
            source.num_ranks,
            lambda communicator, whole=whole, source=source: gather(
                shard(whole, source, communicator.rank, 2), source, communicator, 2
            ),
        )
        assert all(torch.equal(result, whole) for result in results)
        assert all(each.calls == {"all_gather": 1} for each in traffic)


def test_relayout_over_processes(gloo):
    source, target = DocumentZigzag(3, ((5, 2, 3), (1, 9))), Contiguous(3, ((5, 2, 3), (1, 9)), tokens=(0, 8, 2))
    whole = torch.randn(2, 10, 3)
    results = gloo.run(3, relayout_and_back, source, target, whole)
    for rank, (moved, gradient) in enumerate(results):
        assert torch.equal(moved, shard(whole, target, rank, 1))
        assert torch.equal(gradient, 2 * shard(whole, source, rank, 1))
