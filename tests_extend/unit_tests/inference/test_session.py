"""Sessions: any number of ranks writes what a model writes that goes through the whole text for each token."""

from itertools import pairwise

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import DecodeCase, Sampling, Session, decode_sent
from mindspeed_cp.testing.rank_pool import RankFailure
from unit_tests.inference import session_cases as cases
from unit_tests.inference.toy_model import HEADS, KV_HEADS, SIZE, ToyModel, dense_choices

GREEDY, DRAWN = Sampling(), Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=3)
PROMPTS = cases.prompts(37, 3, 20)


def on_virtual_ranks(size, function):
    """What function(communicator) gives on each rank."""
    world = VirtualWorld(size)

    def run(rank):
        return function(VirtualCommunicator(world, range(size), rank, "") if size > 1 else None)

    return world.run(run)


def written(session, prompts, num_tokens=8, **options):
    """The tokens of each sequence."""
    steps = list(session.generate(prompts, num_tokens, **options))
    return [[step.choices[sample].token for step in steps if step.choices[sample]] for sample in range(len(prompts))]


@pytest.mark.parametrize(("size", "sampling"), [(1, GREEDY), (2, GREEDY), (3, DRAWN), (4, DRAWN)])
def test_ranks_write_the_tokens_of_dense_attention(size, sampling):
    expected = [
        [choice.token for choice in dense_choices(prompt, 8, sampling, sample)] for sample, prompt in enumerate(PROMPTS)
    ]
    assert len(set(expected[0])) > 3
    found = on_virtual_ranks(
        size, lambda ranks: written(Session(ToyModel(), 3, ranks, chunk=16, **cases.SMALL), PROMPTS, sampling=sampling)
    )
    assert found == [expected] * size


@pytest.mark.parametrize(("strategy", "pieces"), [("pass_kv", 1), ("pass_q", 2)])
def test_next_turn_goes_on_where_the_last_one_ended(strategy, pieces):
    """The last chosen token has not gone through the model when the next prompt comes."""
    second = cases.prompts(9, 14, seed=1)

    def turns(ranks):
        session = Session(ToyModel(), 2, ranks, strategy=strategy, pieces=pieces, **cases.SMALL)
        first = written(session, PROMPTS[:2], 5)
        before = session.cache.lengths
        return first, before, written(session, second, 8)

    found = on_virtual_ranks(3, turns)
    first, before, then = found[0]
    assert found == [found[0]] * 3
    assert before == tuple(len(prompt) + 4 for prompt in PROMPTS[:2])
    for sample in range(2):
        text = [*PROMPTS[sample], *first[sample], *second[sample]]
        assert then[sample] == [choice.token for choice in dense_choices(text, 8, GREEDY)]


def test_sequence_that_has_ended_waits_for_the_others():
    free = [[choice.token for choice in dense_choices(prompt, 8, GREEDY)] for prompt in PROMPTS]
    ends = frozenset({free[0][4]})
    expected = [[choice.token for choice in dense_choices(prompt, 8, GREEDY, ends=ends)] for prompt in PROMPTS]
    assert {len(tokens) for tokens in expected} > {5}
    found = on_virtual_ranks(2, lambda ranks: written(Session(ToyModel(), 3, ranks, **cases.SMALL), PROMPTS, ends=ends))
    assert found == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding_parts_texts_only_where_the_best_logits_are_close(dtype):
    """The weights are rounded alike on any number of ranks; only the order of additions differs."""
    model = ToyModel(dtype)
    (one,), (three, *_) = (
        on_virtual_ranks(size, lambda ranks: list(Session(model, 3, ranks, **cases.SMALL).generate(PROMPTS, 8)))
        for size in (1, 3)
    )
    for sample in range(3):
        pairs = [(a.choices[sample], b.choices[sample]) for a, b in zip(one, three, strict=True)]
        parted = [number for number, (a, b) in enumerate(pairs) if a.token != b.token]
        assert not parted or pairs[parted[0]][0].is_close(dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_decoding_sends_states_and_choices_and_no_cached_key_or_value(size):
    """Counted, and the same after 20 tokens as after 400."""

    def sent(ranks, length):
        session, counts = Session(ToyModel(), 2, ranks, decode="tree", **cases.SMALL), []
        for _ in session.generate(cases.prompts(length, length), 6):
            counts.append(dict(ranks.traffic.bytes_sent))
        return [
            {kind: after.get(kind, 0) - before.get(kind, 0) for kind in {*before, *after}}
            for before, after in pairwise(counts)
        ]

    case = DecodeCase(size, 2, HEADS, SIZE, dtype=torch.float64)
    choices = (size - 1) * 2 * 3 * 8
    for length in 20, 400:
        for steps in on_virtual_ranks(size, lambda ranks, length=length: sent(ranks, length)):
            for step in steps:
                assert step.get("exchange", 0) == 0
                assert sum(step.values()) == 2 * decode_sent(case, "tree", "a2a").bytes + choices


def test_ranks_keep_their_share_of_the_cache():
    def kept(ranks):
        session = Session(ToyModel(windows=(None, None)), 1, ranks, interleave=4, page=4)
        next(session.generate(cases.prompts(400), 1))
        return session.cache.nbytes

    (alone,) = on_virtual_ranks(1, kept)
    assert alone == 2 * 400 * 2 * KV_HEADS * SIZE * 8
    assert on_virtual_ranks(4, kept) == [alone // 4] * 4


def test_ranks_that_were_given_different_prompts_all_raise():
    messages = []

    def run(ranks):
        prompts = PROMPTS if ranks.rank else [PROMPTS[0], PROMPTS[2], PROMPTS[2]]
        with pytest.raises(ValueError, match=r"call generation differently: rank 0: .*\[37, 20, 20\]") as raised:
            written(Session(ToyModel(), 3, ranks), prompts)
        messages.append(str(raised.value))

    on_virtual_ranks(3, run)
    assert len(set(messages)) == 1
    assert "give all ranks the same model, prompts and options" in messages[0]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_logits_that_are_no_numbers_are_an_error_of_all_ranks(sampling):
    """Only one of them has the logits that count."""

    class Broken(ToyModel):
        def __call__(self, tokens, positions, attention, rows):
            return super().__call__(tokens, positions, attention, rows).fill_(torch.nan)

    def run(ranks):
        with pytest.raises(ValueError, match="the best logit of sequence 0 at position 37 is nan: the weights hold"):
            written(Session(Broken(), 1, ranks, **cases.SMALL), PROMPTS[:1], sampling=sampling)

    on_virtual_ranks(3, run)


def test_a_temperature_close_to_0_takes_the_best_token():
    logits = torch.tensor([1.0, 40.0, 39.0])
    assert Sampling(temperature=1e-310).choose(logits, 0, 5).token == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty; give one token"), ([[1]], "1 prompts for a session of 2 sequences")],
    ids=["empty", "too few"],
)
def test_prompts_that_say_nothing_are_refused_on_all_ranks(prompts, message):
    def run(ranks):
        with pytest.raises(ValueError, match=message):
            written(Session(ToyModel(), 2, ranks), prompts)

    on_virtual_ranks(2, run)


def test_processes_write_what_virtual_ranks_do(gloo):
    expected = [[choice.token for choice in dense_choices(prompt, 4, GREEDY)] for prompt in PROMPTS]
    assert gloo.run(3, cases.write, PROMPTS, 4) == [expected] * 3


@pytest.mark.slow
def test_rank_that_is_killed_ends_the_others_with_its_number(gloo):
    with pytest.raises(RankFailure, match=r"LostRank: (.* failed .*: )?no answer from rank 1 of the group"):
        gloo.run(3, cases.write_until_killed, PROMPTS, 1, timeout_s=60.0)
