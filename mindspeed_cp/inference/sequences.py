"""Which tokens of each sequence a rank holds in inference, and the plans of prefill and decode.

    prefill of 16 new tokens behind 6 cached ones, 2 ranks; the cached ones lie where an earlier turn left them:

    position    0  1  2  3  4  5 | 6 .. 9   10 .. 13   14 .. 17   18 .. 21
    keys        0  0  1  1  0  0 |   0         1          1          0       the rank that holds them
    queries                      |   0         1          1          0

New tokens are cut into two chunks for each rank, per sequence, so that all compute as much (Note [Zigzag] in
layouts.py); where the cached ones are does not matter for that. A rank's keys are its cached tokens, then its new ones.
Sequences of a batch have any lengths: tensors are padded at the end to the longest on a rank, and no run covers the
padding, so that it is never computed with.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mindspeed_cp.layouts import Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan, Band, Layout, Run, joined

Ends = tuple[int, int]
"""Where positions of a sequence begin and end, first..stop, the last excluded; a Span is one (interleave.py)."""


@dataclass(frozen=True)
class Spans:
    """Spans of each sequence on each rank, a plan's Layout.

    held: by rank and sample, ascending. One sample on every rank: all of a batch are alike.

    Raises ValueError where ranks have different numbers of samples, or spans are empty or do not ascend.
    """

    held: tuple[tuple[tuple[Ends, ...], ...], ...]

    def __post_init__(self) -> None:
        samples = {len(held) for held in self.held}
        if len(samples) != 1 or 0 in samples:
            raise ValueError(
                f"ranks hold spans of {sorted(samples)} samples; give each rank an entry for every sample."
            )
        for rank, held in enumerate(self.held):
            for sample, spans in enumerate(held):
                ends = [0, *(end for span in spans for end in span)]
                if ends != sorted(ends) or any(first == stop for first, stop in spans):
                    raise ValueError(
                        f"rank {rank} holds {spans} of sample {sample}; give spans first..stop, ascending, not empty."
                    )

    @property
    def num_ranks(self) -> int:
        """See Layout."""
        return len(self.held)

    @property
    def num_samples(self) -> int:
        """How many are told apart; 1 where all are alike."""
        return len(self.held[0])

    def length(self, rank: int, sample: int) -> int:
        """Tokens of one sample on a rank."""
        return sum(stop - first for first, stop in self.held[rank][sample if self.num_samples > 1 else 0])

    def num_tokens(self, rank: int) -> int:
        """See Layout: of the longest sample."""
        return max(self.length(rank, sample) for sample in range(self.num_samples))

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        runs: list[Run] = []
        for number, spans in enumerate(self.held[rank]):
            sample, start = (number if self.num_samples > 1 else None), 0
            for first, stop in spans:
                runs.append(Run(start, start + stop - first, first, number, sample))
                start += stop - first
        return joined(runs)

    @classmethod
    def of(cls, layout: Layout, num_samples: int) -> "Spans":
        """The spans of any layout whose documents are the samples of a batch, each sample by itself.

        Raises ValueError where the layout has other numbers of samples.
        """
        last = max((run.sample or 0 for rank in range(layout.num_ranks) for run in layout.runs(rank)), default=0)
        # Of other layouts the last samples may have nothing; spans that are one sample are those of all.
        known = layout.num_samples if isinstance(layout, Spans) and layout.num_samples > 1 else last + 1
        if known > num_samples or (isinstance(layout, Spans) and 1 < known < num_samples):
            raise ValueError(f"keys are those of {known} sequences, and new tokens of {num_samples}; give both of all.")
        held = []
        for rank in range(layout.num_ranks):
            spans: list[list[Ends]] = [[] for _ in range(num_samples)]
            for run in layout.runs(rank):
                span = run.position, run.position + run.stop - run.start
                for sample in range(num_samples) if run.sample is None else (run.sample,):
                    spans[sample].append(span)
            held.append(tuple(map(tuple, spans)))
        return cls(tuple(held))


def prefill_plan(
    new: Sequence[int],
    num_ranks: int,
    *,
    cached: Layout | None = None,
    bands: tuple[Band, ...] = CAUSAL,
) -> AttentionPlan:
    """The plan of new tokens behind cached ones.

    new: how many of each sequence of the batch, 0 or more. cached: who holds which positions of the tokens before
    them, from 0 on without a gap; its documents are the batch's samples. bands: what a query sees of its sequence.

    Raises ValueError where cached positions leave a gap or are held twice, or ranks do not agree in number.
    """
    new = [operator.index(length) for length in new]
    if not new or min(new) < 0:
        raise ValueError(f"new={new} tokens of each sequence: give one number or more, 0 or above.")
    before = Spans(((((),) * len(new)),) * num_ranks) if cached is None else Spans.of(cached, len(new))
    if before.num_ranks != num_ranks:
        raise ValueError(f"cached tokens lie on {before.num_ranks} ranks, and there are {num_ranks}; give all of them.")
    firsts = [_end_of_held(before, sample, 0) for sample in range(len(new))]
    dealt = [_zigzag(length, num_ranks, first) for length, first in zip(new, firsts, strict=True)]
    queries = tuple(tuple(each[rank] for each in dealt) for rank in range(num_ranks))
    keys = tuple(
        tuple(old + more for old, more in zip(before.held[rank], queries[rank], strict=True))
        for rank in range(num_ranks)
    )
    if all(
        len(set(rank_queries)) == len(set(rank_keys)) == 1
        for rank_queries, rank_keys in zip(queries, keys, strict=True)
    ):
        queries, keys = tuple(held[:1] for held in queries), tuple(held[:1] for held in keys)
    return AttentionPlan(Spans(queries), Spans(keys), bands)


def decode_plan(new: Sequence[Ends], keys: Layout, *, bands: tuple[Band, ...] = CAUSAL) -> AttentionPlan:
    """The plan of queries that all ranks come to, over the keys that each holds; for decode_attention.

    new: positions of each sequence's queries. keys: who holds which positions, those of the queries included; its
    documents are the batch's samples. The queries are those of one rank, number 0.

    Raises ValueError where positions leave a gap or are held twice, and where those of queries are not held.
    """
    spans = Spans.of(keys, len(new))
    for sample, (_, stop) in enumerate(new):
        held = [ends for each in spans.held for ends in each[sample]]
        end = _end_of_held(spans, sample, min(held)[0] if held else 0)
        if stop > end:
            raise ValueError(f"position {end} of sequence {sample} has queries and is held by no rank; give its keys.")
    return AttentionPlan(Spans((tuple((span,) for span in new),)), spans, bands)


def everything(num_queries: int, num_keys: int) -> AttentionPlan:
    """The plan of one rank all of whose queries see all of its keys."""
    return AttentionPlan(_stretch(num_queries), _stretch(num_keys), FULL)


def take(x: Tensor, layout: Layout, rank: int) -> Tensor:
    """What a rank holds of x [B, H, S, D], whose tokens are at their positions, 0 where it is padded.

    Raises ValueError where x does not reach to all of them.
    """
    _check_reach(x, layout, rank)
    held = x.new_zeros(*x.shape[:2], layout.num_tokens(rank), *x.shape[3:])
    for run, samples in _runs(layout, rank):
        held[samples, :, run.start : run.stop] = x[samples, :, run.position : run.position + run.stop - run.start]
    return held


def put(held: Tensor, x: Tensor, layout: Layout, rank: int) -> None:
    """Write what a rank holds [B, H, s, D] to its positions in x [B, H, S, D]. Raises ValueError as `take`."""
    _check_reach(x, layout, rank)
    for run, samples in _runs(layout, rank):
        x[samples, :, run.position : run.position + run.stop - run.start] = held[samples, :, run.start : run.stop]


def _runs(layout: Layout, rank: int) -> list[tuple[Run, slice]]:
    every = slice(None)
    return [(run, every if run.sample is None else slice(run.sample, run.sample + 1)) for run in layout.runs(rank)]


def _check_reach(x: Tensor, layout: Layout, rank: int) -> None:
    runs = layout.runs(rank)
    positions = max((run.position + run.stop - run.start for run in runs), default=0)
    samples = max((run.sample + 1 for run in runs if run.sample is not None), default=0)
    if x.size(0) < samples or x.size(2) < positions:
        raise ValueError(
            f"{tuple(x.shape)} has {x.size(2)} positions of {x.size(0)} sequences, and the layout {positions} of "
            f"{samples or x.size(0)}; give the whole tensor [B, H, S, D]."
        )


def _stretch(length: int) -> Spans:
    return Spans(((((0, length),) if length else (),),))


def _zigzag(length: int, num_ranks: int, first: int) -> list[tuple[Ends, ...]]:
    """The spans of each rank of so many tokens from a position on."""
    if not length:
        return [()] * num_ranks
    runs = map(Zigzag(num_ranks, ((length,),)).runs, range(num_ranks))
    return [tuple((first + run.position, first + run.position + run.stop - run.start) for run in each) for each in runs]


def _end_of_held(cached: Spans, sample: int, end: int) -> int:
    """Where a sequence's tokens end that are held from a position on."""
    held = sorted((span, rank) for rank in range(cached.num_ranks) for span in cached.held[rank][sample])
    for (first, stop), rank in held:
        if first != end:
            what = "is held by no rank" if first > end else f"is held twice, by rank {rank} too"
            raise ValueError(
                f"position {min(first, end)} of sequence {sample} {what}; give all up to the last one, each once."
            )
        end = stop
    return end
