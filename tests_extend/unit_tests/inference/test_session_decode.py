"""Sessions decode by any method: what ranks write, and what they send."""

from itertools import pairwise

import pytest
import torch

from mindspeed_cp.inference import DecodeCase, Sampling, Session, decode_sent
from unit_tests.inference import session_cases as cases
from unit_tests.inference.test_session import on_virtual_ranks, written
from unit_tests.inference.toy_model import HEADS, KV_HEADS, SIZE, ToyModel, dense_choices

GREEDY = Sampling()


@pytest.mark.parametrize(
    ("decode", "size", "lengths"),
    [("allgather_q", 2, (37, 5, 20, 9)), ("ring_q", 2, (37, 5, 20)), ("ring_q", 3, (5, 30, 1, 12))],
)
def test_ranks_that_decode_their_own_sequences_write_what_one_does(decode, size, lengths):
    """Sequences end at different steps, and two turns share a cache."""
    given, second = cases.prompts(*lengths), cases.prompts(*[3] * len(lengths), seed=1)
    free = [[choice.token for choice in dense_choices(prompt, 6, GREEDY)] for prompt in given]
    ends = frozenset({free[0][2]})

    def turns(ranks):
        session = Session(ToyModel(), len(given), ranks, decode=decode, chunk=16, **cases.SMALL)
        first = written(session, given, 6, ends=ends)
        return first, written(session, second, 4)

    first = [[choice.token for choice in dense_choices(prompt, 6, GREEDY, ends=ends)] for prompt in given]
    assert len(set(map(len, first))) > 1
    texts = [[*prompt, *tokens, *more] for prompt, tokens, more in zip(given, first, second, strict=True)]
    then = [[choice.token for choice in dense_choices(text, 4, GREEDY)] for text in texts]
    assert on_virtual_ranks(size, turns) == [(first, then)] * size


@pytest.mark.parametrize(("decode", "size", "batch"), [("allgather_q", 2, 4), ("ring_q", 2, 2), ("allgather_q", 4, 4)])
def test_own_sequences_send_queries_states_and_new_tokens_whatever_the_context(decode, size, batch):
    def sent(ranks, length):
        session, counts = Session(ToyModel(), batch, ranks, decode=decode, **cases.SMALL), []
        for _ in session.generate(cases.prompts(*[length] * batch), 4):
            counts.append(ranks.traffic.bytes_sent.total())
        return [after - before for before, after in pairwise(counts)]

    layer = decode_sent(DecodeCase(size, batch, HEADS, SIZE, dtype=torch.float64), decode, "a2a").bytes
    tokens = (size - 1) * batch // size * KV_HEADS * 2 * SIZE * 8
    choices = (size - 1) * batch * 3 * 8
    for length in 20, 200:
        found = on_virtual_ranks(size, lambda ranks, length=length: sent(ranks, length))
        assert found == [[2 * (layer + tokens) + choices] * 3] * size


def test_sequences_go_through_the_model_on_their_own_rank_alone():
    """By default, where ranks get as many each."""

    class Counting(ToyModel):
        def __call__(self, tokens, positions, attention, rows):
            seen.append(tokens.size(0))
            return super().__call__(tokens, positions, attention, rows)

    for batch, each in (4, [4, 2, 2]), (3, [3, 3, 3]):
        seen = []
        on_virtual_ranks(
            2, lambda ranks, batch=batch: written(Session(Counting(), batch, ranks), cases.prompts(*[5] * batch), 3)
        )
        assert sorted(seen) == sorted(each * 2)


@pytest.mark.parametrize(
    ("decode", "batch", "sentence"),
    [
        ("allgather_q", 3, "on each of 2 ranks, and there are 3; use 'tree' or 'ring_q'"),
        ("ring_q", 1, "at least, and there are 1; use 'tree'"),
        ("gather", 2, "give one of 'auto', 'tree', 'allgather_q', 'ring_q'"),
    ],
)
def test_ways_that_the_batch_does_not_allow_are_refused(decode, batch, sentence):
    def run(ranks):
        with pytest.raises(ValueError, match=sentence):
            Session(ToyModel(), batch, ranks, decode=decode)

    on_virtual_ranks(2, run)


def test_attention_in_fp64_gives_a_model_in_bf16_the_same_bits_on_any_number_of_ranks():
    """Tokens, best logits and margins; in bf16 itself logits differ by their last digit."""
    prompts, model = cases.prompts(60, 20, 37), ToyModel(torch.bfloat16, softcap=None)

    def steps(size, dtype):
        return on_virtual_ranks(
            size,
            lambda ranks: list(
                Session(model, 3, ranks, decode="tree", attention_dtype=dtype, **cases.SMALL).generate(prompts, 8)
            ),
        )

    one, *_ = steps(1, torch.float64)
    assert steps(3, torch.float64) == [one] * 3
