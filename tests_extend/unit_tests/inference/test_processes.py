"""A sample of what virtual ranks are tested with, over processes."""

import pytest
import torch

from mindspeed_cp.inference import DecodeCase, decode_sent, pass_kv_bytes, pass_q_bytes
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.testing.rank_pool import RankFailure
from unit_tests.inference import process_cases as cases
from unit_tests.inference.prefill_cases import PrefillCase, assert_new_tokens_equal, dense, inputs, plan_of

CASE = PrefillCase(4, (24, 7, 1, 12), (12, 29, 35, 24), share=4)


@pytest.mark.parametrize(("strategy", "bytes_of"), [("pass_kv", pass_kv_bytes), ("pass_q", pass_q_bytes)])
def test_prefill_over_processes_equals_dense_attention_and_sends_its_formula(gloo, strategy, bytes_of):
    found = gloo.run(4, cases.prefill, CASE, strategy)
    assert_new_tokens_equal(CASE, [state for state, _ in found], dense(CASE))
    of = TileCase.of(*inputs(CASE), TileTerms(1.0))
    for rank, (_, sent) in enumerate(found):
        assert (sent["exchange"], sent["all_to_all"]) == bytes_of(plan_of(CASE), rank, of, batch=4)[:2]


@pytest.mark.parametrize(
    "way", [("tree", "replicated", "a2a"), ("allgather_q", "heads", "ag_rs"), ("ring_q", "batch", "a2a")], ids=str
)
def test_decode_over_processes_equals_dense_attention_and_sends_its_formula(gloo, way):
    method, layout, backend = way
    case = PrefillCase(4, (4,) * 4, (32,) * 4, share=4)
    expected = decode_sent(DecodeCase(4, 4, 8, 8, value_head_size=12, dtype=torch.float64), method, backend).bytes
    found = gloo.run(4, cases.decode, case, way)
    dim = {"heads": 1, "batch": 0}.get(layout)
    for place, exact in enumerate(dense(case)):
        parts = [state[place] for state, _ in found]
        whole = parts[0] if dim is None else torch.cat(parts, dim=dim)
        torch.testing.assert_close(whole, exact[:, :, -1:], rtol=0, atol=1e-12)
    assert {sent for _, sent in found} == {expected}


@pytest.mark.slow
def test_rank_that_is_killed_is_named_by_the_ranks_that_agree_first(gloo):
    with pytest.raises(RankFailure, match="rank 2 of the group of 4 did not come to this call of inference"):
        gloo.run(4, cases.prefill_until_killed, CASE, "pass_q", 2, timeout_s=60.0)
