"""Pass-KV and pass-Q against dense attention in fp64, the bytes of both, and how ranks choose and refuse."""

import pytest
import torch

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.comm import Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import (
    Rates,
    Spans,
    agreement_of,
    decode_plan,
    pass_kv_bytes,
    pass_q_bytes,
    prefill_plan,
    prefix_attention,
    ring_pass_kv_attention,
    ring_pass_q_attention,
    take,
)
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.plan import CAUSAL, FULL, Band
from mindspeed_cp.program import Transport
from unit_tests.inference.prefill_cases import PrefillCase, assert_new_tokens_equal, attend, dense, inputs, plan_of
from unit_tests.pairwise import pairwise

WAYS = {"pass_kv": ring_pass_kv_attention, "pass_q": ring_pass_q_attention}
AXES = {
    "size": [1, 2, 3, 5, 8],
    "tokens": [(32, 0), (16, 48), (16, 37), (16, 3), (1, 200), (7, 0)],
    "way": list(WAYS),
    "batch": [1, 2, 3],
    "alike": [True, False],
    "share": [1, 4, 8],
    "place": ["anywhere", "last rank"],
    "transport": [None, *Transport],
    "overlap": [False, True],
    "pieces": [1, 2],
    "bands": [CAUSAL, (Band(5, 0),), FULL],
}
MORE = AXES | {"size": [2, 4, 6, 7, 8], "tokens": [(32, 0), (16, 48), (16, 37), (14, 3), (1, 1000), (7, 0)]}


def case_of(row):
    """Sequences of a batch are alike, or each is of another length, the last with nothing new or cached."""
    new, cached = row["tokens"]
    shares = [(1.0, 1.0), (0.5, 0.3), (0.0, 0.0)] if not row["alike"] else [(1.0, 1.0)] * 3
    return PrefillCase(
        row["size"],
        tuple(int(new * share) for share, _ in shares[: row["batch"]]),
        tuple(int(cached * share) for _, share in shares[: row["batch"]]),
        row["place"],
        row["share"],
        row["bands"],
        settings={"transport": row["transport"], "overlap": row["overlap"], "pieces": row["pieces"]},
    )


def check(row):
    case = case_of(row)
    assert_new_tokens_equal(case, attend(case, WAYS[row["way"]]), dense(case))


def row_id(row):
    return "-".join(str(row[name]) for name in ("way", "size", "tokens", "batch", "alike", "share", "place"))


@pytest.mark.parametrize("row", pairwise(AXES), ids=row_id)
def test_prefill_equals_dense_attention(row):
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise(MORE) + pairwise(dict(reversed(MORE.items()))), ids=row_id)
def test_prefill_equals_dense_attention_in_more_cases(row):
    check(row)


@pytest.mark.parametrize("way", WAYS)
def test_terms_reach_the_scores_of_queries_that_travel(way):
    slopes, sinks = torch.tensor([0.1, 0.2, 0.0, 0.4]).double(), torch.tensor([0.3, -1.0, 2.0, 0.0]).double()
    terms = AttentionTerms(softcap=1.5, alibi_slopes=slopes, sinks=sinks)
    case = PrefillCase(3, (13, 6), (8, 15), settings={"terms": terms})
    assert_new_tokens_equal(case, attend(case, WAYS[way]), dense(case, softcap=1.5, sinks=sinks, slopes=slopes))


@pytest.mark.parametrize("way", WAYS)
def test_error_in_bf16_does_not_grow_with_the_ranks(way):
    errors = []
    for size in (1, 2, 8):
        case = PrefillCase(size, (48,), (64,), dtype=torch.bfloat16)
        plan, exact = plan_of(case), dense(case).out
        difference = [
            (state.out.double() - take(exact, plan.queries, rank)) for rank, state in enumerate(attend(case, WAYS[way]))
        ]
        errors.append(torch.cat([each.flatten() for each in difference]).norm().item())
    assert max(errors) <= 1.1 * errors[0]


def counting(traffics):
    """A maker of communicators that count in one traffic a rank."""
    return lambda world, ranks, rank, name: VirtualCommunicator(world, ranks, rank, name, traffics[rank])


def counted(case, way):
    """What each rank has sent, by kind of operation."""
    traffics = [Traffic() for _ in range(case.size)]
    attend(case, WAYS[way], counting(traffics))
    return [traffic.bytes_sent for traffic in traffics]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bands", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize(("way", "function"), [("pass_kv", pass_kv_bytes), ("pass_q", pass_q_bytes)])
def test_bytes_sent_are_those_of_the_formula(way, function, bands, dtype):
    case = PrefillCase(4, (24, 24), (40, 9), bands=bands, dtype=dtype)
    plan = plan_of(case)
    of = TileCase.of(*inputs(case), TileTerms(1.0))
    for rank, sent in enumerate(counted(case, way)):
        formula = function(plan, rank, of, batch=2)
        assert (sent["exchange"], sent["all_to_all"]) == (formula.carried, formula.home)


def test_bytes_where_all_see_all_are_those_of_the_paper():
    case = PrefillCase(4, (32,), (0,), bands=FULL, dtype=torch.bfloat16, share=4)
    others, local, heads, kv_heads, d, v = 3, 8, 8, 2, 8, 12
    assert [each["exchange"] for each in counted(case, "pass_kv")] == [others * local * kv_heads * (d + v) * 2] * 4
    for sent in counted(case, "pass_q"):
        assert sent["exchange"] == others * local * heads * d * 2
        assert sent["all_to_all"] == others * local * heads * (v + 1) * 4


@pytest.mark.parametrize(
    ("new", "rates", "chosen"),
    [(4, None, "pass_q"), (64, None, "pass_kv"), (4, Rates(1e12, 1e9), "pass_q"), (4, Rates(1e9, 1e12), "pass_kv")],
    ids=["few", "many", "few over a slow link", "few over a fast link"],
)
def test_all_ranks_choose_the_same_from_numbers_of_all_of_them(new, rates, chosen):
    # All that is cached lies on one rank, and another has no new token: what each sees of its own differs.
    case = PrefillCase(5, (new,), (128,), place="last rank", share=8, settings={"rates": rates})
    traffics = [Traffic() for _ in range(case.size)]
    states = attend(case, prefix_attention, counting(traffics))
    assert_new_tokens_equal(case, states, dense(case))
    assert {"all_to_all" in traffic.calls for traffic in traffics} == {chosen == "pass_q"}


def refused(functions, size=2):
    """The error of each rank."""
    world = VirtualWorld(size, 5.0)

    def on_rank(rank):
        communicator = VirtualCommunicator(world, range(size), rank, "ring")
        with pytest.raises(ValueError) as error:
            functions[rank](communicator)
        assert communicator.traffic.calls.total() == 0
        return str(error.value)

    return world.run(on_rank)


def prompt_of(length, **settings):
    def call(communicator):
        plan = prefill_plan([length], communicator.size)
        x = torch.zeros(1, 2, plan.queries.num_tokens(communicator.rank), 8)
        prefix_attention(
            x, x, x, plan=plan, communicator=communicator, agreement=agreement_of(communicator), **settings
        )

    return call


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (prompt_of(8), prompt_of(12)),
        (prompt_of(8), prompt_of(8, strategy="pass_q")),
        (prompt_of(8), prompt_of(8, rates=Rates(1.0, 1.0))),
        (prompt_of(8), prompt_of(8, scale=-1.0)),
    ],
    ids=["prompts", "strategies", "rates", "one rank's own mistake"],
)
def test_ranks_that_come_with_different_calls_all_raise_before_anything_is_sent(one, other):
    for sentence in refused([one, other]):
        assert "call inference differently" in sentence and "rank 0: " in sentence and "rank 1: " in sentence
        assert "give all of them the same prompts" in sentence


def test_cached_positions_that_overlap_or_leave_a_gap_are_refused():
    for second, what in (((3, 6), "held twice"), ((5, 6), "held by no rank")):
        cached = Spans(((((0, 4),),), ((second,),)))
        with pytest.raises(ValueError, match=f"position . of sequence 0 is {what}"):
            prefill_plan([2], 2, cached=cached)
        with pytest.raises(ValueError, match=f"position . of sequence 0 is {what}"):
            decode_plan([(5, 6)], cached)


def test_queries_whose_own_keys_nobody_holds_are_refused_but_a_window_may_begin_anywhere():
    held = Spans(((((7, 9),),), (((9, 12),),)))
    assert decode_plan([(11, 12)], held).keys == held
    with pytest.raises(ValueError, match="position 12 of sequence 0 has queries and is held by no rank; give its keys"):
        decode_plan([(12, 13)], held)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: prefill_plan([], 2), r"new=\[\] tokens of each sequence: give one number or more"),
        (lambda: prefill_plan([3, -1], 2), r"new=\[3, -1\] tokens of each sequence"),
        (lambda: prefill_plan([1] * 3, 2, cached=prefill_plan([4, 5], 2).keys), "keys are those of 2 .* tokens of 3"),
        (lambda: prefill_plan([1], 2, cached=prefill_plan([4, 5], 2).keys), "keys are those of 2 .* tokens of 1"),
        (lambda: decode_plan([(3, 4)], prefill_plan([4, 5], 2).keys), "keys are those of 2 .* tokens of 1"),
        (lambda: take(torch.zeros(2, 1, 5, 3), Spans(((((4, 8),),),)), 0), "has 5 positions .* and the layout 8"),
        (lambda: take(torch.zeros(1, 1, 5, 3), prefill_plan([5, 3], 2).queries, 0), "of 1 sequences, and .* of 2"),
    ],
    ids=["nothing", "below 0", "sequences", "fewer", "decode", "positions", "samples"],
)
def test_plans_and_parts_of_what_is_not_there_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_plans_take_numbers_of_tensors():
    assert prefill_plan(torch.tensor([5, 3]), 2) == prefill_plan([5, 3], 2)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"size": 3}, "the plan deals q to 3 ranks, and there are 1; make it for 1."),
        ({"tokens": 5}, "has 5 tokens in dim 2, and the plan has 4"),
        ({"batch": 1}, "has 1 sequences, and the plan has 2"),
        ({"batch": 3}, "has 3 sequences, and the plan has 2; give the batch"),
        ({"strategy": "pass_v"}, "give one of 'auto', 'pass_kv', 'pass_q'."),
        ({"strategy": "pass_q", "pieces": 3}, "pieces=3 do not divide the 2 K/V heads"),
    ],
    ids=["ranks", "tokens", "fewer sequences", "more sequences", "strategy", "pieces"],
)
def test_what_does_not_fit_is_refused(changed, sentence):
    settings = dict(changed)
    plan = prefill_plan([4, 3] if "batch" in changed else [4], settings.pop("size", 1))
    x = torch.zeros(settings.pop("batch", 2), 2, settings.pop("tokens", 4), 8)
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(").replace("[", r"\[")):
        prefix_attention(x, x, x, plan=plan, communicator=None, **settings)


def test_bias_goes_with_pass_kv_whatever_the_choice():
    bias = torch.randn(1, 4, 4, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    case = PrefillCase(1, (4,), (24,), settings={"terms": AttentionTerms(bias=bias)})
    expected = dense(case, bias=torch.cat([bias.new_zeros(1, 4, 24, 28), bias], dim=2))
    assert_new_tokens_equal(case, attend(case, prefix_attention), expected)
