"""The emulated NPU ops against the dense oracle, what they refuse, and the mistakes that they let show.

Shapes as in dense.py. Inputs are fp32; the oracle computes in fp64.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unit_tests.dense import Result, dense_attention
from unit_tests.emulated_npu import fake_torch_npu

HEADS, KV_HEADS, HEAD_SIZE, VALUE_HEAD_SIZE = 4, 2, 8, 4
SCALE = 0.3
FLT_MAX = torch.finfo(torch.float32).max
COMPRESSED = torch.ones(2048, 2048).triu(1).bool()
COMPRESSED_PREFIX = torch.cat([COMPRESSED, torch.arange(2048).expand(1024, 2048) >= 1024])


@pytest.fixture(autouse=True, scope="module")
def torch_npu() -> Iterator[None]:
    with fake_torch_npu():
        yield


class Inputs(NamedTuple):
    """[B, N, S, D], [B, G, T, D], [B, G, T, V] and [B, N, S, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


def inputs(queries: int = 5, keys: int = 7, batch: int = 2, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Inputs:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [
        (batch, heads, queries, HEAD_SIZE),
        (batch, kv_heads, keys, HEAD_SIZE),
        (batch, kv_heads, keys, VALUE_HEAD_SIZE),
        (batch, heads, queries, VALUE_HEAD_SIZE),
    ]
    return Inputs(*(torch.randn(shape, generator=generator) for shape in shapes))


def dense(tensors: Inputs, visible: Tensor | None = None, scale: float = SCALE) -> Result:
    return dense_attention(*(x.double() for x in tensors), visible=visible, scale=scale)


def to_layout(x: Tensor, layout: str) -> Tensor:
    """[B, N, S, D] in the memory of `layout`, one of the batched ones."""
    return {
        "BNSD": lambda: x.clone(),
        "BSND": lambda: x.transpose(1, 2).contiguous(),
        "BSH": lambda: x.transpose(1, 2).flatten(2),
        "SBH": lambda: x.permute(2, 0, 1, 3).flatten(2),
    }[layout]()


def from_layout(x: Tensor, layout: str, heads: int) -> Tensor:
    """The inverse of `to_layout`."""
    return {
        "BNSD": lambda: x,
        "BSND": lambda: x.transpose(1, 2),
        "BSH": lambda: x.unflatten(2, (heads, -1)).transpose(1, 2),
        "SBH": lambda: x.unflatten(2, (heads, -1)).permute(1, 2, 0, 3),
    }[layout]()


def attend(q: Tensor, k: Tensor, v: Tensor, layout: str = "BNSD", *, heads: int = HEADS, **settings: object) -> tuple:
    """out, softmax_max and softmax_sum."""
    return torch.ops.npu.npu_fusion_attention(q, k, v, heads, layout, **{"scale": SCALE} | settings)[:3]


def gradients(
    tensors: tuple[Tensor, ...],
    out: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    layout: str = "BNSD",
    *,
    heads: int = HEADS,
    **settings: object,
) -> tuple[Tensor, ...]:
    """dq, dk and dv. tensors: q, k, v and dout."""
    saved = {"softmax_max": softmax_max, "softmax_sum": softmax_sum, "attention_in": out}
    settings = {"scale_value": SCALE} | saved | settings
    return torch.ops.npu.npu_fusion_attention_grad(*tensors, heads, layout, **settings)[:3]


def eightfold(x: Tensor) -> Tensor:
    """A number for each row as the ops want it: contiguous, eight times on a last dim."""
    return x.float().unsqueeze(-1).expand(*x.shape, 8).contiguous()


def assert_near(exact: Tensor, actual: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5)


def is_near(exact: Tensor, actual: Tensor) -> bool:
    """Much laxer than `assert_near`: for twin tests, which show that a mistake is seen."""
    return torch.allclose(actual.double(), exact, rtol=0, atol=1e-2)


# Which keys a query sees. Drawn: a row a query, `#` for each key that it sees.


@dataclass(frozen=True)
class Drawn:
    """A drawing and the settings that mean it. mask: whether atten_mask is the drawing's own."""

    drawing: str
    settings: dict = field(default_factory=dict)
    mask: bool = False

    @property
    def visible(self) -> Tensor:
        return torch.tensor([[pair == "#" for pair in row] for row in self.drawing.split()])

    @property
    def arguments(self) -> dict[str, object]:
        return self.settings | ({"atten_mask": ~self.visible} if self.mask else {})


def compressed(mode: int, **settings: object) -> dict[str, object]:
    return {"sparse_mode": mode, "atten_mask": COMPRESSED_PREFIX if mode == 6 else COMPRESSED} | settings


DRAWN = {
    "no mask": Drawn("##### #####"),
    "no mask, window ignored": Drawn("##### #####", {"pre_tockens": 1, "next_tockens": 0}),
    "mode 0, own mask": Drawn("#..#. .##.. ####.", mask=True),
    "mode 0, own mask within a window": Drawn("##... ###.. .#.#.", {"pre_tockens": 1, "next_tockens": 1}, mask=True),
    "mode 0, dead rows": Drawn("#..#. ..... ####.", {"inner_precise": 2}, mask=True),
    "mode 0, dead rows of a window": Drawn("..... #.... ##...", {"next_tockens": -1}, mask=True),
    "mode 0, dead row behind a window": Drawn("## ## .# ..", {"pre_tockens": 1}, mask=True),
    "mode 1, own mask": Drawn("#..#. .##.. ####.", {"sparse_mode": 1}, mask=True),
    "mode 1, window ignored": Drawn("....# .##..", {"sparse_mode": 1, "next_tockens": 0}, mask=True),
    "mode 1, dead rows": Drawn("..... #..#.", {"sparse_mode": 1, "inner_precise": 2}, mask=True),
    "mode 2, S < T": Drawn("#.... ##... ###..", compressed(2)),
    "mode 2, S > T": Drawn("#. ## ## ##", compressed(2)),
    "mode 3, S < T": Drawn("###.. ####. #####", compressed(3)),
    "mode 3, S = T": Drawn("#.. ##. ###", compressed(3, pre_tockens=0, next_tockens=9)),
    "mode 3, S > T, dead rows": Drawn(".. .. #. ##", compressed(3)),
    "mode 4, one before and the own": Drawn(".##.. ..##. ...##", compressed(4, pre_tockens=1, next_tockens=0)),
    "mode 4, open to the left": Drawn("####. ##### #####", compressed(4, next_tockens=1)),
    "mode 4, before the own": Drawn(".... #... ##.. .##.", compressed(4, pre_tockens=2, next_tockens=-1)),
    "mode 4, behind the own": Drawn(".##. ..## ...# ....", compressed(4, pre_tockens=-1, next_tockens=2)),
    "mode 5": Drawn("###.. ###.. ####. #####", {"sparse_mode": 5, "prefix": [3]}, mask=True),
    "mode 5, dead row": Drawn("... #.. ##. ###", {"sparse_mode": 5, "prefix": [0]}, mask=True),
    "mode 6": Drawn("###.. ###.. ####. #####", compressed(6, prefix=[3])),
    "mode 6, dead row": Drawn("... #.. ##. ###", compressed(6, prefix=[0])),
}


def with_prefixes(case: Drawn, batch: int) -> dict[str, object]:
    """The arguments of a case for a batch: modes 5 and 6 want a prefix for each entry, and mode 5 a mask as well."""
    arguments = dict(case.arguments)
    if "prefix" in arguments:
        arguments["prefix"] = arguments["prefix"] * batch
    if arguments.get("sparse_mode") == 5:
        arguments["atten_mask"] = arguments["atten_mask"].expand(batch, 1, *case.visible.shape)
    return arguments


@pytest.mark.parametrize("name", DRAWN)
def test_a_query_sees_the_keys_that_the_drawing_shows(name):
    """With scores of 0 and values that are unit vectors, out is 1/n at each of the n keys that a row sees."""
    case = DRAWN[name]
    num_queries, num_keys = case.visible.shape
    units = torch.eye(num_keys)[None, None]
    q = torch.zeros(1, 1, num_queries, num_keys)
    out, softmax_max, softmax_sum = attend(q, units, units, heads=1, **with_prefixes(case, 1))
    seen = case.visible.sum(dim=1, keepdim=True)
    assert torch.equal(out[0, 0], case.visible / seen.clamp(min=1))
    assert torch.equal(softmax_sum[0, 0, :, :1], torch.where(seen > 0, seen.float(), FLT_MAX))
    assert torch.equal(softmax_max[0, 0, :, :1], torch.where(seen > 0, 0.0, -FLT_MAX))


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_batched_layouts_are_dense_attention(layout, name):
    case = DRAWN[name]
    tensors = inputs(*case.visible.shape)
    arguments = with_prefixes(case, 2)
    memory = [to_layout(x, layout) for x in tensors]
    copies = [x.clone() for x in memory]
    out, softmax_max, softmax_sum = attend(*memory[:3], layout, **arguments)
    dq, dk, dv = gradients(memory, out, softmax_max, softmax_sum, layout, **arguments)

    assert all(torch.equal(x, copy) for x, copy in zip(memory, copies, strict=True)), "inputs were changed"
    exact = dense(tensors, case.visible)
    assert_near(exact.out, from_layout(out, layout, HEADS))
    lse = (softmax_max + softmax_sum.log())[..., 0]
    dead = exact.lse == -torch.inf
    assert_near(exact.lse.masked_fill(dead, -FLT_MAX), lse)
    assert_near(exact.dq, from_layout(dq, layout, HEADS))
    assert_near(exact.dk, from_layout(dk, layout, KV_HEADS))
    assert_near(exact.dv, from_layout(dv, layout, KV_HEADS))


@pytest.mark.parametrize("shape", [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (2, HEADS, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("mode", [0, 1])
def test_full_masks_may_differ_in_each_batch_entry_and_head(mode, dtype, shape):
    tensors = inputs()
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[..., 0] = True
    settings = {"sparse_mode": mode, "atten_mask": (~visible).to(dtype)}
    results = attend(*tensors[:3], **settings)
    exact = dense(tensors, visible)
    for name, actual in zip(("dq", "dk", "dv"), gradients(tensors, *results, **settings), strict=True):
        assert_near(getattr(exact, name), actual)
    assert_near(exact.out, results[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_in_a_row_share_a_key_head(kv_heads):
    tensors = inputs(kv_heads=kv_heads)
    results = attend(*tensors[:3])
    exact = dense(tensors)
    assert_near(exact.out, results[0])
    for name, actual in zip(("dq", "dk", "dv"), gradients(tensors, *results), strict=True):
        assert_near(getattr(exact, name), actual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_have_the_dtype_of_query_and_statistics_are_fp32(dtype):
    tensors = Inputs(*(x.to(dtype) for x in inputs()))
    out, softmax_max, softmax_sum = attend(*tensors[:3])
    assert [x.dtype for x in gradients(tensors, out, softmax_max, softmax_sum)] == [dtype] * 3
    assert (out.dtype, softmax_max.dtype, softmax_sum.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(out.double(), dense(tensors).out, rtol=0, atol=2e-2)


class Attention(torch.autograd.Function):
    """The way in which the ops are to be differentiated."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        results = attend(q, k, v)
        ctx.save_for_backward(q, k, v, *results)
        return results[0]

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *results = ctx.saved_tensors
        return gradients((q, k, v, dout), *results)


def test_autograd_function_may_call_the_ops_on_tensors_that_want_gradients():
    tensors = inputs()
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    Attention.apply(*leaves).backward(tensors.dout)
    exact = dense(tensors)
    for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True):
        assert_near(getattr(exact, name), leaf.grad)


# Packed sequences (layout TND).

QUERIES, KEYS = [3, 0, 5, 1], [4, 2, 5, 3]
PACKED = {
    "no mask": {},
    "mode 0": {"atten_mask": torch.ones(5, 5).triu(2).bool()},
    "mode 1": {"atten_mask": torch.ones(5, 5).triu(1).bool(), "sparse_mode": 1},
    "mode 2": compressed(2),
    "mode 3": compressed(3),
    "mode 4": compressed(4, pre_tockens=1, next_tockens=0),
    "mode 6": compressed(6, prefix=[2, 2, 1, 3]),
}


def packed_visible(name: str, index: int) -> Tensor:
    """[S, T] of a sequence."""
    num_queries, num_keys = QUERIES[index], KEYS[index]
    ones, off = torch.ones(num_queries, num_keys, dtype=torch.bool), num_keys - num_queries
    if name == "mode 6":
        prefix = torch.arange(num_keys) < PACKED[name]["prefix"][index]
        return ones.tril(off) | prefix
    return {
        "no mask": ones,
        "mode 0": ones.tril(1),
        "mode 1": ones.tril(),
        "mode 2": ones.tril(),
        "mode 3": ones.tril(off),
        "mode 4": ones.tril(off) & ones.triu(off - 1),
    }[name]


def packed_inputs() -> tuple[list[Inputs], list[Tensor]]:
    """Each sequence as a batch of one, and all of them packed: [T, N, D]."""
    sequences = [inputs(*lengths, batch=1) for lengths in zip(QUERIES, KEYS, strict=True)]
    return sequences, [pack(list(each)) for each in zip(*sequences, strict=True)]


def pack(sequences: list[Tensor]) -> Tensor:
    """Sequences [1, N, S, D] as [T, N, D]."""
    return torch.cat([x[0].transpose(0, 1) for x in sequences])


def ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths))


def lengths_of(queries: list[int] = QUERIES, keys: list[int] = KEYS) -> dict[str, list[int]]:
    return {"actual_seq_qlen": ends(queries), "actual_seq_kvlen": ends(keys)}


def packed_statistics(statistics: Tensor, softmax_layout: str) -> Tensor:
    """[T, N] of softmax_max or softmax_sum, out of either memory layout."""
    if softmax_layout == "TND":
        return statistics[..., 0]
    numbers = statistics.flatten().split([HEADS * length * 8 for length in QUERIES])
    pairs = zip(numbers, QUERIES, strict=True)
    return torch.cat([block.reshape(HEADS, length, 8)[..., 0].t() for block, length in pairs])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_packed_sequences_are_dense_attention_of_each(softmax_layout, name):
    sequences, memory = packed_inputs()
    settings = PACKED[name] | lengths_of() | {"softmax_layout": softmax_layout}
    out, softmax_max, softmax_sum = attend(*memory[:3], "TND", **settings)
    exact = [dense(tensors, packed_visible(name, index)) for index, tensors in enumerate(sequences)]
    assert_near(pack([each.out for each in exact]), out)
    assert softmax_max.shape == softmax_sum.shape == (sum(QUERIES), HEADS, 8)
    lse = packed_statistics(softmax_max, softmax_layout) + packed_statistics(softmax_sum, softmax_layout).log()
    assert_near(torch.cat([each.lse[0].t() for each in exact]), lse)
    actual = gradients(memory, out, softmax_max, softmax_sum, "TND", **settings)
    for gradient, packed in zip(("dq", "dk", "dv"), actual, strict=True):
        assert_near(pack([getattr(each, gradient) for each in exact]), packed)


def test_packed_statistics_read_as_their_shape_says_are_wrong_by_default():
    _, memory = packed_inputs()
    by_default, by_token = (
        attend(*memory[:3], "TND", softmax_layout=layout, **lengths_of())[1] for layout in ("", "TND")
    )
    assert not is_near(packed_statistics(by_token, "TND").double(), by_default[..., 0])


def test_packed_gradient_with_the_other_statistics_layout_is_wrong():
    _, memory = packed_inputs()
    results = attend(*memory[:3], "TND", softmax_layout="TND", **lengths_of())
    right = gradients(memory, *results, "TND", softmax_layout="TND", **lengths_of())
    wrong = gradients(memory, *results, "TND", **lengths_of())
    assert not any(is_near(x.double(), y) for x, y in zip(right, wrong, strict=True))


def test_default_statistics_of_one_packed_sequence_are_head_major():
    tensors = inputs(batch=1)
    memory = [pack([x]) for x in tensors]
    _, softmax_max, softmax_sum = attend(*memory[:3], "TND", **lengths_of([5], [7]))
    lse = (softmax_max + softmax_sum.log()).view(HEADS, 5, 8)[..., 0]
    assert_near(dense(tensors).lse[0], lse)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [([0, 3, 3, 8, 9], [0, 4, 6, 11, 14]), ([3, 3, 8, 9, 0, 0], [4, 6, 11, 14, 0, 0])],
    ids=["a leading 0 is an empty sequence", "zeros at the end are none"],
)
def test_lists_of_sequences_may_begin_and_end_with_zeros(queries, keys):
    _, memory = packed_inputs()
    settings = {"actual_seq_qlen": queries, "actual_seq_kvlen": keys}
    results, plain = attend(*memory[:3], "TND", **settings), attend(*memory[:3], "TND", **lengths_of())
    assert all(torch.equal(x, y) for x, y in zip(results, plain, strict=True))
    both = gradients(memory, *results, "TND", **settings), gradients(memory, *plain, "TND", **lengths_of())
    assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_rows_behind_the_last_sequence_have_no_gradient(softmax_layout):
    _, memory = packed_inputs()
    settings = {"softmax_layout": softmax_layout, **lengths_of()}
    results = attend(*memory[:3], "TND", **settings)
    exact = gradients(memory, *results, "TND", **settings)
    longer, saved = ([torch.cat([x, torch.ones_like(x[:2])]) for x in group] for group in (memory, results))
    for without, actual in zip(exact, gradients(longer, *saved, "TND", **settings), strict=True):
        assert torch.equal(actual, torch.cat([without, torch.zeros_like(without[:2])]))


def test_numels_counts_the_scores():
    tensors = inputs()
    assert torch.ops.npu.npu_fusion_attention(*tensors[:3], HEADS, "BNSD")[4:] == (0, 0, 2 * HEADS * 5 * 7)
    _, memory = packed_inputs()
    results = torch.ops.npu.npu_fusion_attention(*memory[:3], HEADS, "TND", **lengths_of())
    assert results[4:] == (0, 0, HEADS * (3 * 4 + 0 * 2 + 5 * 5 + 1 * 3))


# Mistakes that show as wrong numbers.


def test_scale_is_one_unless_passed():
    tensors = inputs()
    out, softmax_max, softmax_sum = torch.ops.npu.npu_fusion_attention(*tensors[:3], HEADS, "BNSD")[:3]
    exact = dense(tensors, scale=1.0)
    assert_near(exact.out, out)
    assert not is_near(dense(tensors, scale=HEAD_SIZE**-0.5).out, out)
    saved = {"softmax_max": softmax_max, "softmax_sum": softmax_sum, "attention_in": out}
    dq, *_ = torch.ops.npu.npu_fusion_attention_grad(*tensors, HEADS, "BNSD", **saved)
    assert_near(exact.dq, dq)


def test_gradient_with_another_scale_is_wrong():
    tensors = inputs()
    results = attend(*tensors[:3])
    exact = dense(tensors)
    for name, actual in zip(("dq", "dk", "dv"), gradients(tensors, *results, scale_value=1.0), strict=True):
        assert not is_near(getattr(exact, name), actual)


@pytest.mark.parametrize("mode", [0, 1])
def test_mask_that_is_true_where_a_query_sees_is_wrong(mode):
    tensors, visible = inputs(), torch.tensor([True, False] * 4)[:7].expand(5, 7)
    exact = dense(tensors, visible)
    assert_near(exact.out, attend(*tensors[:3], sparse_mode=mode, atten_mask=~visible)[0])
    assert not is_near(exact.out, attend(*tensors[:3], sparse_mode=mode, atten_mask=visible.contiguous())[0])


class Block(NamedTuple):
    """Some keys, and the settings with which a block of them is computed."""

    keys: slice
    settings: dict[str, object]


RING = [
    Block(slice(0, 6), {}),
    Block(slice(6, 12), compressed(3)),
    Block(slice(12, 15), {"atten_mask": torch.ones(6, 3, dtype=torch.bool), "sparse_mode": 1, "inner_precise": 2}),
    Block(slice(15, 19), {"atten_mask": torch.arange(4).expand(6, 4) != 1, "sparse_mode": 1}),
]
"""Six queries: an earlier rank's keys, the own, some that nobody sees, and some of which all see one."""


def ring_visible() -> Tensor:
    parts = [torch.ones(6, 6), torch.ones(6, 6).tril(), torch.zeros(6, 3), (torch.arange(4).expand(6, 4) == 1)]
    return torch.cat([part.bool() for part in parts], dim=1)


def ring_gradients(tensors: Inputs, out: Tensor, softmax_max: Tensor, softmax_sum: Tensor) -> list[Tensor]:
    """dq, dk and dv added up over the blocks, with the statistics of whole rows."""
    q, k, v, dout = tensors
    parts = [
        gradients((q, k[:, :, block.keys], v[:, :, block.keys], dout), out, softmax_max, softmax_sum, **block.settings)
        for block in RING
    ]
    dq, dk, dv = zip(*parts, strict=True)
    return [sum(dq), torch.cat(dk, dim=2), torch.cat(dv, dim=2)]


@pytest.mark.parametrize("statistics", ["lse and 1", "max and sum"])
def test_gradients_of_blocks_add_up_with_out_and_statistics_of_whole_rows(statistics):
    tensors = inputs(6, 19)
    exact = dense(tensors, ring_visible())
    softmax_max = torch.zeros_like(exact.lse) + (exact.lse if statistics == "lse and 1" else 2.0)
    softmax_sum = torch.exp(exact.lse - softmax_max)
    total = ring_gradients(tensors, exact.out.float(), eightfold(softmax_max), eightfold(softmax_sum))
    for name, actual in zip(("dq", "dk", "dv"), total, strict=True):
        assert_near(getattr(exact, name), actual)


def test_gradient_with_statistics_of_the_block_alone_is_wrong():
    tensors = inputs(6, 19)
    exact = dense(tensors, ring_visible())
    block = RING[1]
    q, k, v, dout = tensors._replace(k=tensors.k[:, :, block.keys], v=tensors.v[:, :, block.keys])
    _, softmax_max, softmax_sum = attend(q, k, v, **block.settings)
    _, dk, dv = gradients((q, k, v, dout), exact.out.float(), softmax_max, softmax_sum, **block.settings)
    assert not is_near(exact.dk[:, :, block.keys], dk)
    assert not is_near(exact.dv[:, :, block.keys], dv)


def test_gradient_with_the_out_of_the_block_alone_is_wrong():
    tensors = inputs(6, 19)
    exact = dense(tensors, ring_visible())
    block = RING[1]
    q, k, v, dout = tensors._replace(k=tensors.k[:, :, block.keys], v=tensors.v[:, :, block.keys])
    out, *_ = attend(q, k, v, **block.settings)
    lse, ones = eightfold(exact.lse), eightfold(torch.ones_like(exact.lse))
    assert not is_near(exact.dk[:, :, block.keys], gradients((q, k, v, dout), out, lse, ones, **block.settings)[1])


# Rows that see nothing.

DEAD = Drawn("#..#. ..... ####.", {"sparse_mode": 1, "inner_precise": 2}, mask=True)
"""The middle one of three rows is dead."""


@pytest.mark.parametrize(
    ("lse", "right"), [(0.0, True), (5.0, True), (-FLT_MAX, False), (-torch.inf, False)], ids=lambda value: str(value)
)
def test_gradient_of_dead_rows_is_zero_only_with_a_finite_lse_far_above_the_mask(lse, right):
    tensors = inputs(3, 5)
    exact = dense(tensors, DEAD.visible)
    lse = exact.lse.masked_fill(exact.lse == -torch.inf, lse)
    actual = gradients(tensors, exact.out.float(), eightfold(lse), eightfold(torch.ones_like(lse)), **DEAD.arguments)
    for name, value in zip(("dk", "dv"), actual[1:], strict=True):
        assert is_near(getattr(exact, name), value) is right


def merged(*parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Partial results [B, N, S, D] and [B, N, S, 8], merged from left to right."""
    first, *others = ((to_layout(out, "SBH"), *statistics) for out, *statistics in parts)
    for other in others:
        first = torch.ops.npu.npu_ring_attention_update(*first, *other)
    out, *statistics = first
    return from_layout(out, "SBH", HEADS), *statistics


def parts_of_ring(tensors: Inputs) -> list[tuple[Tensor, ...]]:
    q, k, v, _ = tensors
    return [attend(q, k[:, :, block.keys], v[:, :, block.keys], **block.settings) for block in RING]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_update_in_any_order_is_dense_attention_with_at_most_one_dead_part(order):
    tensors = inputs(6, 19)
    exact = dense(tensors, ring_visible())
    parts = parts_of_ring(tensors)
    out, softmax_max, softmax_sum = merged(*(parts[index] for index in order))
    assert_near(exact.out, out)
    assert_near(exact.lse, (softmax_max + softmax_sum.log())[..., 0])


def test_update_of_two_dead_parts_has_an_infinite_sum_and_poisons_what_follows():
    live, _, dead, _ = parts_of_ring(inputs(6, 19))
    out, softmax_max, softmax_sum = merged(dead, dead)
    assert (out == 0).all()
    assert (softmax_max == -FLT_MAX).all()
    assert (softmax_sum == torch.inf).all()
    assert merged(dead, dead, live)[0].isnan().all()
    assert torch.equal(merged(dead, live, dead)[0], live[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softmax_layout", ["", "TND"])
def test_update_of_packed_sequences_follows_the_layout_of_the_statistics(softmax_layout, dtype):
    lengths, heads = [3, 0, 4], 2
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(rows, heads, 64, generator=generator).to(dtype) for rows in (7, 12, 12))
    halves = [[slice(0, 2), slice(2, 4), slice(4, 8)], [slice(8, 9), slice(9, 10), slice(10, 12)]]
    all_keys = [torch.cat([torch.arange(12)[rows] for rows in pair]) for pair in zip(*halves, strict=True)]

    def attend_to(keys: list[Tensor]) -> tuple[Tensor, ...]:
        settings = lengths_of(lengths, [len(each) for each in keys]) | {"softmax_layout": softmax_layout}
        return attend(q, k[torch.cat(keys)], v[torch.cat(keys)], "TND", heads=heads, **settings)

    parts = [attend_to([torch.arange(12)[rows] for rows in half]) for half in halves]
    results = torch.ops.npu.npu_ring_attention_update(
        *itertools.chain(*parts),
        actual_seq_qlen=torch.tensor([0, *ends(lengths)]),
        input_layout="TND",
        input_softmax_layout=softmax_layout,
    )
    whole = attend_to(all_keys)
    assert [x.dtype for x in results] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(results[0], whole[0], rtol=0, atol=1e-6 if dtype is torch.float32 else 2e-2)
    torch.testing.assert_close(results[1:], whole[1:], rtol=1e-5, atol=0)


# Refusals.


def batched_call() -> dict[str, object]:
    q, k, v, _ = inputs()
    return {"query": q, "key": k, "value": v, "head_num": HEADS, "input_layout": "BNSD"}


def flat_call() -> dict[str, object]:
    q, k, v, _ = (to_layout(x, "BSH") for x in inputs())
    return batched_call() | {"query": q, "key": k, "value": v, "input_layout": "BSH"}


def packed_call() -> dict[str, object]:
    q, k, v, _ = packed_inputs()[1]
    return {"query": q, "key": k, "value": v, "head_num": HEADS, "input_layout": "TND", **lengths_of()}


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def masked_row(queries: int, keys: int) -> Tensor:
    """A mask that hides all from the second row."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    mask[1] = True
    return mask


REFUSED = [
    # Sizes.
    (batched_call, {"head_num": 0}, "head_num 0 must be above 0"),
    (batched_call, {"head_num": KV_HEADS}, "head_num 2 is not query's N"),
    (batched_call, {"input_layout": "bnsd"}, "unknown input_layout 'bnsd'"),
    (packed_call, {"input_layout": "tnd"}, "unknown input_layout 'tnd'"),
    (batched_call, {"query": ones(5, 8)}, "expected 4 dims each"),
    (batched_call, {"input_layout": "SBH"}, "expected 3 dims each"),
    (batched_call, {"query": ones(2, 4, 0, 8)}, "empty tensors are undefined"),
    (batched_call, {"query": ones(3, 4, 5, 8)}, "one batch size expected"),
    (batched_call, {"query": ones(2, 4, 5, 16)}, "query and key must have one head size"),
    (batched_call, {"value": ones(2, 2, 7, 9)}, "value's head size 9 exceeds key's 8"),
    (batched_call, {"value": ones(2, 2, 6, 8)}, "key and value may differ in head size only"),
    (batched_call, {"value": ones(2, 1, 7, 8)}, "key and value may differ in head size only"),
    (batched_call, {"key": ones(2, 3, 7, 8), "value": ones(2, 3, 7, 8)}, "3 K/V heads must divide head_num 4"),
    (batched_call, {"query": ones(2, 257, 5, 8), "head_num": 257}, "head_num 257 is above 256"),
    (
        batched_call,
        {"query": ones(2, 4, 5, 769), "key": ones(2, 2, 7, 769), "value": ones(2, 2, 7, 8)},
        "head size 769 is above 768",
    ),
    (flat_call, {"head_num": 3}, "head_num 3 must divide H of query"),
    (flat_call, {"key": ones(2, 7, 12)}, "H of key is no multiple of query's head size 8"),
    (flat_call, {"value": ones(2, 7, 7)}, "key's 2 heads must divide H of value"),
    # Dtypes and settings.
    (batched_call, {"query": inputs().q.half()}, "query, key and value differ in dtype"),
    (batched_call, dict(zip(("query", "key", "value"), (x.double() for x in inputs()[:3]), strict=True)), "use fp16"),
    (batched_call, {"query": inputs().q.requires_grad_()}, "call it in an autograd.Function"),
    (batched_call, {"keep_prob": 0.0}, "keep_prob 0.0 is not in (0, 1]"),
    (batched_call, {"keep_prob": 1.5}, "keep_prob 1.5 is not in (0, 1]"),
    (batched_call, {"keep_prob": 0.9}, "dropout is not emulated"),
    (batched_call, {"pse": ones(2, 4, 5, 7)}, "pse is not emulated"),
    (batched_call, {"sink": ones(4)}, "sink is not emulated"),
    (batched_call, {"padding_mask": ones(2, 7)}, "padding_mask is not emulated"),
    (batched_call, {"inner_precise": 1}, "inner_precise 1: use 0, or 2"),
    (batched_call, {"softmax_layout": "TND"}, "softmax_layout 'TND' is for input_layout TND, not BNSD"),
    (packed_call, {"softmax_layout": "NTD"}, "softmax_layout 'NTD' is neither '' nor 'TND'"),
    # Lists of sequences.
    (batched_call, lengths_of(), "belong to layout TND, not to BNSD"),
    (packed_call, {"actual_seq_qlen": None}, "needs actual_seq_qlen and actual_seq_kvlen"),
    (packed_call, {"actual_seq_kvlen": None}, "needs actual_seq_qlen and actual_seq_kvlen"),
    (packed_call, {"actual_seq_qlen": [], "actual_seq_kvlen": []}, "neither of them empty"),
    (packed_call, {"actual_seq_qlen": [3, 8, 9]}, "differ in length"),
    (packed_call, {"actual_seq_qlen": QUERIES}, "actual_seq_qlen [3, 0, 5, 1] must not fall"),
    (packed_call, {"actual_seq_qlen": [-1, 3, 8, 9]}, "must not fall"),
    (packed_call, {"actual_seq_kvlen": [4, 6, 11, 15]}, "ends behind the 14 rows that there are"),
    (packed_call, {"actual_seq_kvlen": [4, 6, 6, 14]}, "sequence 2 has 5 queries and no keys: not supported"),
    # Modes and masks.
    (batched_call, {"sparse_mode": -1}, "sparse_mode -1 is not in 0 to 8"),
    (batched_call, {"sparse_mode": 9}, "sparse_mode 9 is not in 0 to 8"),
    (packed_call, {"sparse_mode": 7}, "sparse_mode 7 is not emulated"),
    (packed_call, {"sparse_mode": 8}, "sparse_mode 8 is not emulated"),
    *[
        (batched_call, {"sparse_mode": mode}, f"sparse_mode {mode} without atten_mask silently is full attention")
        for mode in range(1, 7)
    ],
    (batched_call, {"atten_mask": ones(5, 7)}, "atten_mask is torch.float32; use bool or uint8"),
    (batched_call, {"atten_mask": ones(7, 5).bool()}, "atten_mask is (7, 5); allowed here are"),
    (batched_call, {"atten_mask": ones(1, 4, 5, 7).bool()}, "atten_mask is (1, 4, 5, 7); allowed here are"),
    (batched_call, {"atten_mask": COMPRESSED}, "atten_mask is (2048, 2048); allowed here are"),
    (packed_call, {"atten_mask": ones(1, 1, 5, 5).bool()}, "atten_mask is (1, 1, 5, 5); allowed here are [(5, 5)]"),
    (packed_call, {"atten_mask": ones(9, 14).bool()}, "atten_mask is (9, 14); allowed here are [(5, 5)]"),
    *[
        (batched_call, {"sparse_mode": mode, "atten_mask": mask}, f"atten_mask of sparse_mode {mode} is not the compr")
        for mode in (2, 3, 4)
        for mask in (~COMPRESSED, ones(5, 7).triu(1).bool(), COMPRESSED[None, None], COMPRESSED_PREFIX)
    ],
    (batched_call, {"sparse_mode": 6, "atten_mask": COMPRESSED, "prefix": [3, 3]}, "is not the compressed mask"),
    (
        batched_call,
        {"atten_mask": ones(5, 7).triu(3).bool(), "next_tockens": 1},
        "lets be seen what pre_tockens 2147483647 and next_tockens 1 hides",
    ),
    (batched_call, {"atten_mask": ones(5, 7).triu(1).bool(), "pre_tockens": 3}, "lets be seen what pre_tockens 3"),
    (batched_call, compressed(4, pre_tockens=1, next_tockens=-2), "holds no pair of sequence 0"),
    (batched_call, compressed(4, pre_tockens=-9), "holds no pair of sequence 0"),
    # Prefixes.
    (batched_call, {"prefix": [3, 3]}, "prefix [3, 3] with sparse_mode 0: it belongs to 5 and 6"),
    (batched_call, compressed(6), "prefix None with sparse_mode 6"),
    (batched_call, compressed(6, prefix=[3]), "expected one for each of up to 32 sequences"),
    (
        batched_call,
        {name: ones(33, *shape) for name, shape in (("query", (4, 5, 8)), ("key", (2, 7, 8)), ("value", (2, 7, 8)))}
        | compressed(6, prefix=[3] * 33),
        "up to 32 sequences",
    ),
    (batched_call, {"query": ones(2, 4, 9, 8)} | compressed(6, prefix=[-1, 3]), "prefix -1 is not in 0 to 7"),
    (batched_call, compressed(6, prefix=[3, 8]), "prefix 8 is not in 2 to 7"),
    (batched_call, compressed(6, prefix=[1, 3]), "prefix 1 is not in 2 to 7"),
    (
        packed_call,
        {"sparse_mode": 5, "atten_mask": ones(5, 5).triu(1).bool(), "prefix": [1, 2, 0, 2]},
        "sparse_mode 5 is not for layout TND",
    ),
    (
        batched_call,
        {"sparse_mode": 5, "atten_mask": ones(5, 7).triu(3).bool(), "prefix": [2, 2]},
        "atten_mask is (5, 7); allowed here are [(2, 1, 5, 7), (2, 4, 5, 7)]",
    ),
    (
        batched_call,
        {"sparse_mode": 5, "atten_mask": ones(2, 1, 5, 7).triu(3).bool(), "prefix": [2, 4]},
        "atten_mask of sparse_mode 5 disagrees with prefix [2, 4]",
    ),
    # Rows that see nothing.
    *[
        (
            batched_call,
            {"sparse_mode": mode, "atten_mask": masked_row(5, 7)},
            "row 1 of sequence 0 sees no key: pass inner_precise=2",
        )
        for mode in (0, 1)
    ],
    (
        packed_call,
        {"atten_mask": masked_row(5, 5), "inner_precise": 2},
        "row 1 of sequence 0 sees no key: not supported in layout TND",
    ),
    (
        packed_call,
        compressed(3, actual_seq_kvlen=[4, 6, 10, 14]),
        "row 0 of sequence 2 sees no key: not supported in layout TND",
    ),
]


@pytest.mark.parametrize(("call", "change", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_both_ops_refuse(call, change, message):
    arguments = call() | change
    for op, further in (("npu_fusion_attention", {}), ("npu_fusion_attention_grad", {"dy": ones(1)})):
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.npu, op)(**arguments, **further)
        assert str(error.value).startswith("emulated NPU op: ")
        assert message in str(error.value)


@pytest.mark.parametrize("call", [batched_call, flat_call, packed_call])
def test_neither_op_refuses_the_calls_that_those_changes_start_from(call):
    arguments = call()
    out, softmax_max, softmax_sum, *_ = torch.ops.npu.npu_fusion_attention(**arguments)
    saved = {"dy": out, "softmax_max": softmax_max, "softmax_sum": softmax_sum, "attention_in": out}
    torch.ops.npu.npu_fusion_attention_grad(**arguments, **saved)


def test_forward_refuses_rows_behind_the_last_sequence():
    arguments = packed_call() | {"query": ones(11, HEADS, HEAD_SIZE)}
    with pytest.raises(RuntimeError, match="the sequences end at row 9 of 11"):
        torch.ops.npu.npu_fusion_attention(**arguments)


def test_forward_refuses_a_dropout_mask():
    with pytest.raises(RuntimeError, match="dropout_mask is not emulated"):
        torch.ops.npu.npu_fusion_attention(**batched_call(), dropout_mask=ones(1))


def one_copy_differs(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 3] += 1
    return x


REFUSED_BY_GRADIENT = [
    *[(name, lambda x: None, f"{name} is missing") for name in ("softmax_max", "softmax_sum", "attention_in")],
    *[(name, torch.Tensor.half, f"{name} is torch.float16, query torch.float32") for name in ("dy", "attention_in")],
    *[
        (name, lambda x: x[:, :, 1:], f"{name} is (2, 4, 4, 4); expected (2, 4, 5, 4)")
        for name in ("dy", "attention_in")
    ],
    *[
        (name, change, message.format(name))
        for name in ("softmax_max", "softmax_sum")
        for change, message in [
            (torch.Tensor.half, "{} is torch.float16; it is always fp32"),
            (lambda x: x[..., 0], "{} is (2, 4, 5); expected (2, 4, 5, 8)"),
            (lambda x: x[..., :1], "{} is (2, 4, 5, 1); expected (2, 4, 5, 8)"),
            (lambda x: x[..., :1].expand_as(x), "{} is not contiguous"),
            (one_copy_differs, "the 8 copies of {} differ"),
        ]
    ],
    ("softmax_in", lambda x: ones(1), "softmax_in is not emulated"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED_BY_GRADIENT, ids=[message for *_, message in REFUSED_BY_GRADIENT]
)
def test_gradient_refuses(name, change, message):
    tensors = inputs()
    out, softmax_max, softmax_sum = attend(*tensors[:3])
    arguments = batched_call() | {"dy": tensors.dout, "attention_in": out}
    arguments |= {"softmax_max": softmax_max, "softmax_sum": softmax_sum}
    arguments[name] = change(arguments.get(name))
    with pytest.raises(RuntimeError) as error:
        torch.ops.npu.npu_fusion_attention_grad(**arguments)
    assert str(error.value) == f"emulated NPU op: {message}"


def update_call(layout: str, softmax_layout: str = "") -> dict[str, object]:
    out, statistics = (ones(5, 2, 8), ones(2, 4, 5, 8)) if layout == "SBH" else (ones(5, 4, 64), ones(5, 4, 8))
    names = ("prev_attn_out", "prev_softmax_max", "prev_softmax_sum")
    arguments = dict(zip(names, (out, statistics, statistics), strict=True))
    arguments |= {name.replace("prev", "cur"): x for name, x in arguments.items()}
    if layout == "TND":
        arguments["actual_seq_qlen"] = torch.tensor([0, 2, 5])
    return arguments | {"input_layout": layout, "input_softmax_layout": softmax_layout}


REFUSED_BY_UPDATE = [
    ("SBH", {"input_layout": "BSH"}, "input_layout 'BSH' is neither SBH nor TND"),
    ("SBH", {"input_softmax_layout": "TND"}, "input_softmax_layout 'TND' does not go with SBH"),
    ("TND", {"input_softmax_layout": "SBH"}, "input_softmax_layout 'SBH' does not go with TND"),
    ("SBH", {"cur_attn_out": ones(4, 2, 8)}, "outs must be 3-D and of one shape"),
    ("SBH", {"prev_attn_out": ones(5, 2, 4, 2), "cur_attn_out": ones(5, 2, 4, 2)}, "outs must be 3-D"),
    ("SBH", {"cur_attn_out": ones(5, 2, 8).half()}, "outs must be of one dtype"),
    ("SBH", {"prev_attn_out": ones(5, 2, 8).double(), "cur_attn_out": ones(5, 2, 8).double()}, "fp16, bf16 or fp32"),
    ("SBH", {"cur_softmax_sum": ones(2, 4, 5, 8).half()}, "must be fp32"),
    ("SBH", {"cur_softmax_sum": ones(2, 4, 5, 1).expand(2, 4, 5, 8)}, "must be contiguous"),
    *[
        (layout, {f"{part}_softmax_{kind}": ones(8) for part in ("prev", "cur") for kind in ("max", "sum")}, message)
        for layout, message in (("SBH", "must be 4-D for SBH: (8,)"), ("TND", "must be 3-D for TND: (8,)"))
    ],
    ("SBH", {"cur_softmax_sum": ones(2, 4, 6, 8)}, "softmax_max and softmax_sum differ in shape"),
    ("SBH", {"prev_attn_out": ones(5, 2, 6), "cur_attn_out": ones(5, 2, 6)}, "expected [S, B, H] and [B, N, S, 8]"),
    ("SBH", {"prev_attn_out": ones(2, 5, 8), "cur_attn_out": ones(2, 5, 8)}, "expected [S, B, H] and [B, N, S, 8]"),
    ("TND", {"prev_attn_out": ones(4, 5, 64), "cur_attn_out": ones(4, 5, 64)}, "expected [T, N, D] and [T, N, 8]"),
    ("TND", {"prev_attn_out": ones(5, 4, 32), "cur_attn_out": ones(5, 4, 32)}, "head size 32: in TND a multiple of 64"),
    ("TND", {"prev_attn_out": ones(5, 4, 832), "cur_attn_out": ones(5, 4, 832)}, "multiple of 64 up to 768"),
    ("TND", {"actual_seq_qlen": None}, "layout TND needs actual_seq_qlen"),
    ("TND", {"actual_seq_qlen": torch.tensor([0, 2, 5], dtype=torch.int32)}, "an int64 tensor"),
    ("TND", {"actual_seq_qlen": torch.tensor([2, 5])}, "actual_seq_qlen [2, 5] must run from 0 to 5 here"),
    ("TND", {"actual_seq_qlen": torch.tensor([0, 2, 4])}, "actual_seq_qlen [0, 2, 4] must run from 0 to 5 here"),
]


@pytest.mark.parametrize(("layout", "change", "message"), REFUSED_BY_UPDATE)
def test_update_refuses(layout, change, message):
    with pytest.raises(RuntimeError) as error:
        torch.ops.npu.npu_ring_attention_update(**update_call(layout) | change)
    assert str(error.value).startswith("emulated NPU op: ")
    assert message in str(error.value)


@pytest.mark.parametrize(("layout", "softmax_layout"), [("SBH", ""), ("SBH", "SBH"), ("TND", ""), ("TND", "TND")])
def test_update_does_not_refuse_the_calls_that_those_changes_start_from(layout, softmax_layout):
    arguments = update_call(layout, softmax_layout)
    out, softmax_max, softmax_sum = torch.ops.npu.npu_ring_attention_update(**arguments)
    assert torch.equal(out, arguments["prev_attn_out"])
    assert torch.equal(softmax_max, arguments["prev_softmax_max"])
    assert torch.equal(softmax_sum, 2 * arguments["prev_softmax_sum"])
