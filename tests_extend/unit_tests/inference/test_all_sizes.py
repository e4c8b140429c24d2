"""Prefill and decode at every number of ranks from 1 to 8, against dense attention in fp64."""

from collections import Counter
from itertools import product

import pytest

from mindspeed_cp.comm import Traffic
from mindspeed_cp.plan import FULL
from unit_tests.inference.prefill_cases import PrefillCase, assert_new_tokens_equal, attend, dense
from unit_tests.inference.test_decode import WAYS_OF_ALL, assert_equal, decode
from unit_tests.inference.test_decode import dense as dense_decode
from unit_tests.inference.test_prefill import WAYS, counting

SHARES = (1, 4, 8)
"""Query heads of a key head."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", range(1, 9))
def test_prefill_at_every_number_of_ranks_and_share_of_cached_tokens(size, way):
    for number, (new, cached) in enumerate([(32, 0), (16, 48), (16, 37), (2 * size, 3), (1, 1000), (7, 0)]):
        batch, share = 1 + (number + size) % 3, SHARES[number % 3]
        lengths = [(new, cached), (new // 2, cached), (0, cached // 2)][:batch]
        case = PrefillCase(size, *zip(*lengths, strict=True), share=share)
        assert_new_tokens_equal(case, attend(case, WAYS[way]), dense(case))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS_OF_ALL, ids=str)
@pytest.mark.parametrize("size", range(1, 9))
def test_decode_at_every_number_of_ranks(size, way):
    """Of 1, 4 and 8 query heads of a key head; sequences of several lengths, of which some ranks have nothing."""
    for share in SHARES:
        heads = 2 * share * (size if way[1] == "heads" else 1)
        batch = size if way[:2] == ("allgather_q", "batch") else 3
        lengths = [(35, 4, 1)[sample % 3] for sample in range(batch)]
        found, given, shares = decode(size, way, lengths, 1, heads, heads // share)
        assert_equal(found, dense_decode(*given, lengths), shares)


@pytest.mark.parametrize(("size", "way"), list(product((2, 4), WAYS)))
def test_prefill_sends_a_message_a_hop_and_states_of_all_in_one_operation(size, way):
    case = PrefillCase(size, (16,), (32,), bands=FULL, settings={"transport": None})
    traffics = [Traffic() for _ in range(size)]
    attend(case, WAYS[way], counting(traffics))
    home = {"all_to_all": 1} if way == "pass_q" else {}
    assert [traffic.calls for traffic in traffics] == [Counter({"exchange": size - 1} | home)] * size
