"""Attention of a diffusion transformer over a mesh is attention over all tokens."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_cp.diffusion import (
    QKV,
    MeshAttention,
    MeshShape,
    ParallelMesh,
    Shares,
    gather,
    on_virtual_ranks,
    parallel_attention,
    split,
)

GRIDS = [
    MeshShape(ring=ring, ulysses=ulysses)
    for ring, ulysses in ((2, 1), (3, 1), (7, 1), (1, 2), (1, 4), (1, 8), (2, 2), (3, 2), (2, 4), (4, 2))
]
EVEN, UNEVEN = 16, 13


def whole(tokens: int, heads: int, kv_heads: int, seed: int = 0) -> QKV:
    """q, k and v of all tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, tokens, 4), (2, kv_heads, tokens, 4), (2, kv_heads, tokens, 6))
    return QKV(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes))


def dense(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def shared(mesh, x, dim=2):
    return split(x, mesh, dim)


@pytest.mark.parametrize("tokens", [UNEVEN, 3])
def test_attention_of_shares_is_attention_over_all_tokens(tokens):
    qkv = whole(tokens, heads=16, kv_heads=8)
    expected = dense(*qkv, scale=0.3)

    def attend(mesh):
        out = MeshAttention(mesh)(*(shared(mesh, x) for x in qkv), scale=0.3)
        return gather(out, Shares.of(tokens, mesh.shape.sequence), mesh, dim=2)

    for grid in GRIDS:
        for found in on_virtual_ranks(attend, grid):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda text, at=grid: f"{at}: {text}")


def test_heads_that_the_degree_does_not_divide_are_dealt_out_unevenly():
    qkv = whole(UNEVEN, heads=6, kv_heads=3)
    expected = dense(*qkv)

    def attend(mesh):
        out = MeshAttention(mesh)(*(shared(mesh, x) for x in qkv))
        return gather(out, Shares.of(UNEVEN, mesh.shape.sequence), mesh, dim=2)

    for grid in (MeshShape(ulysses=4), MeshShape(ring=2, ulysses=4)):
        for found in on_virtual_ranks(attend, grid):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text_is", ["replicated", "sharded"])
def test_joint_attention_sees_text_and_image_once(text_is):
    image, text = whole(UNEVEN, 4, 2), whole(5, 4, 2, seed=1)
    both = QKV(*(torch.cat(pair, dim=2) for pair in zip(image, text, strict=True)))
    expected = dense(*both).split([UNEVEN, 5], dim=2)

    def attend(mesh):
        share = [shared(mesh, x).transpose(1, 2) for x in image]
        words = [(x if text_is == "replicated" else shared(mesh, x)).transpose(1, 2) for x in text]
        out, out_text = MeshAttention(mesh).joint(QKV(*share), QKV(*words), text_is=text_is, dims="BSND")
        if text_is == "sharded":
            out_text = gather(out_text, Shares.of(5, mesh.shape.sequence), mesh, dim=1)
        out = gather(out, Shares.of(UNEVEN, mesh.shape.sequence), mesh, dim=1)
        return out.transpose(1, 2), out_text.transpose(1, 2)

    for grid in (MeshShape(ring=3), MeshShape(ring=2, ulysses=2)):
        for found in on_virtual_ranks(attend, grid):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_attention_over_all_tokens():
    qkv = whole(EVEN, 4, 2)
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = torch.autograd.grad(dense(*leaves).square().sum(), leaves)

    def attend(mesh):
        share = [shared(mesh, x).clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(MeshAttention(mesh)(*share).square().sum(), share)

    found = zip(*on_virtual_ranks(attend, MeshShape(ring=2, ulysses=2)), strict=True)
    for grad, parts in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), grad, rtol=0, atol=1e-12)


def test_bytes_are_those_of_the_formulas():
    """Ring: K/V to the next, P - 1 times. Ulysses: (U - 1) / U of q, k, v and out. Replicated text: its output."""
    heads, kv_heads, tokens, text = 4, 2, 24, 8
    image, words = whole(tokens, heads, kv_heads), whole(text, heads, kv_heads)

    def sent(mesh):
        attention = MeshAttention(mesh)
        shares = Shares.of(tokens, mesh.shape.sequence)
        with torch.no_grad():
            attention(*(shared(mesh, x) for x in image), shares=shares)
        counted = {axis: sum(mesh.traffic[axis].bytes_sent.values()) for axis in ("ring", "ulysses")}
        mesh.traffic["ring"].clear()
        with torch.no_grad():
            attention.joint(QKV(*(shared(mesh, x) for x in image)), QKV(*words))
        return counted, mesh.traffic["ring"].bytes_sent["exchange"]

    # A token's bytes: batch 2, keys of 4 and values of 6 numbers a head, 8 bytes a number.
    kv, q, out = 2 * kv_heads * (4 + 6) * 8, 2 * heads * 4 * 8, 2 * heads * 6 * 8
    for ring, ulysses in ((4, 1), (2, 2), (1, 2)):
        for counted, joint in on_virtual_ranks(sent, MeshShape(ring=ring, ulysses=ulysses)):
            share = tokens // (ring * ulysses)
            assert counted == {
                "ring": (ring - 1) * share * kv,
                "ulysses": (ulysses - 1) * share * (q + kv + out) // ulysses,
            }
            if ulysses == 1:
                assert joint == (ring - 1) * ((share + text // ring) * kv + text // ring * out)


def test_cross_attention_of_keys_that_all_ranks_have_sends_nothing():
    q, k, v = whole(UNEVEN, 4, 4)
    k, v = k[:, :, :7], v[:, :, :7]
    visible = torch.arange(7) < torch.tensor([5, 7])[:, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None])

    class Cross(torch.nn.Module):
        def forward(self, q):
            own = F.scaled_dot_product_attention(q, q, q)
            return own, F.scaled_dot_product_attention(q, key=k, value=v, attn_mask=visible[:, None, None])

    def attend(mesh):
        module, shares = Cross(), Shares.of(UNEVEN, mesh.shape.sequence)
        with parallel_attention(module, mesh), torch.no_grad():
            module(shared(mesh, q))
            first = mesh.traffic["ring"].calls["all_gather"]
            own, out = module(shared(mesh, q))
        calls = dict(mesh.traffic["ring"].calls)
        alone = module(q)
        return gather(out, shares, mesh, 2), gather(own, shares, mesh, 2), alone[0], calls["all_gather"] - first

    for out, own, alone, asked in on_virtual_ranks(attend, MeshShape(ring=3)):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-12)
        assert asked == 1, "later passes ask for nothing but the shapes"


class Attends(torch.nn.Module):
    """Attends as it is told."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, q):
        return self.how(q)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (lambda q: q @ q.mT @ q, "Attends has not called torch's scaled_dot_product_attention"),
        (
            lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
            "is given is_causal=True, and there all see",
        ),
        (lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), "is given dropout_p=0.5, and there all see"),
        (
            lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(1, 1, dtype=torch.bool)),
            "is given a mask, and there all see all",
        ),
        (
            lambda q: F.scaled_dot_product_attention(q, q[:, :, 1:], q[:, :, 1:]),
            r"attention of \(4, 4\) queries by rank over \(3, 3\) keys, which are not the same on all ranks",
        ),
    ],
    ids=["unreached", "causal", "dropout", "mask", "other keys"],
)
def test_attention_that_cannot_run_over_the_mesh_is_refused(how, sentence):
    q = whole(8, 2, 2).q

    def attend(mesh):
        module = Attends(how)
        with parallel_attention(module, mesh):
            module(shared(mesh, q))

    with pytest.raises(ValueError, match=sentence):
        on_virtual_ranks(attend, MeshShape(ring=2))


def test_attention_is_torchs_own_after_the_block():
    module, q = Attends(lambda q: F.scaled_dot_product_attention(q, q, q)), whole(8, 2, 2).q
    with pytest.raises(KeyError), parallel_attention(module, ParallelMesh()):
        raise KeyError
    assert "forward" not in vars(module)
    torch.testing.assert_close(module(q), F.scaled_dot_product_attention(q, q, q), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "options", "sentence"),
    [
        (
            3,
            3,
            {},
            r"ulysses=4 is more than the 3 query heads of a rank \(tp=1\), .*; use ulysses=2, ring=2 or ulysses=1, ri",
        ),
        (4, 4, {"shares": Shares((3, 3, 3, 3))}, r"shares of \(3, 3, 3, 3\) tokens and q of 2"),
        (4, 4, {"dims": "SBHD"}, "dims='SBHD' is no order of dims; use BNSD or BSND"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_way_out(heads, kv_heads, options, sentence):
    qkv = whole(8, heads, kv_heads)
    with pytest.raises(ValueError, match=sentence):
        on_virtual_ranks(
            lambda mesh: MeshAttention(mesh)(*(shared(mesh, x) for x in qkv), **options), MeshShape(ulysses=4)
        )
