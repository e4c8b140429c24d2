"""Keys and values of a sequence that grows, spread over ranks: each keeps its own, and none moves.

Note [Pages]
    A rank's tokens of a sample lie in pages of so many slots, [G, page, D]. Pages are made when they are needed,
    several at once where much comes at once; what is in them stays where it is, however long a sequence grows. Those
    made together lie together, and are one slab for a kernel; a long prompt is one. Pages made one by one are more
    each time, an eighth of what is there: so there are few slabs, and little room is left empty.

    Each sample of a batch has pages for as long as it is. Samples that need as many at once get them side by side, in
    [B, G, pages * page, D], and a kernel computes with all of them in one call.

    In a layer with a sliding window pages that no later query of a sample sees are used again for its later tokens.

Shapes: B batch, G key/value heads, T tokens, D key head size, V value head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.inference.interleave import Interleaved, Span


class Slab(NamedTuple):
    """Keys [b, G, n, D] and values [b, G, n, V] that lie together: views of the cache.

    samples: whose they are, b of them side by side. slots: which; of some samples there may be fewer.
    """

    k: Tensor
    v: Tensor
    samples: slice
    slots: Span


@dataclass(frozen=True, eq=False)
class _Made:
    """Pages that were made together, [b, G, pages * page, D]. number: in which order."""

    k: Tensor
    v: Tensor
    number: int


class _Page(NamedTuple):
    """A page of a sample. made: with which others. row, number: the row there, and which of its pages."""

    made: _Made
    row: int
    number: int


@dataclass
class _Table:
    """The pages of a sample, by their numbers in the sequence; None for what was given back. free: to be used again."""

    pages: list[_Page | None] = field(default_factory=list)
    free: list[_Page] = field(default_factory=list)


class _Piece(NamedTuple):
    """Slots of a sample that lie together: from a place in a row of pages on."""

    made: _Made
    row: int
    place: int
    slots: Span


class ShardedKVCache:
    """What a rank keeps of the keys and values of all layers.

    batch: B. rank, size: this rank among those that share the sequences. windows: of each layer, the latest positions
    that a query sees, itself among them; None for all. interleave, firsts: see interleave.py; a rank for each sample,
    or one for all. page: slots of a page.

    Raises ValueError for sizes and windows below 1, and firsts that are not one for each sample.
    """

    def __init__(
        self,
        batch: int,
        windows: Sequence[int | None],
        *,
        rank: int = 0,
        size: int = 1,
        interleave: int = 64,
        firsts: Sequence[int] = (0,),
        page: int = 256,
    ) -> None:
        for name, number in (("batch", batch), ("size", size), ("interleave", interleave), ("page", page)):
            if number < 1:
                raise ValueError(f"{name}={number} of a K/V cache is below 1; give 1 or more.")
        if not 0 <= rank < size:
            raise ValueError(f"there is no rank {rank} among {size}; give one from 0 to {size - 1}.")
        if min((window for window in windows if window is not None), default=1) < 1:
            raise ValueError(f"windows={tuple(windows)}: a query sees itself; give 1 or more, or None for all.")
        if len(firsts) not in (1, batch):
            raise ValueError(f"firsts={tuple(firsts)} for {batch} samples; give one rank, or one for each sample.")
        self.batch, self.rank, self.size, self.interleave, self.page = batch, rank, size, interleave, page
        self.firsts = tuple(firsts)
        self.windows = tuple(windows)
        self._layers = [_Layer(batch, page, f"layer {number}") for number in range(len(self.windows))]
        self._lengths = [[0] * batch for _ in self.windows]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each sample that all layers have, over all ranks."""
        return tuple(map(min, zip(*self._lengths, strict=True))) if self._lengths else (0,) * self.batch

    @property
    def nbytes(self) -> int:
        """Memory of this rank's pages."""
        return sum(layer.nbytes for layer in self._layers)

    def layout(self, spans: Sequence[Span], *, aligned: bool = False) -> Interleaved:
        """Who keeps which of these positions of each sample."""
        return Interleaved(self.size, tuple(spans), self.interleave, self.firsts, aligned)

    def keys(self, layer: int, new: Sequence[Span]) -> Interleaved:
        """What queries at the positions `new` may see in a layer, the earlier ones and themselves, as `view` gives it.

        The same on all ranks.
        """
        window = self.windows[layer]
        seen = [Span(0 if window is None else max(0, span.start - window + 1), span.stop) for span in new]
        return self.layout(seen, aligned=True)

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor, new: Sequence[Span], *, whole: bool = False) -> None:
        """Keep the tokens at the positions `new` of each sample, which follow those that are there.

        k: [B, G, T, D], v: [B, G, T, V]. They are those of this rank, each sample's from 0 on, as `layout(new)` has
        them; or all tokens, where `whole`, of which this rank takes its own.

        Raises ValueError for positions that leave a gap or are there already, and for other shapes or another dtype.
        """
        self._check(layer, k, v, new, whole)
        layout, at = self.layout(new), self._layers[layer]
        self._release(layer, new)
        if whole:
            k, v = (self._own(x, layout) for x in (k, v))
        at.write(k, v, self._slots(layout))
        self._lengths[layer] = [span.stop for span in new]

    def slabs(self, layer: int, seen: Interleaved) -> list[Slab]:
        """This rank's keys and values of `keys(...)`, as they lie, see Note [Pages]: nothing is copied.

        Raises ValueError for positions that have not been appended: what is in their place is nobody's.
        """
        if len(seen.spans) != self.batch:
            raise ValueError(f"keys of {len(seen.spans)} samples of a cache of {self.batch}; give spans for all.")
        for sample, (span, length) in enumerate(zip(seen.spans, self._lengths[layer], strict=True)):
            if span.stop > length:
                raise ValueError(
                    f"sample {sample}: keys up to position {span.stop} are asked for, and layer {layer} of the cache "
                    f"has {length}; append them first."
                )
        return self._layers[layer].slabs(self._slots(seen))

    def view(self, layer: int, seen: Interleaved) -> tuple[Tensor, Tensor]:
        """This rank's keys [B, G, T, D] and values [B, G, T, V] of `keys(...)`; copied where they lie apart.

        What a sample has none of, where others do, is whatever it is: `seen` does not name it.
        """
        found, at = self.slabs(layer, seen), self._layers[layer]
        first, num_tokens = seen.base(self.rank, 0), seen.num_tokens(self.rank)
        slots = Span(first, first + num_tokens)
        if len(found) == 1 and (found[0].samples, found[0].slots) == (slice(0, self.batch), slots):
            return found[0].k, found[0].v
        k, v = at.room(num_tokens)
        for each in found:
            there = slice(each.slots.start - first, each.slots.stop - first)
            k[each.samples, :, there], v[each.samples, :, there] = each.k, each.v
        return k, v

    def _slots(self, layout: Interleaved) -> list[Span]:
        """Of each sample on this rank."""
        return [layout.slots(self.rank, sample) for sample in range(self.batch)]

    def _own(self, x: Tensor, layout: Interleaved) -> Tensor:
        """This rank's part of all tokens [B, H, T, D], each sample's from 0 on."""
        places = torch.zeros(self.batch, layout.num_tokens(self.rank), dtype=torch.int64)
        for sample, span in enumerate(layout.spans):
            for place, position in enumerate(layout.positions(self.rank, sample)):
                places[sample, place] = position - span.start
        return x.gather(2, places.to(x.device)[:, None, :, None].expand(-1, x.size(1), -1, x.size(3)))

    def _release(self, layer: int, new: Sequence[Span]) -> None:
        """Give pages back that no query from `new` on sees."""
        if self.windows[layer] is not None:
            self._layers[layer].release([slots.start for slots in self._slots(self.keys(layer, new))])

    def _check(self, layer: int, k: Tensor, v: Tensor, new: Sequence[Span], whole: bool) -> None:
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        if len(new) != self.batch or k.dim() != 4 or k.size(0) != self.batch or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"{shapes} for {len(new)} samples in a cache of {self.batch}; give k [B, G, T, D], v [B, G, T, V] and "
                f"a span of positions for each of B={self.batch} samples."
            )
        for sample, (span, length) in enumerate(zip(new, self._lengths[layer], strict=True)):
            if span.start != length or span.stop < span.start:
                wrong = "leave a gap after" if span.start > length else "overlap"
                raise ValueError(
                    f"sample {sample}: positions {span.start} to {span.stop} {wrong} the {length} that layer {layer} "
                    f"of the cache has; append from {length} on."
                )
        self._layers[layer].check(k, v, shapes)
        own = self.layout(new).num_tokens(self.rank)
        every = max(span.stop - span.start for span in new)
        if k.size(2) != (every if whole else own):
            raise ValueError(
                f"{shapes}: of up to {every} new tokens of a sample rank {self.rank} of {self.size} keeps {own} "
                f"(interleave={self.interleave}); give these, or all {every} with whole=True."
            )


class _Layer:
    """The pages of one layer, see Note [Pages]. name: in messages."""

    def __init__(self, batch: int, page: int, name: str) -> None:
        self._page, self._name = page, name
        self._tables = [_Table() for _ in range(batch)]
        self._sample: tuple[Tensor, Tensor] | None = None
        self._bytes = self._times = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def check(self, k: Tensor, v: Tensor, shapes: str) -> None:
        """Raise ValueError for others than those that are there."""
        if self._sample is None:
            return
        for name, x, known in zip("kv", (k, v), self._sample, strict=True):
            if (x.size(1), x.size(3), x.dtype, x.device) != (known.size(1), known.size(3), known.dtype, known.device):
                raise ValueError(
                    f"{shapes}: {self._name} of the cache has {name} of {known.size(1)} heads of {known.size(3)} in "
                    f"{known.dtype} on {known.device}, not {x.dtype} on {x.device}; make a cache for each model."
                )

    def room(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many tokens of all samples, with nothing in them yet."""
        assert self._sample is not None, "nothing was appended"
        k, v = self._sample
        of_all = (len(self._tables), k.size(1), num_tokens)
        return k.new_empty((*of_all, k.size(3))), v.new_empty((*of_all, v.size(3)))

    def write(self, k: Tensor, v: Tensor, slots: Sequence[Span]) -> None:
        """Put tokens [B, G, T, ...], each sample's from 0 on, into these slots of each sample."""
        if self._sample is None:
            self._sample = k.new_empty((0, k.size(1), 0, k.size(3))), v.new_empty((0, v.size(1), 0, v.size(3)))
        self._reserve([each.stop for each in slots], k, v)
        for there in self.slabs(slots, alike=True):
            first = there.slots.start - slots[there.samples.start].start
            tokens = slice(first, first + there.slots.stop - there.slots.start)
            for target, x in (there.k, k), (there.v, v):
                target.copy_(x[there.samples, :, tokens])

    def release(self, slots: Sequence[int]) -> None:
        """Give back each sample's pages before the one of a slot."""
        for table, slot in zip(self._tables, slots, strict=True):
            for number in range(min(slot // self._page, len(table.pages))):
                page = table.pages[number]
                if page is not None:
                    table.free.append(page)
                    table.pages[number] = None
            table.free.sort(key=lambda page: (page.made.number, page.number))

    def slabs(self, slots: Sequence[Span], *, alike: bool = False) -> list[Slab]:
        """What is in these slots of each sample, as few slabs as the pages allow.

        alike: samples share one only where their slots begin and end together.
        """
        open_: list[tuple[slice, _Piece]] = []
        done: list[tuple[slice, _Piece]] = []
        for sample, wanted in enumerate(slots):
            still: list[tuple[slice, _Piece]] = []
            for piece in self._pieces(sample, wanted):
                beside = next((each for each in open_ if _side_by_side(each, sample, piece)), None)
                if beside is None or (alike and wanted != slots[beside[0].start]):
                    still.append((slice(sample, sample + 1), piece))
                else:
                    open_.remove(beside)
                    still.append((slice(beside[0].start, sample + 1), _joined(beside[1], piece)))
            done += open_
            open_ = still
        return [self._slab(*each) for each in (*done, *open_)]

    def _pieces(self, sample: int, slots: Span) -> Iterator[_Piece]:
        """Slots of a sample whose pages lie together."""
        pages, start = self._tables[sample].pages, slots.start
        while start < slots.stop:
            number = start // self._page
            page = first = pages[number]
            assert first is not None, "a query sees what was given back"
            while (number + 1) * self._page < slots.stop:
                after = pages[number + 1]
                if after is None or page is None or after.made is not page.made or after.number != page.number + 1:
                    break
                page, number = after, number + 1
            stop = min(slots.stop, (number + 1) * self._page)
            place = first.number * self._page + start % self._page
            yield _Piece(first.made, first.row, place, Span(start, stop))
            start = stop

    def _slab(self, samples: slice, piece: _Piece) -> Slab:
        count, rows = piece.slots.stop - piece.slots.start, samples.stop - samples.start
        k, v = (x.narrow(0, piece.row, rows).narrow(2, piece.place, count) for x in (piece.made.k, piece.made.v))
        return Slab(k, v, samples, piece.slots)

    def _reserve(self, slots: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Have pages for so many slots of each sample."""
        wanted: dict[int, list[tuple[int, _Table]]] = {}
        for each, table in zip(slots, self._tables, strict=True):
            missing = -(-each // self._page) - len(table.pages)
            while missing > 0 and table.free:
                table.pages.append(table.free.pop(0))
                missing -= 1
            if missing > 0:
                held = sum(page is not None for page in table.pages)
                wanted.setdefault(max(missing, held // 8), []).append((missing, table))
        for count, tables in wanted.items():
            self._times += 1
            shape = (len(tables), k.size(1), count * self._page)
            made = _Made(k.new_zeros((*shape, k.size(3))), v.new_zeros((*shape, v.size(3))), self._times)
            self._bytes += made.k.nbytes + made.v.nbytes
            for row, (missing, table) in enumerate(tables):
                pages = [_Page(made, row, number) for number in range(count)]
                table.pages += pages[:missing]
                table.free += pages[missing:]


def _side_by_side(beside: tuple[slice, _Piece], sample: int, piece: _Piece) -> bool:
    """Whether a sample's piece lies in the next row of the same pages, its slots at the same places."""
    samples, other = beside
    return (
        other.made is piece.made
        and other.row + sample - samples.start == piece.row
        and other.place - other.slots.start == piece.place - piece.slots.start
    )


def _joined(one: _Piece, other: _Piece) -> _Piece:
    """From the first slot of both to the last: what lies between is there, and nobody's."""
    start, stop = min(one.slots.start, other.slots.start), max(one.slots.stop, other.slots.stop)
    return one._replace(place=one.place + start - one.slots.start, slots=Span(start, stop))
