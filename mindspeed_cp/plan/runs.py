"""Who holds what: the tokens of each rank, as runs of the documents of a stream."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Run(NamedTuple):
    """Tokens start..stop of one rank, the last excluded: the positions `position`.. of one document of one sample.

    document: numbered in the order of the stream. sample: its index in the batch; None where all samples are alike.
    """

    start: int
    stop: int
    position: int
    document: int = 0
    sample: int | None = None


class Layout(Protocol):
    """Who holds what. A rank's tokens are in the order of the stream: by sample, document and position."""

    @property
    def num_ranks(self) -> int:
        """Ranks that hold something, or could."""
        ...

    def num_tokens(self, rank: int) -> int:
        """Tokens of a sample that `rank` holds."""
        ...

    def runs(self, rank: int) -> tuple[Run, ...]:
        """What `rank` holds, in its order."""
        ...


class Part(NamedTuple):
    """Tokens start..stop of the shard of a group's member."""

    member: int
    start: int
    stop: int


@dataclass(frozen=True)
class GroupedLayout:
    """What groups of ranks hold together, each group's tokens in the order of the stream.

    groups: the ranks of `layout` in each, by their place in the group.
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    _placed: dict[int, tuple[tuple[Run, Part], ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_ranks(self) -> int:
        """See Layout: the groups."""
        return len(self.groups)

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        return sum(self.layout.num_tokens(member) for member in self.groups[rank])

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        return joined(run for run, _ in self._in_order(rank))

    def parts(self, rank: int) -> dict[int | None, tuple[Part, ...]]:
        """For each sample the parts of its members' shards that give the group's tokens when put one after another."""
        parts: dict[int | None, list[Part]] = {}
        for run, part in self._in_order(rank):
            before = parts.setdefault(run.sample, [])
            if before and before[-1].member == part.member and before[-1].stop == part.start:
                part = before.pop()._replace(stop=part.stop)
            before.append(part)
        return {sample: tuple(each) for sample, each in parts.items()}

    def _in_order(self, rank: int) -> tuple[tuple[Run, Part], ...]:
        """A group's runs in the order of the stream, by the tokens that they will be, and where each comes from."""
        if rank not in self._placed:
            held = [
                (run, Part(place, run.start, run.stop))
                for place, member in enumerate(self.groups[rank])
                for run in self.layout.runs(member)
            ]
            held.sort(key=lambda item: (item[0].sample or 0, item[0].document, item[0].position))
            placed, sample, start = [], None, 0
            for run, part in held:
                if run.sample != sample:
                    sample, start = run.sample, 0
                stop = start + run.stop - run.start
                placed.append((run._replace(start=start, stop=stop), part))
                start = stop
            self._placed[rank] = tuple(placed)
        return self._placed[rank]


def total_tokens(layout: Layout) -> int:
    """Tokens of a sample that all ranks hold together."""
    return sum(map(layout.num_tokens, range(layout.num_ranks)))


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same tokens in as few runs as possible."""
    result: list[Run] = []
    end, last = -1, 0
    of: tuple[int, int | None] = 0, None
    for run in runs:
        start, stop, position, document, sample = run
        if stop <= start:
            continue
        if start == end and position == last and (document, sample) == of:
            start, _, position, _, _ = result.pop()
            run = Run(start, stop, position, document, sample)
        result.append(run)
        end, last, of = stop, position + stop - start, (document, sample)
    return tuple(result)


def check_runs(layout: Layout, *, whole: bool = True) -> None:
    """Raise ValueError unless every token of every rank is in one run, and every position of a document in one rank.

    whole: whether the latter is asked; queries may be those of some positions alone.
    """
    held: dict[tuple[int | None, int], list[tuple[int, int, int]]] = {}
    for rank in range(layout.num_ranks):
        runs, num_tokens = layout.runs(rank), layout.num_tokens(rank)
        place: dict[int | None, Run] = {}
        for run in runs:
            before = place.get(run.sample)
            expected = before.stop if before else 0
            if run.start != expected or run.stop <= run.start:
                raise ValueError(
                    f"rank {rank}: {run} does not begin at token {expected}, where the run before it ends, or is "
                    f"empty; runs hold each token once, in order."
                )
            if before and (before.document, before.position) >= (run.document, run.position):
                raise ValueError(f"rank {rank}: {run} comes after {before}; runs go by document and position.")
            place[run.sample] = run
            last = run.position + run.stop - run.start
            held.setdefault((run.sample, run.document), []).append((run.position, last, rank))
        if None in place and len(place) > 1:
            raise ValueError(f"rank {rank}: some runs are of all samples and some of one; give each a sample, or none.")
        for sample, run in place.items():
            if run.stop != num_tokens:
                raise ValueError(
                    f"rank {rank}: runs of sample {sample} end at {run.stop}, of {num_tokens} tokens; give runs of all."
                )
    for (sample, document), parts in held.items() if whole else ():
        parts.sort()
        ends = [0, *(last for _, last, _ in parts)]
        for expected, (first, _, rank) in zip(ends, parts, strict=False):
            if first != expected:
                what = "is held twice" if first < expected else "is held by no rank"
                raise ValueError(
                    f"position {min(first, expected)} of document {document}, sample {sample}, {what}: see rank "
                    f"{rank}; give each position to one rank."
                )


def last_position(run: Run) -> int:
    """Position of its last token."""
    return run.position + run.stop - run.start - 1
