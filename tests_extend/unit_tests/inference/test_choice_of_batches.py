"""What a batch of several lengths, and coefficients, mean for the choice between K/V and queries."""

import pytest
import torch

from mindspeed_cp.comm import Traffic
from mindspeed_cp.inference import Coefficients, PrefixCase, Rates, choose_pass, prefill_plan, prefix_attention
from mindspeed_cp.kernels import TileCase, TileTerms
from unit_tests.inference.prefill_cases import PrefillCase, assert_new_tokens_equal, attend, dense
from unit_tests.inference.test_prefill import counting


def case_of(lengths):
    x = torch.zeros(len(lengths), 8, 1, 8, dtype=torch.bfloat16)
    return PrefixCase.of(prefill_plan(lengths, 4), TileCase.of(x, x[:, :1], x[:, :1], TileTerms(1.0)))


def test_sequences_that_differ_by_a_token_choose_as_copies_of_one_do():
    one, alike, apart = case_of([1000]), case_of([1000] * 3), case_of([1000, 1001, 1000])
    assert one == alike
    assert one == apart._replace(new=1000) and abs(apart.new - 1000) <= 1
    # Where K/V of one sequence hide behind its kernel just so, two of them do not hide twice as well.
    rates = Rates(one.new * 1e9, 1e9)
    assert choose_pass(one, rates) == choose_pass(apart, rates)


def test_short_sequences_beside_a_long_one_hardly_count():
    assert case_of([4000, 40, 40]).new == round((4000**2 + 2 * 40**2) / 4080)


@pytest.mark.parametrize("chosen", ["pass_kv", "pass_q"])
def test_coefficients_decide_alone(chosen):
    constant = {"pass_kv": 1.0, "pass_q": -1.0}[chosen]
    case = PrefillCase(3, (9,), (20,), settings={"coefficients": Coefficients(0.0, 0.0, constant)})
    traffics = [Traffic() for _ in range(case.size)]
    assert_new_tokens_equal(case, attend(case, prefix_attention, counting(traffics)), dense(case))
    assert {"all_to_all" in traffic.calls for traffic in traffics} == {chosen == "pass_q"}
