"""Rotary embeddings of a program's own packed streams: as many as the longest document needs, whatever it says."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.patches.packing import Packing
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.rotary import rotary_patches
from mindspeed_cp.patching import PatchRegistry
from mindspeed_cp.sharding import restore, shard

ENDS, PADDED = torch.tensor([0, 3, 8]), torch.tensor([0, 4, 12])
"""The documents of a stream of 12 tokens, the second with 5 tokens and what makes them 8."""


def stream(longest: int | None, padded: torch.Tensor | None = PADDED) -> SimpleNamespace:
    """Megatron's PackedSeqParams, with what a program says of the longest document."""
    fields = {"cu_seqlens_q": ENDS if padded is not None else PADDED, "cu_seqlens_q_padded": padded}
    fields |= {name.replace("_q", "_kv"): ends for name, ends in fields.items()}
    return SimpleNamespace(qkv_format="thd", local_cp_size=None, max_seqlen_q=longest, max_seqlen_kv=longest, **fields)


@pytest.mark.parametrize("padded", [PADDED, None], ids=["padded beside", "padded alone"])
@pytest.mark.parametrize("longest", [None, 1, 5, 8, 11])
def test_embeddings_reach_to_the_end_of_what_pads_the_longest_document(longest, padded):
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    module = pytest.importorskip("megatron.core.models.common.embeddings.rotary_pos_embedding")
    whole = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(0))
    group = SimpleNamespace(size=lambda: 2)
    layout = Packing().stream(PADDED, 2).layout
    exact_freqs = torch.randn(12, 1, 1, 8, generator=torch.Generator().manual_seed(1))[:11]
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    exact = rope_utils._apply_rotary_pos_emb_thd(whole, PADDED, exact_freqs, cp_group=one)
    with PatchRegistry(rotary_patches(Plugin())).applied():
        length = module.RotaryEmbedding.get_rotary_seq_len(
            SimpleNamespace(), None, None, None, None, stream(longest, padded)
        )
        found = []
        for rank in range(2):
            group.rank = lambda rank=rank: rank
            mine = shard(whole, layout, rank, 0)
            found.append(rope_utils._apply_rotary_pos_emb_thd(mine, PADDED, exact_freqs[:length], cp_group=group))
    assert torch.equal(restore(found, layout, 0), exact)


def test_embeddings_that_end_within_a_document_are_refused_in_one_line():
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    with (
        PatchRegistry(rotary_patches(Plugin())).applied(),
        pytest.raises(ValueError, match=r"rotary embeddings of 5 positions, and the longest document has 8 tokens"),
    ):
        rope_utils._apply_rotary_pos_emb_thd(torch.zeros(6, 2, 8), PADDED, torch.zeros(5, 1, 1, 8), cp_group=group)
