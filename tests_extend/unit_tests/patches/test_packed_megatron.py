"""Megatron's own functions on packed streams, over ranks: the cut of a batch, rotary embeddings, the next token."""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mindspeed_cp.patches.batches import batch_patches
from mindspeed_cp.patches.losses import loss_patches
from mindspeed_cp.patches.packing import Packing, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.rotary import rotary_patches
from mindspeed_cp.patches.sft_data import sft_data_patches
from mindspeed_cp.patching import PatchRegistry
from mindspeed_cp.sharding import shard

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
"""Lengths that no number of ranks divides."""


def layout(ranks, name="zigzag_by_document"):
    return Packing(name).stream(ENDS, ranks).layout


def group(rank, size):
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


@pytest.mark.parametrize("name", ["zigzag_by_document", "balanced"])
@pytest.mark.parametrize("frequencies", [8, 12], ids=["of the longest document", "of the stream"])
def test_rotary_embedding_is_that_of_one_rank(adaptor, name, frequencies):
    from megatron.core.models.common.embeddings import rope_utils

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(12, 2, 8, generator=generator)
    freqs = torch.randn(frequencies, 1, 1, 4, generator=generator)
    exact = rope_utils._apply_rotary_pos_emb_thd(whole, ENDS, freqs, cp_group=group(0, 1))
    with PatchRegistry(rotary_patches(Plugin(packing=Packing(name)))).applied():
        for rank in range(2):
            mine = shard(whole, layout(2, name), rank, 0)
            out = rope_utils._apply_rotary_pos_emb_thd(mine, ENDS, freqs, cp_group=group(rank, 2))
            assert torch.equal(out, shard(exact, layout(2, name), rank, 0))


class SecondOfTwo(Plugin):
    """The plugin of one rank."""

    place = (1, 2)


STREAM_CUTS = (
    "get_sft_batch_on_this_cp_rank",
    "_get_batch_on_this_cp_rank_per_document_balancing",
    "_get_batch_on_this_cp_rank_per_sequence_balancing",
)


@pytest.mark.parametrize("name", STREAM_CUTS)
def test_packed_batch_is_cut_without_transformer_engine(adaptor, name):
    from megatron.core import utils

    if not hasattr(utils, name):
        pytest.skip("this release has no such function")
    # The last pipeline stage has labels and no tokens.
    batch = {"tokens": None, "labels": torch.arange(12)[None], "cu_seqlens": ENDS[None], "cu_seqlens_padded": None}
    with PatchRegistry(batch_patches(SecondOfTwo())).applied():
        cut = getattr(utils, name)(batch, cp_group=None)
    assert torch.equal(cut["labels"], shard(torch.arange(12)[None], layout(2), 1, 1))
    assert cut["tokens"] is None
    assert torch.equal(cut["cu_seqlens"], ENDS[None])


@pytest.mark.parametrize("size", [3, 5], ids=["equal shards", "unequal shards"])
@pytest.mark.parametrize("packed", [True, False], ids=["of its document", "of its sample"])
def test_next_token_is_that_of_one_rank_wherever_it_is_held(adaptor, monkeypatch, size, packed):
    from megatron.core.transformer import multi_token_prediction

    def all_gather(into, tensor, group):
        for place, each in zip(into, shards, strict=True):
            place[..., : each.size(-1)] = each

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    params = SimpleNamespace(qkv_format="thd", cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS) if packed else None
    if params is not None:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = None
    whole, held = torch.arange(1, 13).expand(1, -1), layout(size) if packed else layout_of_length(12, size)
    shards = [shard(whole, held, rank, 1) for rank in range(size)]
    with PatchRegistry(loss_patches(Plugin(length=None if packed else 12))).applied():
        roll = multi_token_prediction.roll_tensor
        rolled, count = roll(whole.clone(), cp_group=group(0, 1), packed_seq_params=params)
        for rank in range(size):
            mine, total = roll(shards[rank], cp_group=group(rank, size), packed_seq_params=params)
            assert torch.equal(mine, shard(rolled, held, rank, 1))
            assert total * size == pytest.approx(count.item())


class WordByWord:
    """A tokenizer of conversations: a word is its length."""

    eod, pad, unique_identifiers = 0, 0, ()

    def tokenize_conversation(self, conversation, return_target, add_generation_prompt):
        words = [len(word) for message in conversation for word in message["content"].split()]
        return np.array(words), np.array(words)


def test_packs_of_conversations_are_the_same_whatever_the_size(adaptor):
    module = pytest.importorskip("megatron.training.datasets.sft_dataset")
    conversations = [{"role": "system", "content": "a bb ccc dddd eeeee"}, {"role": "system", "content": "f gg hhh"}]

    def pack(size):
        config = SimpleNamespace(sequence_length=16, context_parallel_size=size, tokenizer=WordByWord())
        config.create_attention_mask = config.reset_attention_mask = config.reset_position_ids = False
        config.random_seed, config.split, config.split_matrix, config.allow_ambiguous_pad_tokens = 1, "", None, False
        dataset = module.SFTDataset([conversations], "none", np.arange(1), 1, SimpleNamespace(name="train"), config)
        assert config.context_parallel_size == size, "the others' configuration is left alone"
        return dataset[0]

    alone = pack(1)
    with PatchRegistry(sft_data_patches()).applied():
        packed = pack(4)
    assert packed["cu_seqlens"].unique().tolist() == [0, 5, 16]
    for name, whole in alone.items():
        assert torch.equal(packed[name], whole), name
