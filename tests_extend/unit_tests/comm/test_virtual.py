"""Virtual ranks: the operations of a Communicator between threads, their counts, failures and timeouts."""

import re

import pytest
import torch

from mindspeed_cp.comm import Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.testing.rank_pool import LIMIT_S

GROUPS = ([0], [0, 1], [2, 0], [0, 2, 5], list(range(8)))


def on_ranks(ranks, function):
    """What `function(communicator)` returns on each of the ranks, in the group's order."""
    world = VirtualWorld(8, timeout_s=LIMIT_S)

    def on_rank(rank):
        return function(VirtualCommunicator(world, ranks, rank, "here")) if rank in ranks else None

    results = world.run(on_rank)
    return [results[rank] for rank in ranks]


def numbered(rank, *shape):
    return torch.arange(torch.Size(shape).numel()).view(shape) + 1000 * rank


def test_results_come_back_by_rank():
    assert VirtualWorld(5).run(lambda rank: rank * 10) == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("ranks", GROUPS)
def test_communicator_counts_ranks_in_the_groups_order(ranks):
    assert on_ranks(ranks, lambda each: (each.rank, each.size)) == [(rank, len(ranks)) for rank in range(len(ranks))]


@pytest.mark.parametrize("ranks", GROUPS)
def test_all_to_all_gives_row_p_of_every_rank_to_rank_p(ranks):
    size = len(ranks)
    sends = torch.stack([numbered(rank, size, 3, 2) for rank in range(size)])

    def twice(communicator):
        communicator.all_to_all(sends[communicator.rank])
        return communicator.all_to_all(sends[communicator.rank]), communicator.traffic

    for rank, (received, traffic) in enumerate(on_ranks(ranks, twice)):
        assert torch.equal(received, sends[:, rank])
        assert traffic.calls == {"all_to_all": 2}
        assert traffic.bytes_sent == {"all_to_all": 2 * (size - 1) * 6 * 8}


@pytest.mark.parametrize("ranks", GROUPS)
def test_all_gather_stacks_what_each_rank_gives(ranks):
    size = len(ranks)
    sends = torch.stack([numbered(rank, 3, 2) for rank in range(size)])

    def gather(communicator):
        return communicator.all_gather(sends[communicator.rank]), communicator.traffic

    for received, traffic in on_ranks(ranks, gather):
        assert torch.equal(received, sends)
        assert traffic.calls == {"all_gather": 1}
        assert traffic.bytes_sent == {"all_gather": (size - 1) * 6 * 8}


@pytest.mark.parametrize("ranks", [[0, 1], [2, 0], [0, 2, 5], list(range(8))])
def test_exchange_sends_to_one_rank_and_receives_from_another_in_order(ranks):
    size = len(ranks)

    def pass_on(communicator):
        received = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
        to, source = (communicator.rank + 1) % size, (communicator.rank - 1) % size
        transfers = [
            communicator.exchange(numbered(communicator.rank, 4) + number, to, received[number], source)
            for number in range(2)
        ]
        for transfer in transfers:
            transfer.wait()
        return received, communicator.traffic

    for rank, (received, traffic) in enumerate(on_ranks(ranks, pass_on)):
        expected = numbered((rank - 1) % size, 4)
        assert torch.equal(torch.stack(received), torch.stack([expected, expected + 1]))
        assert traffic.calls == {"exchange": 2}
        assert traffic.bytes_sent == {"exchange": 2 * 4 * 8}


def test_exchange_of_nothing_sends_nothing_and_waits_for_nothing():
    def one_way(communicator):
        sends = communicator.rank == 0
        received = None if sends else torch.zeros(2)
        communicator.exchange(torch.ones(2) if sends else None, 1, received, 0).wait()
        return communicator.traffic, received

    (sender, _), (receiver, received) = on_ranks([0, 1], one_way)
    assert sender.calls == {"exchange": 1}
    assert receiver.calls == {}
    assert torch.equal(received, torch.ones(2))


def test_what_is_sent_is_a_copy():
    def change_after_sending(communicator):
        message, received = torch.ones(2), torch.zeros(2)
        transfer = communicator.exchange(message, 1 - communicator.rank, received, 1 - communicator.rank)
        message.fill_(9.0)
        transfer.wait()
        return received

    for received in on_ranks([0, 1], change_after_sending):
        assert torch.equal(received, torch.ones(2))


def test_channels_have_nothing_to_do_with_each_other():
    world = VirtualWorld(2, timeout_s=LIMIT_S)

    def on_rank(rank):
        first, second = (VirtualCommunicator(world, [0, 1], rank, channel) for channel in ("first", "second"))
        a, b = torch.zeros(1), torch.zeros(1)
        transfers = [first.exchange(torch.full((1,), 1.0), 1 - rank, a, 1 - rank)]
        transfers.append(second.exchange(torch.full((1,), 2.0), 1 - rank, b, 1 - rank))
        for transfer in reversed(transfers):
            transfer.wait()
        return a.item(), b.item()

    assert world.run(on_rank) == [(1.0, 2.0)] * 2


def test_communicator_counts_in_the_traffic_that_it_is_given():
    traffic = Traffic()
    VirtualCommunicator(VirtualWorld(1), [0], 0, "here", traffic).all_gather(torch.ones(2))
    assert traffic.calls == {"all_gather": 1}


def test_run_raises_what_a_rank_raised():
    def fail(rank):
        if rank == 1:
            raise ValueError("rank 1 it was")

    with pytest.raises(ValueError, match=re.escape("rank 1 it was")):
        VirtualWorld(3).run(fail)


def test_a_rank_gives_up_on_one_that_does_not_send():
    world = VirtualWorld(2, timeout_s=0.2)

    def wait_for_nothing(rank):
        if rank == 1:
            VirtualCommunicator(world, [0, 1], rank, "here").exchange(None, 0, torch.zeros(1), 0).wait()

    with pytest.raises(RuntimeError, match=re.escape("virtual rank 1 waited 0.2 s for rank 0 in here")):
        world.run(wait_for_nothing)
