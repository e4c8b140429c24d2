"""Layers with a sliding window on ranks that keep no key of it, behind pages that were given back."""

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import Sampling, Session
from mindspeed_cp.inference.interleave import Interleaved, Span
from unit_tests.inference import session_cases as cases
from unit_tests.inference.toy_model import ToyModel, dense_choices


def test_a_sample_that_a_rank_keeps_nothing_of_takes_no_room_in_a_cache():
    """Stripes of 2 over 3 ranks: rank 1 has positions 2, 3, 8, 9, .., and none of 10 to 12."""
    alone = Interleaved(3, (Span(10, 12),), 2, aligned=True)
    assert alone.num_tokens(1) == 0
    beside = Interleaved(3, (Span(2, 4), Span(10, 12)), 2, aligned=True)
    assert (beside.base(1, 0), beside.num_tokens(1)) == (0, 2)


def test_ranks_without_a_key_in_the_window_write_on():
    """A window of two stripes over four ranks; the pages of what is before it were given back."""
    model, (prompt,), world = ToyModel(windows=(6,)), cases.prompts(50), VirtualWorld(4, timeout_s=20)

    def run(rank):
        session = Session(model, 1, VirtualCommunicator(world, range(4), rank, ""), **cases.SMALL)
        return [step.choices[0].token for step in session.generate([prompt], 6)]

    assert world.run(run) == [[choice.token for choice in dense_choices(prompt, 6, Sampling(), 0, model)]] * 4
