"""Rotary embeddings of packed streams on one rank: Megatron's own, whatever form its release gives cu_seqlens."""

import pytest
import torch

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patches.rotary import rotary_patches
from mindspeed_cp.patching import PatchRegistry


class OneRank:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def test_one_rank_takes_ends_of_documents_as_a_row_of_a_batch():
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    t, freqs, ends = torch.randn(6, 2, 8), torch.randn(4, 1, 1, 8), torch.tensor([0, 4, 6])
    with PatchRegistry(rotary_patches(Plugin())).applied():
        flat, row = (rope_utils._apply_rotary_pos_emb_thd(t, x, freqs, cp_group=OneRank()) for x in (ends, ends[None]))
    assert torch.equal(flat, row)
