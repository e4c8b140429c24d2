"""Packed streams and documents in Megatron's terms: where they end, who sees whom, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.packing import Packing
from unit_tests.dense import dense_attention

END = 9
TOKENS = torch.tensor([[1, 2, END, 3, 4, 5], [END, 1, 2, 3, END, END]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0]])


@pytest.mark.parametrize(
    ("rule", "ends"),
    [
        (DocumentRule(), [[0, 3, 6, 6], [0, 1, 5, 6]]),
        (DocumentRule(positions_restart=True), [[0, 3, 6, 6], [0, 1, 5, 6]]),
        (DocumentRule(positions_restart=True, length=4), [[0, 4, 6]]),
    ],
)
def test_documents_end_where_tokens_positions_or_flags_say(rule, ends):
    found = rule.find(TOKENS, POSITIONS, END)
    assert (found.tolist(), found.dtype) == (ends, torch.int32)


def test_documents_that_nothing_marks_are_refused():
    with pytest.raises(ValueError, match=r"no token for the end of a document.*add --reset-position-ids"):
        DocumentRule().find(TOKENS, POSITIONS, None)


def layer(**changes):
    """A layer of one rank."""
    causal = build_attention(ContextParallelConfig())
    return LayerAttention(causal, None, **{"mask_type": "causal", "scale": 0.3, **changes})


def packed(cu_seqlens, padded=None, **changes):
    """Megatron's PackedSeqParams of a stream."""
    ends, with_padding = (None if x is None else torch.tensor(x, dtype=torch.int32) for x in (cu_seqlens, padded))
    fields = {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends, "local_cp_size": None}
    fields |= {"cu_seqlens_q_padded": with_padding, "cu_seqlens_kv_padded": with_padding}
    return SimpleNamespace(**fields | changes)


def seen(documents, behind=None, ahead=0):
    """Who sees whom among tokens of these documents; None is without bound."""
    document, place = torch.tensor(documents), torch.arange(len(documents))
    distance = place[:, None] - place
    near = torch.ones_like(distance, dtype=torch.bool)
    near = near if behind is None else near & (distance <= behind)
    near = near if ahead is None else near & (-distance <= ahead)
    return near & (document[:, None] == document)


def tensors(samples=1):
    """Query, key and value of 6 tokens: [S, B, N, D]."""
    return torch.randn(3, 6, samples, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(whole, visible):
    """Dense attention, [S, B, N * D]. visible: [S, T] or [B, 1, S, T]."""
    dense = [x.permute(1, 2, 0, 3) for x in whole]
    out = dense_attention(*dense, torch.zeros_like(dense[0]), visible=visible, scale=0.3).out
    return out.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize(
    ("params", "changes", "visible"),
    [
        (packed([0, 2, 6]), {}, seen([0, 0, 1, 1, 1, 1])),
        # As Megatron's bins of reinforcement learning: filled up with documents of no tokens.
        (packed([0, 2, 6, 6, 6]), {}, seen([0, 0, 1, 1, 1, 1])),
        (packed([0, 2, 6]), {"window": (1, 0)}, seen([0, 0, 1, 1, 1, 1], behind=1)),
        (packed([0, 2, 6]), {"mask_type": "no_mask", "window": (1, 0)}, seen([0, 0, 1, 1, 1, 1], ahead=None)),
    ],
)
def test_packed_stream_attends_within_its_documents(params, changes, visible):
    out = layer(**changes)(*(x.squeeze(1) for x in tensors()), None, packed=params)
    torch.testing.assert_close(out, exact(tensors(), visible).squeeze(1), rtol=0, atol=1e-12)


def test_what_pads_a_document_is_not_seen_by_it_under_a_mask_that_looks_ahead():
    whole, params = tensors(), packed([0, 2, 5], [0, 3, 6])
    out = layer(mask_type="padding")(*(x.squeeze(1) for x in whole), None, packed=params)
    visible = seen([0, 0, 9, 1, 1, 1], ahead=None)
    text = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[text], exact(whole, visible).squeeze(1)[text], rtol=0, atol=1e-12)


def test_documents_in_the_mask_s_place_are_those_of_each_sample():
    documents = torch.tensor([[0, 3, 6, 6], [0, 1, 5, 6]], dtype=torch.int32)
    visible = torch.stack([seen([0, 0, 0, 1, 1, 1]), seen([0, 1, 1, 1, 1, 2])]).unsqueeze(1)
    out = layer(apart_by="--reset-attention-mask")(*tensors(samples=2), documents)
    torch.testing.assert_close(out, exact(tensors(samples=2), visible), rtol=0, atol=1e-12)


def test_window_without_documents_is_megatrons():
    out = layer(window=(2, 0))(*tensors(), None)
    torch.testing.assert_close(out, exact(tensors(), seen([0] * 6, behind=2)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            packed([0, 2, 5]),
            "cu_seqlens ends at 5, which gives rank 0 of 1 5 tokens, and 6 came; let the last document",
        ),
        (packed([0, 4, 2, 6]), r"cu_seqlens\[2\] = 2 comes after 4"),
        (packed([0, 6], qkv_format="sbhd"), "packed streams are 'thd', over all context-parallel ranks"),
        (packed([0, 6], local_cp_size=1), "documents with ranks of their own need --hybrid-context-parallel"),
        (packed([0, 6], cu_seqlens_kv=torch.tensor([0, 3, 6])), "has other cu_seqlens_q than cu_seqlens_kv"),
        (packed(None), "PackedSeqParams without cu_seqlens_q"),
        (packed([0, 2], [0, 3, 6]), "has 2 numbers in cu_seqlens_q and 3 in cu_seqlens_q_padded; give both"),
    ],
)
def test_stream_that_says_no_documents_is_refused(params, message):
    with pytest.raises(ValueError, match=message):
        layer()(*(x.squeeze(1) for x in tensors()), None, packed=params)


def test_document_of_more_tokens_than_its_padding_leaves_is_refused_where_that_is_seen():
    with pytest.raises(ValueError, match=r"document 0 has 4 tokens by cu_seqlens and 3 by cu_seqlens_padded"):
        layer(mask_type="padding")(*(x.squeeze(1) for x in tensors()), None, packed=packed([0, 4, 6], [0, 3, 6]))


def test_layer_that_is_not_told_its_documents_refuses():
    with pytest.raises(ValueError, match="--sft, and this layer was not told where documents end; import"):
        layer(apart_by="--sft")(*tensors(), None)


def test_stream_is_cut_by_the_rule_of_transformer_engine_where_that_has_one():
    batch = {"tokens": torch.arange(12)[None], "labels": None}
    Packing().cut(batch, torch.tensor([[0, 4, 12]]), rank=1, num_ranks=2)
    assert batch == {"tokens": batch["tokens"], "labels": None}
    assert batch["tokens"].tolist() == [[1, 2, 6, 7, 8, 9]]


def test_changed_ends_are_read_again():
    ends, packing = torch.tensor([0, 3, 6]), Packing()
    assert packing.ends(ends) == (0, 3, 6)
    ends[1] = 4
    assert packing.ends(ends) == (0, 4, 6)


@pytest.mark.parametrize("padded", [None, [0, 3, 6]])
def test_layers_of_any_mask_read_the_ends_of_a_stream_once(monkeypatch, padded):
    params, packing, read, tolist = (
        packed([0, 2, 6] if padded is None else [0, 2, 5], padded),
        Packing(),
        [],
        torch.Tensor.tolist,
    )
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(tensor) or tolist(tensor))
    for window in ((-1, 0), (-1, -1), (-1, 0), (-1, -1)):
        packing.plan(params, 6, 0, 1, window)
    assert len(read) == (1 if padded is None else 2), "each would have the host wait for a GPU"


def test_ends_made_in_inference_mode_are_read_though_they_do_not_say_that_they_changed():
    packing = Packing()
    with torch.inference_mode():
        ends = torch.tensor([0, 3, 6])
        assert packing.ends(ends) == (0, 3, 6)
        ends[1] = 4
        assert packing.ends(ends) == (0, 4, 6)


def test_sinks_are_a_score_without_a_value_in_each_head():
    whole, sinks = tensors(), torch.tensor([0.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    out = layer()(*whole, None, sinks=sinks.view(1, 4, 1, 1)).view(6, 4, 8)
    q, k, _ = (x.squeeze(1).transpose(0, 1) for x in whole)
    scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(~seen([0] * 6), -torch.inf)
    lse = scores.logsumexp(dim=2)
    kept = (lse - torch.logaddexp(lse, sinks[:, None])).exp().T
    vanilla = exact(whole, seen([0] * 6)).view(6, 4, 8)
    torch.testing.assert_close(out, vanilla * kept[..., None], rtol=0, atol=1e-12)
