"""Documents as users say them, cu_seqlens, document ids, masks and windows, as lengths and bands.

Shapes: B samples, S tokens of a whole sample.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from numbers import Real
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from mindspeed_cp.layouts import integer
from mindspeed_cp.messages import or_list, short
from mindspeed_cp.plan import CAUSAL, FULL, Band

MaskType = Literal["causal", "full", "prefix"]
WindowSize = tuple[int, int]
BandsOf = tuple[tuple[int, tuple[Band, ...]], ...]
Samples = tuple[tuple[int, ...], ...]


class Array(Protocol):
    """A tensor or a NumPy array."""

    def tolist(self) -> Any:
        """Its numbers."""
        ...


Numbers = Sequence[int] | Array
"""Numbers in a list, or in a tensor on the CPU or an array, of int32 or int64."""


def lengths_of(cu_seqlens: Numbers | Sequence[Numbers], padded: Numbers | Sequence[Numbers] | None = None) -> Samples:
    """The lengths of each sample's documents; with padding, of documents and what pads them in turn.

    cu_seqlens: [documents + 1], where they begin and end, or one for each of B samples. padded: the same in a stream
    that holds padding after each document. Raises ValueError for numbers that are no such places.
    """
    lengths = [_lengths(ends, "cu_seqlens") for ends in _ends(cu_seqlens, "cu_seqlens")]
    if padded is not None:
        whole = [_lengths(ends, "cu_seqlens_padded") for ends in _ends(padded, "cu_seqlens_padded")]
        lengths = _with_padding(lengths, whole)
    return tuple(map(tuple, lengths))


def cu_seqlens_of(document_ids: Numbers | Sequence[Numbers]) -> list[list[int]]:
    """Where documents begin and end, for each sample, as `PackedBatch.from_cu_seqlens` takes it.

    document_ids: [S] or [B, S]: of each token, any integers; the tokens of a document lie side by side.
    """
    return [_ends_of_ids(ids) for ids in _rows(document_ids, "document_ids")]


def _ends_of_ids(ids: list[int]) -> list[int]:
    ends = [0, *(place for place in range(1, len(ids)) if ids[place] != ids[place - 1]), len(ids)]
    first: dict[int, int] = {}
    for start in ends[:-1]:
        if start < len(ids) and first.setdefault(ids[start], start) != start:
            raise ValueError(
                f"document_ids: document {ids[start]} begins at token {first[ids[start]]} and again at token {start}; "
                f"the tokens of a document lie side by side: give the later ones an id of their own."
            )
    return ends if ids else [0]


def _rows(numbers: Any, name: str) -> list[list[int]]:
    """The numbers of each sample; one row where they are for all samples."""
    listed = list(_items(numbers, name))
    if not any(map(_is_row, listed)):
        return [_integers(listed, name)]
    if not all(map(_is_row, listed)):
        raise ValueError(f"{name} holds numbers beside lists of them; give one list for all samples, or one for each.")
    return [_integers(_items(each, name), name) for each in listed]


def _is_row(item: Any) -> bool:
    """Whether it holds items, as a list does, or an array of one dim and more."""
    if isinstance(item, Sequence):
        return not isinstance(item, str | bytes)
    return bool(getattr(item, "ndim", False))


def _items(numbers: Any, name: str) -> Sequence[Any]:
    """What a list, an array or a tensor holds, if it may hold integers."""
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str | bytes)
    if not listed and not (hasattr(numbers, "tolist") and getattr(numbers, "ndim", False)):
        raise ValueError(f"{name} is {short(numbers)}; give integers in a list, an array or a tensor on the CPU.")
    if isinstance(numbers, Tensor) and numbers.device.type != "cpu":
        raise ValueError(
            f"{name} is on {numbers.device}, and who holds what is worked out on the CPU, which would wait for that "
            f"device; give it as the data loader has it, or {name}.cpu()."
        )
    dtype = str(getattr(numbers, "dtype", "int64")).removeprefix("torch.")
    if dtype not in ("int32", "int64"):
        raise ValueError(f"{name} is of {dtype}; it counts tokens: give int32 or int64.")
    items: Sequence[Any] = numbers if listed else numbers.tolist()
    return items


def _integers(items: Sequence[Any], name: str) -> list[int]:
    numbers = []
    for each in items:
        # Most are int, and a batch has thousands.
        number = each if type(each) is int else integer(each)
        if _is_row(each):
            raise ValueError(f"{name} holds lists of {short(each)}; give one of integers for all samples, or for each.")
        if number is None:
            raise ValueError(f"{name} holds {short(each)}; it counts tokens: give integers.")
        numbers.append(number)
    return numbers


def ranks_of(num_ranks: Any) -> int:
    """The number of ranks. Raises ValueError for what is no integer."""
    number = integer(num_ranks)
    if number is None:
        raise ValueError(f"num_ranks={short(num_ranks)} is no integer; give the size of the context-parallel group.")
    return number


def tokens_of(tokens: Any) -> tuple[int, ...] | None:
    """How many tokens each rank holds. Raises ValueError for what are no integers."""
    return None if tokens is None else tuple(_integers(_items(tokens, "tokens"), "tokens"))


def _ends(cu_seqlens: Numbers | Sequence[Numbers], name: str) -> list[list[int]]:
    """Where each sample's documents begin and end; what fills up the rows of a matrix is left out."""
    rows = _rows(cu_seqlens, name)
    if len(getattr(cu_seqlens, "shape", ())) == 2:
        for row in rows:
            while len(row) > 1 and row[-2] == row[-1]:
                row.pop()
    return rows


def _lengths(ends: list[int], name: str) -> list[int]:
    if not ends or ends[0] != 0:
        raise ValueError(f"{name} begins with {ends[0] if ends else 'nothing'}; give 0, where the first document does.")
    for place, (earlier, later) in enumerate(pairwise(ends), start=1):
        if later < earlier:
            raise ValueError(
                f"{name}[{place}] = {later} comes after {earlier}, and documents follow each other; sort it, or sum "
                f"the lengths with itertools.accumulate(lengths, initial=0)."
            )
        if later == earlier:
            raise ValueError(f"{name}[{place}] = {later} ends a document of no tokens; leave that document out.")
    return [later - earlier for earlier, later in pairwise(ends)]


def _with_padding(lengths: list[list[int]], padded: list[list[int]]) -> list[list[int]]:
    """Documents and what pads them, in turn."""
    if list(map(len, lengths)) != list(map(len, padded)):
        raise ValueError(
            f"cu_seqlens has {_counts(lengths)} documents and cu_seqlens_padded {_counts(padded)}; both have the same, "
            f"sample by sample."
        )
    for number, (length, whole) in enumerate(zip(chain(*lengths), chain(*padded), strict=True)):
        if whole < length:
            raise ValueError(
                f"document {number} has {length} tokens by cu_seqlens and {whole} by cu_seqlens_padded, which counts "
                f"its padding too; give {length} or more."
            )
    return [
        [part for length, whole in zip(*sample, strict=True) for part in (length, whole - length)]
        for sample in zip(lengths, padded, strict=True)
    ]


def _counts(lengths: list[list[int]]) -> str:
    return " + ".join(str(len(each)) for each in lengths)


def bands_of_documents(
    samples: Samples,
    padded: bool,
    mask_type: MaskType | Sequence[MaskType | None] | None,
    window_size: WindowSize | Sequence[WindowSize | None] | None,
    prefix_lengths: int | Sequence[int | None] | None,
) -> tuple[tuple[Band, ...], BandsOf]:
    """What most documents see, and what the others do, by their number; padding sees nothing."""
    mask_type, window_size, prefix_lengths = map(_plain, (mask_type, window_size, prefix_lengths))
    every = 2 if padded else 1
    lengths = [length for documents in samples for length in documents[::every]]
    masks = _of_each(mask_type, len(lengths), "mask_type", mask_type is None or isinstance(mask_type, str))
    one_window = not isinstance(window_size, list | tuple) or all(isinstance(each, Real) for each in window_size)
    windows = _of_each(window_size, len(lengths), "window_size", one_window)
    one_prefix = not isinstance(prefix_lengths, list | tuple)
    prefixes = _of_each(prefix_lengths, len(lengths), "prefix_lengths", one_prefix)
    if prefix_lengths is not None and "prefix" not in masks:
        raise ValueError(
            f"prefix_lengths={prefix_lengths} is for mask_type='prefix', which no document has; give that."
        )
    if not one_prefix:
        _check_prefixes(prefixes, lengths)
    bands = [_bands_of(*each) for each in zip(range(len(lengths)), lengths, masks, windows, prefixes, strict=True)]
    usual = Counter(bands).most_common(1)[0][0] if bands else CAUSAL
    others = [(every * number, each) for number, each in enumerate(bands) if each != usual]
    paddings = [(number, ()) for number in range(1, 2 * len(lengths), 2)] if padded else []
    return usual, tuple(sorted([*others, *paddings]))


def _bands_of(
    number: int, length: int, mask: MaskType | None, window: WindowSize | None, prefix: int | None
) -> tuple[Band, ...]:
    """What a query of one document sees."""
    if window is not None:
        if mask is not None:
            raise ValueError(
                f"document {number} has mask_type={mask!r} beside window_size={window}, and each says what a query "
                f"sees; give one of them: 'causal' is the window (-1, 0)."
            )
        if not _is_window(window):
            raise ValueError(
                f"document {number} has window_size={window}; give (left, right), on each side the number of further "
                f"tokens that are seen, or -1 for all: a causal window of W tokens is (W - 1, 0)."
            )
        return (band_of(window),)
    if mask == "prefix":
        first = integer(prefix)
        if first is None or not 0 <= first <= length:
            raise ValueError(
                f"document {number} of {length} tokens has mask_type='prefix' and a prefix of {prefix}; give 0 to "
                f"{length} in prefix_lengths."
            )
        return (Band(None, None, (0, first)), Band(None, 0, (first, None)))
    if mask not in (None, "causal", "full"):
        raise ValueError(f"mask_type={mask!r} is unknown; give {or_list(get_args(MaskType))}, or a window_size.")
    return FULL if mask == "full" else CAUSAL


def band_of(window: WindowSize) -> Band:
    """What a query sees under a window: so many tokens before it and behind it, -1 being all."""
    left, right = map(int, window)
    return Band(None if left == -1 else left, None if right == -1 else right)


def _is_window(window: Any) -> bool:
    return isinstance(window, list | tuple) and len(window) == 2 and all(_is_side(each) for each in window)


def _is_side(value: Any) -> bool:
    number = integer(value)
    return number is not None and number >= -1


def _of_each(value: Any, count: int, name: str, for_all: bool) -> list[Any]:
    """The value of each document. for_all: whether it is one for all of them."""
    if for_all:
        return [value] * count
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={short(value)} is for no document; give one for all, or a list with one for each.")
    if len(value) != count:
        raise ValueError(f"{name} is for {len(value)} documents, and the batch has {count}; give one for each, or one.")
    return list(value)


def _check_prefixes(prefixes: list[Any], lengths: list[int]) -> None:
    """Raise ValueError for a prefix that its document cannot have, whether its mask asks for one or not."""
    for number, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        if prefix is not None and not 0 <= (-1 if (first := integer(prefix)) is None else first) <= length:
            raise ValueError(
                f"document {number} of {length} tokens has a prefix of {short(prefix)}; give 0 to {length} in "
                f"prefix_lengths, or None where its mask is another."
            )


def _plain(value: Any) -> Any:
    """What users say in tensors and arrays, in lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        plain = map(_plain, value)
        return list(plain) if isinstance(value, list) else tuple(plain)
    return value
