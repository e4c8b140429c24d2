"""Where the numbers of each sequence lie in memory.

Shapes: B batch, N query heads, G key/value heads, S queries, T rows of all packed sequences, D key head size, V value
head size. A sequence is an entry of the batch, or of the packed ones in layout TND. Views are returned, never copies:
the same functions read inputs and write outputs.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from unit_tests.emulated_npu.rejection import require

RANKS = {"BSH": 3, "SBH": 3, "BNSD": 4, "BSND": 4, "TND": 3}
"""Dims of query, key and value by input layout. H is heads x head size."""

COPIES = 8
"""The softmax statistics hold each row's number eight times, on their last dim."""


class Sizes(NamedTuple):
    """The sizes of a call. queries, keys: the rows of each sequence (in T, for layout TND)."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    value_head_size: int
    queries: list[slice]
    keys: list[slice]

    @property
    def num_scores(self) -> int:
        """`numels` of the op: the size of the mask that dropout would need."""
        pairs = zip(self.queries, self.keys, strict=True)
        return self.num_heads * sum(length(query) * length(key) for query, key in pairs)


def length(rows: slice) -> int:
    return rows.stop - rows.start


def sizes_of(call: SimpleNamespace) -> Sizes:
    """The sizes that query, key, value, head_num and the lists of sequences say, when they agree with each other."""
    layout, query, key, value = call.input_layout, call.query, call.key, call.value
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} in {layout}"
    # The op compares with "TND" before it turns the name to upper case.
    require(layout in RANKS, f"unknown input_layout {layout!r}; use one of {', '.join(RANKS)}, in upper case")
    require(all(x.dim() == RANKS[layout] for x in (query, key, value)), f"{shapes}: expected {RANKS[layout]} dims each")
    require(all(x.numel() > 0 for x in (query, key, value)), f"{shapes}: empty tensors are undefined")
    require(call.head_num > 0, f"head_num {call.head_num} must be above 0")
    require(key.shape[:-1] == value.shape[:-1], f"{shapes}: key and value may differ in head size only")
    if layout in ("BSH", "SBH"):
        require(query.size(2) % call.head_num == 0, f"{shapes}: head_num {call.head_num} must divide H of query")
        head_size = query.size(2) // call.head_num
        require(key.size(2) % head_size == 0, f"{shapes}: H of key is no multiple of query's head size {head_size}")
        num_kv_heads = key.size(2) // head_size
        require(value.size(2) % num_kv_heads == 0, f"{shapes}: key's {num_kv_heads} heads must divide H of value")
        value_head_size = value.size(2) // num_kv_heads
    else:
        heads = layout.index("N")
        # Query heads, whatever the number of key/value heads.
        require(call.head_num == query.size(heads), f"{shapes}: head_num {call.head_num} is not query's N")
        require(query.size(-1) == key.size(-1), f"{shapes}: query and key must have one head size")
        num_kv_heads, head_size, value_head_size = key.size(heads), key.size(-1), value.size(-1)
    require(call.head_num <= 256, f"head_num {call.head_num} is above 256")
    require(
        call.head_num % num_kv_heads == 0, f"{shapes}: {num_kv_heads} K/V heads must divide head_num {call.head_num}"
    )
    require(head_size <= 768, f"{shapes}: head size {head_size} is above 768")
    require(value_head_size <= head_size, f"{shapes}: value's head size {value_head_size} exceeds key's {head_size}")
    one_size = value_head_size == head_size
    require(one_size or call.narrower_values, f"{shapes}: this CANN takes no values of another head size than keys")
    return Sizes(call.head_num, num_kv_heads, head_size, value_head_size, *_rows(call, shapes))


def _rows(call: SimpleNamespace, shapes: str) -> tuple[list[slice], list[slice]]:
    """The rows of each sequence's queries and of its keys."""
    layout, ends = call.input_layout, (call.actual_seq_qlen, call.actual_seq_kvlen)
    if layout != "TND":
        require(ends == (None, None), f"actual_seq_qlen and actual_seq_kvlen belong to layout TND, not to {layout}")
        batch, rows = layout.index("B"), layout.index("S")
        require(call.query.size(batch) == call.key.size(batch), f"{shapes}: one batch size expected")
        return tuple([slice(0, x.size(rows))] * x.size(batch) for x in (call.query, call.key))
    require(all(ends), "layout TND needs actual_seq_qlen and actual_seq_kvlen, neither of them empty")
    require(len(ends[0]) == len(ends[1]), f"actual_seq_qlen and actual_seq_kvlen differ in length: {ends}")
    queries = packed_rows("actual_seq_qlen", ends[0], call.query.size(0))
    keys = packed_rows("actual_seq_kvlen", ends[1], call.key.size(0))
    for index, (query, key) in enumerate(zip(queries, keys, strict=True)):
        unseen = length(query) > 0 and length(key) == 0
        require(not unseen, f"sequence {index} has {length(query)} queries and no keys: not supported")
    return queries, keys


def packed_rows(name: str, ends: list[int], total: int) -> list[slice]:
    """[2, 2, 6, 0] as 0:2, 2:2, 2:6, 0:0: cumulative ends without a leading 0; zeros at the end are no sequences.

    A leading 0 is therefore an empty first sequence.
    """
    active = list(ends)
    while active and active[-1] == 0:
        active.pop()
    starts = [0, *active[:-1]]
    require(all(start <= end for start, end in zip(starts, active, strict=False)), f"{name} {ends} must not fall")
    require(not active or active[-1] <= total, f"{name} {ends} ends behind the {total} rows that there are")
    rows = [slice(start, end) for start, end in zip(starts, active, strict=False)]
    return rows + [slice(0, 0)] * (len(ends) - len(active))


def by_sequence(x: Tensor, layout: str, num_heads: int, rows: list[slice]) -> list[Tensor]:
    """Views [N, S, D] of the sequences of a query, key, value or output."""
    if layout == "TND":
        return [x[packed].transpose(0, 1) for packed in rows]
    if layout in ("BSH", "SBH"):
        x, layout = x.unflatten(-1, (num_heads, -1)), f"{layout[:2]}ND"
    return list(x.permute([layout.index(dim) for dim in "BNSD"]))


def statistics_by_sequence(
    statistics: Tensor, layout: str, softmax_layout: str, num_heads: int, rows: list[slice]
) -> list[Tensor]:
    """Views [N, S, 8] of the sequences of softmax_max or softmax_sum.

    [B, N, S, 8] for every layout but TND, whatever the order of query. In TND the tensor is shaped [T, N, 8] either
    way, but by default (softmax_layout="") its memory is a block [N, S, 8] for each sequence in turn (inferred), so
    that an index into the shape gives another row's number. softmax_layout="TND" makes memory what the shape says.
    """
    if layout != "TND":
        return list(statistics)
    if softmax_layout == "TND":
        return by_sequence(statistics, layout, num_heads, rows)
    flat = statistics.view(-1, COPIES)
    return [
        flat[packed.start * num_heads : packed.stop * num_heads].view(num_heads, length(packed), COPIES)
        for packed in rows
    ]


def output_shape(query: Tensor, layout: str, sizes: Sizes) -> torch.Size:
    """That of query, with the head size of value."""
    last = sizes.value_head_size * (sizes.num_heads if layout in ("BSH", "SBH") else 1)
    return torch.Size([*query.shape[:-1], last])


def statistics_shape(query: Tensor, layout: str, sizes: Sizes) -> torch.Size:
    """[B, N, S, 8], or [T, N, 8] for layout TND."""
    if layout == "TND":
        return torch.Size([query.size(0), sizes.num_heads, COPIES])
    return torch.Size([len(sizes.queries), sizes.num_heads, length(sizes.queries[0]), COPIES])
