"""Documents that have ranks of their own: who shares one, what its layer computes, and how it is handed on."""

from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.dynamic_attention import DynamicAttention
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks, as_sample
from mindspeed_cp.patches.dynamic_schedule import dynamic_schedule_patches
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry

GLOBAL_RANKS = {"all": [1, 3, 5, 7], "two": [5, 7], "others": [0, 2]}
"""Of process groups, by name: with tensor parallelism those that share documents are no neighbours."""


@dataclass(frozen=True)
class Packed:
    """What is read of Megatron's PackedSeqParams."""

    local_cp_size: int | None = 1
    cp_group: SimpleNamespace | None = None
    qkv_format: str = "sbhd"
    max_seqlen_q: int = 6


def group(name):
    return SimpleNamespace(name=name, size=lambda: len(GLOBAL_RANKS[name]))


@pytest.fixture
def ranks(monkeypatch):
    """Four of eight, with groups that know their parts by the numbers of these."""
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: GLOBAL_RANKS[group.name])
    made = SimpleNamespace(context_parallel=group("all"), part=lambda members: f"part {members}")
    return DynamicRanks(ContextParallelConfig(context_parallel_size=4, context_parallel_algo="megatron_cp_algo"), made)


class Over(NamedTuple):
    """Stands for an attention: what it was built over."""

    config: ContextParallelConfig
    part: str


@pytest.fixture
def attention(ranks):
    """Of a causal layer; over several ranks it is said which."""
    alone = LayerAttention(
        by_plan=build_attention(ContextParallelConfig()), by_mask=None, mask_type="causal", scale=0.5
    )
    return DynamicAttention(ranks, alone, Over, ranks.config)


def test_document_is_computed_by_the_ranks_that_share_it_and_of_its_own_length(attention):
    shared = attention.of_document(Packed(2, group("two"), max_seqlen_q=9))
    assert (shared.by_plan.part, shared.size, shared.length) == ("part (2, 3)", 2, 9)
    again = attention.of_document(Packed(2, group("two"), max_seqlen_q=5))
    assert (again.by_plan is shared.by_plan, again.length) == (True, 5)
    everyone = attention.of_document(Packed(4, group("all")))
    assert (everyone.by_plan.part, everyone.size) == ("part (0, 1, 2, 3)", 4)


def test_document_on_one_rank_is_causal_attention_of_its_tokens(attention):
    q, k, v = torch.randn(3, 6, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attention.of_document(Packed())(q, k, v, None)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, scale=0.5
    )
    torch.testing.assert_close(out, exact.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (None, "PackedSeqParams none: nothing says which ranks share the document; train by Megatron's schedule"),
        (Packed(None), "'sbhd' with local_cp_size=None: nothing says which ranks"),
        (Packed(2, group("two"), "thd"), "'thd' with local_cp_size=2: nothing says which ranks"),
        (Packed(2), "local_cp_size 2 and no cp_group; give the group of as many ranks"),
        (Packed(4, group("two")), "local_cp_size 4 and a cp_group of 2 ranks; give the group"),
        (Packed(2, group("others")), r"global ranks \[0, 2\], and documents are shared among \[1, 3, 5, 7\]; give one"),
    ],
)
def test_document_that_does_not_say_who_shares_it_is_refused(attention, packed, message):
    with pytest.raises(ValueError, match=message):
        attention.of_document(packed)


def test_document_that_comes_as_a_stream_is_a_sample_and_streams_stay_streams():
    assert as_sample(Packed(2, None, "thd")) == Packed(2, None, "sbhd")
    stream = Packed(None, None, "thd")
    assert as_sample(stream) is stream
    assert as_sample(None) is None


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_documents_are_handed_out_whole_each_time_with_their_ends_and_a_token_for_each_rank(adaptor, monkeypatch):
    from megatron.core.datasets import data_schedule

    names = ("tokens", "labels", "position_ids", "loss_mask")
    long, short = ({name: torch.arange(length) for name in names} for length in (5, 2))
    schedule = ({7: long, 9: short}, [[[7], [7], []], [[9], [9], [9]]])
    monkeypatch.setattr(data_schedule.HybridCPDataLoaderWrapper, "__next__", lambda wrapper: schedule)
    iterator = data_schedule.HybridCPDataLoaderWrapper.__new__(data_schedule.HybridCPDataLoaderWrapper)
    with PatchRegistry(dynamic_schedule_patches(Plugin())).applied():
        documents, who = next(iterator)
    assert who is schedule[1]
    assert documents[7]["tokens"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert documents[7]["cu_seqlens"].tolist() == [[0, 5]]
    documents[7]["tokens"] = "cut"
    assert documents[7]["tokens"].numel() == 5, "as a step that is replayed takes it"
    padded = {name: tensor.flatten().tolist() for name, tensor in documents[9].items()}
    assert padded["tokens"] == padded["labels"] == [0, 1, 1]
    assert (padded["position_ids"], padded["loss_mask"]) == ([0, 1, 2], [0, 1, 0])
    assert (padded["cu_seqlens"], padded["max_seqlen"]) == ([0, 3], [3])
