"""Keys and values of a sequence that grows, spread over ranks: each keeps its own, and none moves.

Note [Pages]
    A rank's tokens lie in pages of so many slots, [B, G, page, D], one after another. Pages are made when they are
    needed, several at once where much comes at once; what is in them stays where it is, however long a sequence grows.
    Those made together lie together, and are one stretch of memory for a kernel; a long prompt is one. Pages made one
    by one are more each time, an eighth of what is there: so there are few stretches, and little room is left empty.

    In a layer with a sliding window pages that no later query sees are used again for later tokens.

    A page holds the same slots of all samples: in a batch, of prompts of very different lengths, the longest one says
    how many there are.

Shapes: B batch, G key/value heads, T tokens, D key head size, V value head size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.inference.interleave import Interleaved, Span


class Stretch(NamedTuple):
    """Keys [B, G, n, D] and values [B, G, n, V] that lie together: views of the cache. slots: which."""

    k: Tensor
    v: Tensor
    slots: Span


class _Page(NamedTuple):
    """A page of a slab [B, G, pages * page, D]. slab: in which order it was made. number: of the page in it."""

    k: Tensor
    v: Tensor
    slab: int
    number: int


class ShardedKVCache:
    """What a rank keeps of the keys and values of all layers.

    batch: B. rank, size: this rank among those that share the sequences. windows: of each layer, the latest positions
    that a query sees, itself among them; None for all. interleave, firsts: see interleave.py; a rank for each sample,
    or one for all. page: slots of a page.

    Raises ValueError for sizes below 1, and firsts that are not one for each sample.
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
        if len(firsts) not in (1, batch):
            raise ValueError(f"firsts={tuple(firsts)} for {batch} samples; give one rank, or one for each sample.")
        self.batch, self.rank, self.size, self.interleave, self.page = batch, rank, size, interleave, page
        self.firsts = tuple(firsts)
        self.windows = tuple(windows)
        self._layers = [_Layer(page, f"layer {number}") for number in range(len(self.windows))]
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

    def append(self, layer: int, k: Tensor, v: Tensor, new: Sequence[Span], *, whole: bool = False) -> None:
        """Keep the tokens at the positions `new` of each sample, which follow those that are there.

        k: [B, G, T, D], v: [B, G, T, V]. They are those of this rank, each sample's from 0 on, as `layout(new)` has
        them; or all tokens, where `whole`, of which this rank takes its own.

        Raises ValueError for positions that leave a gap or are there already, and for other shapes or another dtype.
        """
        self._check(layer, k, v, new, whole)
        layout, at = self.layout(new), self._layers[layer]
        self._release(layer, new)
        for sample, span in enumerate(new):
            slots = layout.slots(self.rank, sample)
            if slots.start == slots.stop:
                continue
            if layout.alike and not whole:
                at.write(k, v, slots, slice(None))
                break
            samples = slice(sample, sample + 1)
            if whole:
                places = [position - span.start for position in layout.positions(self.rank, sample)]
                index = torch.tensor(places, device=k.device)
                at.write(
                    k[samples].index_select(2, index), v[samples].index_select(2, index), slots, samples, self.batch
                )
            else:
                at.write(k[samples], v[samples], slots, samples, self.batch)
        at.like(k, v)
        self._lengths[layer] = [span.stop for span in new]

    def stretches(self, layer: int, seen: Interleaved) -> list[Stretch]:
        """This rank's keys and values of `keys(...)`, as they lie, see Note [Pages]: nothing is copied."""
        first = seen.base(self.rank, 0) if seen.num_tokens(self.rank) else 0
        return self._layers[layer].stretches(Span(first, first + seen.num_tokens(self.rank)))

    def view(self, layer: int, seen: Interleaved) -> tuple[Tensor, Tensor]:
        """This rank's keys [B, G, T, D] and values [B, G, T, V] of `keys(...)`; copied where they lie apart.

        What a sample has none of, where others do, is whatever it is: `seen` does not name it.
        """
        found = self.stretches(layer, seen)
        if len(found) == 1:
            return found[0].k, found[0].v
        if not found:
            return self._layers[layer].nothing(self.batch)
        return torch.cat([each.k for each in found], dim=2), torch.cat([each.v for each in found], dim=2)

    def _release(self, layer: int, new: Sequence[Span]) -> None:
        """Give pages back that no query from `new` on sees."""
        if self.windows[layer] is not None:
            seen = self.keys(layer, new)
            # A sample that has nothing here at present may get what it has in these slots later.
            self._layers[layer].release(min(seen.slots(self.rank, sample).start for sample in range(self.batch)))

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

    def __init__(self, page: int, name: str) -> None:
        self._page, self._name = page, name
        self._pages: list[_Page | None] = []
        self._free: list[_Page] = []
        self._sample: tuple[Tensor, Tensor] | None = None
        self._made = self._slabs = 0

    @property
    def nbytes(self) -> int:
        return self._made

    def like(self, k: Tensor, v: Tensor) -> None:
        """Remember of what kind keys and values are."""
        if self._sample is None:
            self._sample = k.new_empty((0, k.size(1), 0, k.size(3))), v.new_empty((0, v.size(1), 0, v.size(3)))

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

    def nothing(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of no tokens."""
        assert self._sample is not None, "nothing was appended"
        k, v = self._sample
        return k.new_empty((batch, *k.shape[1:])), v.new_empty((batch, *v.shape[1:]))

    def write(self, k: Tensor, v: Tensor, slots: Span, samples: slice, rows: int | None = None) -> None:
        """Put tokens [b, G, T, ...] of some samples into these slots. rows: B, that of k by default."""
        self._reserve(slots.stop, k, v, rows or k.size(0))
        start = slots.start
        while start < slots.stop:
            number, within = divmod(start, self._page)
            stop = min(slots.stop, (number + 1) * self._page)
            page = self._pages[number]
            assert page is not None, "nobody writes to what was given back"
            there = page.number * self._page + within
            for slab, x in (page.k, k), (page.v, v):
                slab[samples].narrow(2, there, stop - start).copy_(x.narrow(2, start - slots.start, stop - start))
            start = stop

    def release(self, slot: int) -> None:
        """Give back the pages before the one of a slot."""
        for number in range(min(slot // self._page, len(self._pages))):
            page = self._pages[number]
            if page is not None:
                self._free.append(page)
                self._pages[number] = None
        self._free.sort(key=lambda page: (page.slab, page.number))

    def stretches(self, slots: Span) -> list[Stretch]:
        """What is in these slots, as few stretches as the pages allow."""
        return [self._of_pages(*each) for each in self._together(slots)]

    def _together(self, slots: Span) -> Iterator[tuple[Span, int]]:
        """Slots whose pages lie together, and the page of the first."""
        start = slots.start
        while start < slots.stop:
            number = first = start // self._page
            while (number + 1) * self._page < slots.stop and self._follows(number + 1):
                number += 1
            stop = min(slots.stop, (number + 1) * self._page)
            yield Span(start, stop), first
            start = stop

    def _follows(self, number: int) -> bool:
        before, after = self._pages[number - 1], self._pages[number]
        assert before is not None and after is not None, "a query sees what was given back"
        return before.slab == after.slab and after.number == before.number + 1

    def _of_pages(self, slots: Span, first: int) -> Stretch:
        page = self._pages[first]
        assert page is not None, "a query sees what was given back"
        start = page.number * self._page + slots.start - first * self._page
        k, v = (x.narrow(2, start, slots.stop - slots.start) for x in (page.k, page.v))
        return Stretch(k, v, slots)

    def _reserve(self, slots: int, k: Tensor, v: Tensor, rows: int) -> None:
        """Have pages for so many slots."""
        missing = -(-slots // self._page) - len(self._pages)
        while missing > 0 and self._free:
            self._pages.append(self._free.pop(0))
            missing -= 1
        if missing <= 0:
            return
        held = sum(page is not None for page in self._pages)
        count = max(missing, held // 8)
        self._slabs += 1
        slab_k, slab_v = (x.new_zeros((rows, x.size(1), count * self._page, x.size(3))) for x in (k, v))
        self._made += slab_k.nbytes + slab_v.nbytes
        pages = [_Page(slab_k, slab_v, self._slabs, number) for number in range(count)]
        self._pages += pages[:missing]
        self._free += pages[missing:]
