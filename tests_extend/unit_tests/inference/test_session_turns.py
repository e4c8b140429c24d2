"""Turns of a session that ask for no token, or for fewer."""

import pytest

from mindspeed_cp.inference import Sampling, Session
from unit_tests.inference import session_cases as cases
from unit_tests.inference.test_session import written
from unit_tests.inference.toy_model import ToyModel, dense_choices


def test_a_turn_without_tokens_leaves_no_token_behind():
    """The last chosen token goes through the model once, in the turn after it."""
    session = Session(ToyModel(), 1, **cases.SMALL)
    (first,) = written(session, [[5, 7, 9]], 3)
    assert written(session, [[2, 4]], 0) == [[]]
    assert session.cache.lengths == (8,)
    (then,) = written(session, [[3]], 4)
    text = [5, 7, 9, *first, 2, 4, 3]
    assert then == [choice.token for choice in dense_choices(text, 4, Sampling())]


def test_fewer_tokens_than_none_are_refused():
    with pytest.raises(ValueError, match="num_tokens=-1 for each sequence: give 0"):
        written(Session(ToyModel(), 1), [[1]], -1)
