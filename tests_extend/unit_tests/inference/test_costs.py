"""The choice between pass-KV and pass-Q against the paper's measurements, table 4 of arXiv:2411.01783."""

import pytest
import torch

from mindspeed_cp.comm import VirtualCommunicator, VirtualWorld
from mindspeed_cp.inference import (
    Coefficients,
    PrefixCase,
    Rates,
    Sample,
    agreed_rates,
    choose_pass,
    fit_coefficients,
    measure_rates,
)

# Llama 3 405B on 4 ranks, 128,000 tokens in all: new ones, milliseconds of pass-KV and of pass-Q.
MEASURED = [
    (1280, 1023.39, 898.71),
    (3200, 1110.18, 1046.43),
    (4160, 1298.92, 1280.10),
    (6400, 1305.56, 1302.01),
    (12800, 2080.67, 2205.27),
    (25600, 3353.02, 3617.02),
    (38400, 4629.23, 4922.52),
    (51200, 5745.08, 6217.83),
    (64000, 6845.21, 7367.99),
    (76800, 7890.35, 8468.66),
    (89600, 8697.27, 9666.62),
    (102400, 10105.78, 10652.39),
    (115200, 11136.40, 11571.62),
    (128000, 11462.15, 12360.57),
]
ACHIEVED = Rates(540e12, 20e9)


def case(new, state_itemsize=2):
    """The paper's; it sends states in two bytes a number."""
    return PrefixCase(new, 128_000 - new, 4, 128, 8, itemsize=2, state_itemsize=state_itemsize)


SAMPLES = [Sample(case(new), kv / 1e3, q / 1e3) for new, kv, q in MEASURED]
FITTED = fit_coefficients(SAMPLES)


@pytest.mark.parametrize(
    "chosen_by",
    [
        {"rates": ACHIEVED, "include_all_to_all": False},
        {"rates": ACHIEVED},
        {"coefficients": FITTED},
    ],
    ids=["algorithm 1", "algorithm 5", "fitted"],
)
def test_choice_agrees_with_the_measured_table_away_from_its_tipping_point(chosen_by):
    for sample in SAMPLES:
        if abs(sample.pass_q_s / sample.pass_kv_s - 1.0) < 0.015:
            continue
        faster = "pass_kv" if sample.pass_kv_s < sample.pass_q_s else "pass_q"
        assert choose_pass(sample.case, **chosen_by) == faster, sample


def test_published_coefficients_do_not_give_the_published_table():
    published = Coefficients(-1.059, 1.145, 12.112)
    assert {choose_pass(each.case, coefficients=published) for each in SAMPLES} == {"pass_q"}


def test_threshold_of_algorithm_1_is_where_keys_hide_behind_the_kernel():
    rates = Rates(800e12, 50e9)
    chosen = [choose_pass(case(new), rates, include_all_to_all=False) for new in (3999, 4000)]
    assert chosen == ["pass_q", "pass_kv"]


def test_a_link_that_hides_keys_is_already_in_the_inequality_of_algorithm_5():
    generator = torch.Generator().manual_seed(0)
    for new, cached, ranks, share, ratio in torch.rand(2000, 5, generator=generator).tolist():
        one = PrefixCase(int(1 + 1e5 * new), int(1e6 * cached), int(2 + 30 * ranks), 128, int(1 + 127 * share))
        rates = Rates(10.0 ** (11 + 4 * ratio), 1e10)
        if choose_pass(one, rates, include_all_to_all=False) == "pass_kv":
            assert choose_pass(one, rates) == "pass_kv"


def test_states_in_fp32_cost_pass_q_twice_as_much():
    chosen = [choose_pass(case(4000, state_itemsize), ACHIEVED) for state_itemsize in (2, 4)]
    assert chosen == ["pass_q", "pass_kv"]


def test_without_rates_the_fewer_bytes_travel():
    # 1/8 of the tokens' queries are as many numbers as all K/V; their states in fp32 are twice as many bytes more.
    chosen = [choose_pass(case(new), include_all_to_all=False) for new in (15_999, 16_000)]
    assert chosen == ["pass_q", "pass_kv"]
    assert [choose_pass(case(new, 4)) for new in (5333, 5334)] == ["pass_q", "pass_kv"]
    assert choose_pass(PrefixCase(0, 10, 4, 8, 8)) == "pass_kv"


def test_rates_that_all_agree_on_are_the_lowest_of_each_kind():
    world = VirtualWorld(3, 5.0)
    measured = [Rates(3.0, 5.0), Rates(2.0, 9.0), Rates(4.0, 4.0)]
    found = world.run(lambda rank: agreed_rates(measured[rank], VirtualCommunicator(world, range(3), rank, "rates")))
    assert found == [Rates(2.0, 4.0)] * 3
    assert agreed_rates(measured[0], None) == measured[0]


def test_measured_rates_are_the_same_on_all_ranks():
    x, world = torch.ones(1, 2, 8, 4), VirtualWorld(2, 5.0)
    found = world.run(
        lambda rank: measure_rates(x, x, x, VirtualCommunicator(world, range(2), rank, "rates"), num_bytes=64)
    )
    assert found[0] == found[1] and min(found[0]) > 0.0
    assert measure_rates(x, x, x, None).bytes_per_s == torch.inf


def test_rates_and_samples_of_nothing_are_refused():
    for rates in Rates(0.0, 1.0), Rates(1.0, torch.nan), Rates(torch.nan, 1.0):
        with pytest.raises(ValueError, match="give what kernel and link achieve"):
            choose_pass(case(10), rates)
    for samples in SAMPLES[:1], [*SAMPLES, Sample(case(0), 1.0, 1.0)], [*SAMPLES, Sample(case(9), torch.nan, 1.0)]:
        with pytest.raises(ValueError, match="give two or more"):
            fit_coefficients(samples)
