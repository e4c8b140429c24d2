"""What a call of the operator has saved: held by itself, or left to the compiler's graph."""

import torch

from mindspeed_cp.attention.recorded import Saved


def test_what_lies_in_the_compiler_s_memory_and_is_not_saved_by_its_graph_is_copied():
    saved, given = Saved(), torch.arange(6.0)
    sinks, own = saved.pack(given[2:4]), saved.pack(torch.ones(2))
    saved.leave_to_graph([], [given, None])
    held = own.tensor
    given.fill_(-1.0)  # As a compiler does with what it is done with.
    assert saved.unpack(sinks).tolist() == [2.0, 3.0]
    assert saved.unpack(own) is held


def test_what_the_graph_saves_is_not_held_and_found_where_it_lies_by_then():
    saved, given = Saved(), torch.arange(24.0).view(2, 3, 4)
    whole, part = saved.pack(given), saved.pack(given[1, :, 1:3])
    saved.leave_to_graph([given], [given])
    assert whole.tensor is part.tensor is None
    moved = torch.cat([torch.zeros(5), given.flatten()])[5:].view(2, 3, 4)
    with saved.given([moved]):
        assert torch.equal(saved.unpack(whole), given)
        assert torch.equal(saved.unpack(part), given[1, :, 1:3])
