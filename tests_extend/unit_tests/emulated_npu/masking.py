"""Which keys a query sees: atten_mask, sparse_mode, pre_tockens, next_tockens and prefix; and rows that see nothing.

For query i of S and key j of T, off = T - S. True (or 1) in atten_mask means MASKED, the opposite of PyTorch's SDPA.

    mode  atten_mask              masked where
    0     None                    nowhere, and windows are ignored
    0     full                    atten_mask; it must cover j > i + next and j < i - pre, whose blocks are skipped
    1     full                    atten_mask
    2     compressed              j > i                         causal, aligned at the top left
    3     compressed              j > i + off                   causal, aligned at the bottom right
    4     compressed              j > i + off + next or j < i + off - pre
    5     full, by batch entry    j > i + off and j >= prefix[b]
    6     compressed for prefixes the same

A full mask is [S, T], [1, 1, S, T], [B, 1, S, T] or [B, N, S, T]; in layout TND only [longest S, longest T], of which
each sequence uses the top left (inferred). The compressed mask is a fixed pattern of 2048 x 2048 whatever the sizes of
the call. Without a mask the op would silently compute full attention in every mode; here only mode 0 may do so.

A row that sees nothing has its place only outside TND, and where the op is told (inner_precise=2) or sees by itself
(from windows and prefixes, inferred) that such rows may occur. Elsewhere it would yield an average over masked keys.
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from unit_tests.emulated_npu.layouts import Sizes, length
from unit_tests.emulated_npu.rejection import require

FULL, PREFIX = (0, 1, 5), (5, 6)


def masked_pairs(call: SimpleNamespace, sizes: Sizes) -> list[Tensor]:
    """For each sequence [1 or N, S, T] bool, True where masked."""
    _check_mode(call, sizes)
    full = _full_masks(call, sizes) if call.sparse_mode in FULL else None
    pairs = []
    for index, (query, key) in enumerate(zip(sizes.queries, sizes.keys, strict=True)):
        i, j = torch.arange(length(query)).unsqueeze(1), torch.arange(length(key)).unsqueeze(0)
        masked = _masked_by_rule(call, i, j, index).unsqueeze(0) if full is None else full[index]
        if full is not None and call.atten_mask is not None:
            _check_full_mask(call, masked, i, j, index)
        seen_nowhere = call.sparse_mode == 4 and len(i) > 0 and bool(masked.all())
        require(not seen_nowhere, f"the band of {_window(call)} holds no pair of sequence {index}")
        _check_dead_rows(call, masked, index)
        pairs.append(masked)
    return pairs


def _check_mode(call: SimpleNamespace, sizes: Sizes) -> None:
    """Mode, mask and prefix belong together."""
    mode, mask, prefix = call.sparse_mode, call.atten_mask, call.prefix
    require(0 <= mode <= 8, f"sparse_mode {mode} is not in 0 to 8")
    require(mode < 7, f"sparse_mode {mode} is not emulated")
    require(not (mode == 5 and call.input_layout == "TND"), "sparse_mode 5 is not for layout TND")
    require(mode == 0 or mask is not None, f"sparse_mode {mode} without atten_mask silently is full attention")
    if mask is not None:
        require(
            mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}; use bool or uint8, True is masked"
        )
    if mask is not None and mode not in FULL:
        expected = compressed_prefix_mask() if mode == 6 else compressed_mask()
        is_compressed = mask.shape == expected.shape and torch.equal(mask.bool(), expected)
        require(is_compressed, f"atten_mask of sparse_mode {mode} is not the compressed mask {tuple(expected.shape)}")
    require((prefix is not None) == (mode in PREFIX), f"prefix {prefix} with sparse_mode {mode}: it belongs to 5 and 6")
    if prefix is not None:
        require(
            len(prefix) == len(sizes.queries) <= 32, f"prefix {prefix}: expected one for each of up to 32 sequences"
        )
        for value, query, key in zip(prefix, sizes.queries, sizes.keys, strict=True):
            lowest = max(0, length(key) - length(query))
            require(lowest <= value <= length(key), f"prefix {value} is not in {lowest} to {length(key)}")


@cache
def compressed_mask() -> Tensor:
    """For modes 2, 3 and 4."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(diagonal=1)


@cache
def compressed_prefix_mask() -> Tensor:
    """For mode 6: the compressed mask over 1024 rows whose second halves are masked."""
    rows = torch.cat([torch.zeros(1024, 1024, dtype=torch.bool), torch.ones(1024, 1024, dtype=torch.bool)], dim=1)
    return torch.cat([compressed_mask(), rows])


def _masked_by_rule(call: SimpleNamespace, i: Tensor, j: Tensor, index: int) -> Tensor:
    """[S, T] for modes 2 to 6. i: [S, 1] and j: [1, T], the indices of queries and keys."""
    off = j.numel() - i.numel()
    if call.sparse_mode == 2:
        return j > i
    if call.sparse_mode == 3:
        return j > i + off
    if call.sparse_mode == 4:
        return (j > i + off + call.next_tockens) | (j < i + off - call.pre_tockens)
    return (j > i + off) & (j >= call.prefix[index])


def _full_masks(call: SimpleNamespace, sizes: Sizes) -> list[Tensor]:
    """atten_mask as [1 or N, S, T] bool of each sequence; nothing masked where there is none."""
    if call.atten_mask is None:
        rows = zip(sizes.queries, sizes.keys, strict=True)
        return [torch.zeros(1, length(query), length(key), dtype=torch.bool) for query, key in rows]
    mask = call.atten_mask.bool()
    num_queries, num_keys = (max(map(length, rows)) for rows in (sizes.queries, sizes.keys))
    batch, pair = len(sizes.queries), (num_queries, num_keys)
    if call.input_layout == "TND":
        allowed = [pair]
    else:
        allowed = [(batch, 1, *pair), (batch, sizes.num_heads, *pair)]
        allowed += [] if call.sparse_mode == 5 else [pair, (1, 1, *pair)]
    require(tuple(mask.shape) in allowed, f"atten_mask is {tuple(mask.shape)}; allowed here are {allowed}")
    if mask.dim() == 2:
        rows = zip(sizes.queries, sizes.keys, strict=True)
        return [mask[None, : length(query), : length(key)] for query, key in rows]
    return list(mask.expand(batch, -1, -1, -1))


def _check_full_mask(call: SimpleNamespace, masked: Tensor, i: Tensor, j: Tensor, index: int) -> None:
    """The op computes only blocks that window or prefix let be seen: what they hide, the mask must hide itself."""
    if call.sparse_mode == 0:
        outside = (j > i + call.next_tockens) | (j < i - call.pre_tockens)
        require(not (outside & ~masked).any(), f"atten_mask of sparse_mode 0 lets be seen what {_window(call)} hides")
    if call.sparse_mode == 5:
        hidden = _masked_by_rule(call, i, j, index).expand_as(masked)
        require(torch.equal(masked, hidden), f"atten_mask of sparse_mode 5 disagrees with prefix {call.prefix}")


def _window(call: SimpleNamespace) -> str:
    return f"pre_tockens {call.pre_tockens} and next_tockens {call.next_tockens}"


def _check_dead_rows(call: SimpleNamespace, masked: Tensor, index: int) -> None:
    dead = masked.all(dim=-1)
    if not dead.any():
        return
    where = f"row {dead.any(dim=0).nonzero()[0].item()} of sequence {index} sees no key"
    require(call.input_layout != "TND", f"{where}: not supported in layout TND")
    handled = call.inner_precise == 2 or _sees_dead_rows_by_itself(call, masked.size(-2), masked.size(-1))
    require(handled, f"{where}: pass inner_precise=2")


def _sees_dead_rows_by_itself(call: SimpleNamespace, num_queries: int, num_keys: int) -> bool:
    """Inferred from CANN's reference implementation."""
    return {
        0: call.next_tockens < 0 or call.pre_tockens + num_keys < num_queries,
        3: num_queries > num_keys,
        4: call.pre_tockens < 0 or call.next_tockens + num_keys < num_queries,
        5: 0 in (call.prefix or ()),
        6: 0 in (call.prefix or ()),
    }.get(call.sparse_mode, False)
