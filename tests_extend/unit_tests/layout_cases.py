"""Layouts of documents at random."""

import random
from collections.abc import Iterator

from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.layouts import Balanced, Contiguous, DocumentZigzag, PackedLayout, Zigzag
from mindspeed_cp.plan import CAUSAL, FULL, Band
from mindspeed_cp.relayout import gather, relayout
from mindspeed_cp.sharding import shard

Documents = tuple[int, ...]


def cut_at_random(rng: random.Random, length: int) -> Documents:
    lengths = []
    while length:
        lengths.append(rng.randrange(1, length + 1))
        length -= lengths[-1]
    return tuple(lengths)


def random_samples(rng: random.Random, padded: bool) -> tuple[Documents, ...]:
    """Up to three samples of one length, each with documents of its own."""
    length = rng.randrange(1, 40)
    samples = [cut_at_random(rng, length) for _ in range(rng.randrange(1, 4))]
    if padded:
        samples = [tuple(part for n in each for part in _split(rng, n)) for each in samples]
    return tuple(samples)


def _split(rng: random.Random, length: int) -> tuple[int, int]:
    padding = rng.randrange(length)
    return length - padding, padding


def random_layouts(rng: random.Random) -> Iterator[PackedLayout]:
    """One of each rule, all over the same documents."""
    padded, num_ranks = rng.random() < 0.3, rng.randrange(1, 9)
    samples = random_samples(rng, padded)
    tokens = None
    if rng.random() < 0.3:
        places = sorted(rng.randrange(sum(samples[0]) + 1) for _ in range(num_ranks - 1))
        tokens = tuple(b - a for a, b in zip([0, *places], [*places, sum(samples[0])], strict=True))
    bands: tuple[Band, ...] = rng.choice(
        [CAUSAL, FULL, (Band(3, 0),), (Band(None, None, (0, 3)), Band(None, 0, (3, None)))]
    )
    yield Contiguous(num_ranks, samples, tokens, padded)
    yield Zigzag(num_ranks, samples, tokens, padded)
    yield DocumentZigzag(num_ranks, samples, None, padded)
    bands_of = tuple((number, ()) for number in range(1, sum(map(len, samples)), 2)) if padded else ()
    for prefer in ("locality", "balance"):
        yield Balanced(
            num_ranks, samples, tokens, padded, prefer=prefer, chunks=rng.choice([1, 8]), bands=bands, bands_of=bands_of
        )


def relayout_and_back(group, source, target, whole):
    """On a gloo rank: its shard of [B, S, D] by the other layout, and the gradient of the sum of its squares."""
    communicator = ProcessGroupCommunicator(group)
    mine = shard(whole, source, communicator.rank, 1).requires_grad_()
    moved = relayout(mine, source, target, communicator, 1)
    moved.square().sum().backward()
    return moved.detach(), mine.grad


def gather_twice(group, layout, whole):
    """On a gloo rank: why a gather is refused where dtypes differ, and what one gives where they do not."""
    communicator = ProcessGroupCommunicator(group)
    mine = shard(whole, layout, communicator.rank, 1)
    refused = ""
    try:
        gather(mine.int() if communicator.rank == 0 else mine, layout, communicator, 1)
    except ValueError as error:
        refused = str(error)
    return refused, gather(mine, layout, communicator, 1)
