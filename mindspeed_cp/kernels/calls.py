"""Which kernel computes which of a step's tiles, and how many of them at once.

Shapes: B batch, H heads, S tokens, D head size, n tiles of a call.

Note [Calls]
    A tile goes to the first kernel, in the order of preference, that takes it as it is, or cut into rectangles and
    triangles (tiles.py). Many tiles (documents, the strips of a window) would be many calls. They share one where no
    two of them have a query or a key in common: those of one window one after another, of whatever size, for a kernel
    that takes packed tiles. Else small ones of about one size are the batch of a call, padded at the end to one of a
    few sizes. Where that, or windows, make them differ, a mask says who sees whom. Such a mask is as large as the tiles
    are, so that large tiles, whose calls are worth their start, are never in a batch.

    Tiles that share no call stay views of the tensors. Packed ones do where they follow one another and the batch is 1;
    else they are copied.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

from mindspeed_cp.kernels.choose import KernelRegistry
from mindspeed_cp.kernels.places import Gathered, Place, of_sample, place_within
from mindspeed_cp.kernels.protocol import (
    EVERYTHING,
    UPPER_TRIANGLE,
    Segments,
    Term,
    TileCase,
    TileKernel,
    TileTerms,
    Window,
)
from mindspeed_cp.kernels.tiles import cut
from mindspeed_cp.kernels.wrapped import Turned
from mindspeed_cp.plan import Tile

_SMALL = 2**16
"""At most so many pairs of query and key are in the rectangle of a tile that may be in a batch."""
_WORTH = 4
"""So many tiles share a call, or none."""

_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Call:
    """Tiles that a kernel computes at once, no two with a query or a key in common; one, mostly.

    case: as it is asked. kernel: which has no reason against it.
    """

    kernel: TileKernel
    case: TileCase
    tiles: tuple[Tile, ...]
    _made: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def queries(self, like: Tensor, held: Sequence[slice] | None = None) -> Gathered:
        """Where the queries are in tensors like [B, N, s, ...], which hold those tokens of their rank; all for None."""
        return self._held("queries", like, held, lambda tile: tile.queries, self.case.num_queries)

    def keys(self, like: Tensor, held: Sequence[slice] | None = None) -> Gathered:
        """Where the keys are in tensors like [B, G, s, ...], which hold those tokens of the owner; all for None."""
        return self._held("keys", like, held, lambda tile: tile.keys, self.case.num_keys)

    def _held(
        self, side: str, like: Tensor, held: Sequence[slice] | None, of: Callable[[Tile], slice], padded_to: int
    ) -> Gathered:
        what = side, None if held is None else tuple((each.start, each.stop) for each in held)

        def tokens() -> list[slice]:
            return [of(tile) if held is None else place_within(held, of(tile)) for tile in self.tiles]

        return self._gathered(what, like, tokens, padded_to)

    def terms(self, scale: float, like: Tensor) -> TileTerms:
        """What the kernel is told, but for a boolean mask of the user's. like: in the order [B, N, S, ...]."""

        def make() -> tuple[Tensor | None, Segments | None]:
            return self._visible(like), self._segments(like)

        # Without the scale: it may be another in each call, and they would all be kept.
        visible, segments = self._once(("terms", like.device, like.size(0)), make)
        return TileTerms(scale, self.case.window, visible, segments)

    def _segments(self, like: Tensor) -> Segments | None:
        """Where tiles begin, in the tensors that a kernel is handed; None where it is not handed them packed."""
        if not self.case.packed:
            return None

        copies = like.size(0) if self.tiles[0].sample is None else 1
        ends = [
            torch.tensor([0, *accumulate(lengths * copies)], dtype=torch.int32, device=like.device)
            for lengths in ([tile.num_queries for tile in self.tiles], [tile.num_keys for tile in self.tiles])
        ]
        return Segments(ends[0], ends[1], self.case.num_queries, self.case.num_keys)

    def _visible(self, like: Tensor) -> Tensor | None:
        """The mask that tells the tiles of a batch apart, [n, 1, S, T]; None where the window does."""
        if not self.case.masked or len(self.tiles) == 1:
            return None

        visible = torch.zeros(len(self.tiles), 1, self.case.num_queries, self.case.num_keys, dtype=torch.bool)
        for tile, rows in zip(self.tiles, visible, strict=True):
            size = tile.num_queries, tile.num_keys
            rows[0, : size[0], : size[1]] = Window(tile.left, tile.right).visible(*size)
        copies = like.size(0) if self.tiles[0].sample is None else 1
        return visible.repeat(copies, 1, 1, 1).to(like.device)

    def _gathered(self, what: object, like: Tensor, tokens: Callable[[], list[slice]], padded_to: int) -> Gathered:
        def make() -> Gathered:
            if len(self.tiles) == 1:
                place = Place(of_sample(self.tiles[0].sample), tokens()[0])
                return Gathered(place, place, None)
            return self._index(like, tokens(), padded_to)

        return self._once((what, like.device, like.size(0)), make)

    def _index(self, like: Tensor, tokens: Sequence[slice], padded_to: int) -> Gathered:
        batch = like.size(0)
        follow = all(one.stop == other.start for one, other in pairwise(tokens))
        if self.case.packed and batch == 1 and follow:
            place = Place(slice(None), slice(tokens[0].start, tokens[-1].stop))
            return Gathered(place, place, None)
        alike = self.tiles[0].sample is None
        lengths = torch.tensor([each.stop - each.start for each in tokens])
        starts = torch.tensor([each.start for each in tokens])
        samples = torch.tensor([tile.sample or 0 for tile in self.tiles])
        if alike:
            samples = torch.arange(batch).repeat_interleave(len(tokens))
            lengths, starts = lengths.repeat(batch), starts.repeat(batch)
        rows = torch.arange(padded_to)
        real = rows < lengths[:, None]
        places = starts[:, None] + rows.minimum(lengths[:, None] - 1)
        samples = samples[:, None].expand_as(places)
        back = Place(samples[real].to(like.device), places[real].to(like.device))
        if self.case.packed:
            return Gathered(back, back, None)
        given = Place(samples.to(like.device), places.to(like.device))
        return Gathered(given, back, None if bool(real.all()) else real.flatten().nonzero().squeeze(1).to(like.device))

    def _once(self, key: object, make: Callable[[], _Made]) -> _Made:
        if key not in self._made:
            self._made[key] = make()
        return cast("_Made", self._made[key])


def calls(tiles: Iterable[Tile], base: TileCase, registry: KernelRegistry) -> tuple[Call, ...]:
    """The calls that compute these tiles, see Note [Calls].

    base: the case of the whole tensors; num_queries, num_keys and window in it are not read, each tile's take their
    place. masked in it: a tensor of the user's says who sees whom; each tile is then a call of its own. So it is, or
    each of its parts, where a bias is added. registry: what to choose from.

    Raises NotImplementedError with every kernel's reasons where none can compute a part of a tile.
    """
    if base.masked:
        cases = [(tile, _case(base, tile, EVERYTHING)) for tile in tiles]
        return tuple(Call(registry.choose(case), case, (tile,)) for tile, case in cases)
    if Term.BIAS in base.terms:
        return tuple(call for tile in tiles for call in _each(tile, base, registry))
    made: list[Call] = []
    small: list[Tile] = []
    rest: list[Tile] = []
    for group in _groups(tiles, lambda tile: (tile.left, tile.right)):
        packed = _packed(group, base, registry) if len(group) >= _WORTH else None
        made += [packed] if packed else []
        rest += [] if packed else group
    for tile in rest:
        if _is_small(tile):
            small.append(tile)
            continue
        for call in _each(tile, base, registry):
            if _is_small(call.tiles[0]):
                small += call.tiles
            else:
                made.append(call)
    for group in _groups(small, _about_alike):
        shared = _batch(group, base, registry) if len(group) >= _WORTH else None
        made += [shared] if shared else [call for tile in group for call in _each(tile, base, registry)]
    return tuple(made)


def _is_small(tile: Tile) -> bool:
    return tile.num_queries * tile.num_keys <= _SMALL


def _each(tile: Tile, base: TileCase, registry: KernelRegistry) -> list[Call]:
    """A tile by itself, or its parts: by the first kernel that can."""
    for kernel in registry.in_order(base):
        for ways in (lambda tile: (tile,), cut):
            parts = ways(tile)
            made = [call for part in parts if (call := _single(kernel, part, base, registry)) is not None]
            if len(made) == len(parts):
                return made
    raise NotImplementedError(registry.explain(_case(base, tile)))


def _single(kernel: TileKernel, tile: Tile, base: TileCase, registry: KernelRegistry) -> Call | None:
    case = _case(base, tile)
    if case.window == UPPER_TRIANGLE and case.num_queries == case.num_keys and kernel.unsupported_reasons(case):
        kernel = Turned(kernel)
    if kernel.unsupported_reasons(case):
        return None
    registry.announce(kernel, case)
    return Call(kernel, case, (tile,))


def _packed(tiles: Sequence[Tile], base: TileCase, registry: KernelRegistry) -> Call | None:
    """One call of tiles of one window one after another; None where the first kernel that can takes them one by one."""
    longest = base._replace(
        num_queries=max(tile.num_queries for tile in tiles),
        num_keys=max(tile.num_keys for tile in tiles),
        window=Window(tiles[0].left, tiles[0].right),
    )
    for kernel in registry.in_order(base):
        case = longest._replace(packed=True)
        if not kernel.unsupported_reasons(case):
            registry.announce(kernel, case)
            return Call(kernel, case, tuple(tiles))
        if not kernel.unsupported_reasons(_case(base, tiles[0])):
            return None
    return None


def _batch(tiles: Sequence[Tile], base: TileCase, registry: KernelRegistry) -> Call | None:
    """One call of tiles as a batch, by the first kernel that can; None where none can."""
    sizes = {(tile.num_queries, tile.num_keys) for tile in tiles}
    windows = {Window(tile.left, tile.right) for tile in tiles}
    longest = max(queries for queries, _ in sizes), max(keys for _, keys in sizes)
    in_batch = base._replace(num_queries=_padded(longest[0]), num_keys=_padded(longest[1]), masked=True)
    ways = [in_batch._replace(window=EVERYTHING)]
    if len(windows) == len(sizes) == 1:
        ways = [base._replace(num_queries=longest[0], num_keys=longest[1], window=next(iter(windows))), *ways]
    for kernel in registry.in_order(base):
        for case in ways:
            if not kernel.unsupported_reasons(case):
                registry.announce(kernel, case)
                return Call(kernel, case, tuple(tiles))
    return None


def _about_alike(tile: Tile) -> object:
    """The same for tiles of about one size and of one kind of window."""
    return _padded(tile.num_queries), _padded(tile.num_keys), tile.left, tile.right if tile.left is None else None


def _groups(tiles: Iterable[Tile], kind: Callable[[Tile], object]) -> list[list[Tile]]:
    """Tiles that may share a call: of one kind, no two with a query or a key in common.

    Where both ascend from tile to tile they have nothing in common; other orders are left alone.
    """
    open_groups: dict[object, list[_Group]] = {}
    groups: list[list[Tile]] = []
    for tile in tiles:
        alike = open_groups.setdefault((kind(tile), tile.sample is None), [])
        group = next((each for each in alike if each.takes(tile)), None)
        if group is None:
            group = _Group([])
            groups.append(group.tiles)
            alike.append(group)
            del alike[:-_OPEN]
        group.add(tile)
    return groups


_OPEN = 8
"""So many groups of a kind are looked at for one that takes a tile."""


@dataclass
class _Group:
    tiles: list[Tile]
    ends: dict[int | None, tuple[int, int]] = field(default_factory=dict)

    def takes(self, tile: Tile) -> bool:
        queries, keys = self.ends.get(tile.sample, (0, 0))
        return bool(queries <= tile.queries.start and keys <= tile.keys.start)

    def add(self, tile: Tile) -> None:
        self.tiles.append(tile)
        self.ends[tile.sample] = tile.queries.stop, tile.keys.stop


def _padded(length: int) -> int:
    """One of few lengths: at most a quarter longer, from 32 on."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def _case(base: TileCase, tile: Tile, window: Window | None = None) -> TileCase:
    window = Window(tile.left, tile.right) if window is None else window
    return base._replace(num_queries=tile.num_queries, num_keys=tile.num_keys, window=window)
