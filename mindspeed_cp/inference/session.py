"""A model that generates with its sequences spread over ranks: prompts in, tokens out, turn after turn on one cache.

Every rank has the whole model and computes its own tokens of a prompt; a new token it computes with the others, each
over the keys that it keeps. The choice of the rank that keeps a token's position counts.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from mindspeed_cp.comm import AgreeingCommunicator, Agreement, Subject
from mindspeed_cp.inference.cache import ShardedKVCache
from mindspeed_cp.inference.cached_attention import Decode, Prefill
from mindspeed_cp.inference.costs import Coefficients, Rates
from mindspeed_cp.inference.decode import Method, shares
from mindspeed_cp.inference.interleave import Span, owner
from mindspeed_cp.inference.over_ranks import OverRanks
from mindspeed_cp.inference.prefill import Strategy
from mindspeed_cp.inference.sampling import Choice, Sampling

GREEDY = Sampling()

DecodeMethod = Literal["auto", Method]


class Model(Protocol):
    """A causal language model whose attention is somebody else's."""

    @property
    def windows(self) -> Sequence[int | None]:
        """Of each layer, how many of the latest positions a query sees, itself among them; None for all."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    @property
    def longest(self) -> int | None:
        """Positions that a text may have; None where that is open."""
        ...

    @property
    def words(self) -> str:
        """What tells it from another model, for messages: ranks that share sequences have the same."""
        ...

    def __call__(self, tokens: Tensor, positions: Tensor, attention: "Prefill | Decode", rows: Tensor) -> Tensor:
        """Logits [B, len(rows), vocabulary] of some places of tokens [B, S] at positions [B, S]."""
        ...


class Progress(NamedTuple):
    """Tokens of the longest prompt that are done, and all of them."""

    done: int
    of: int


class Step(NamedTuple):
    """What is chosen for each sample; None for one that has ended."""

    choices: tuple[Choice | None, ...]


class Session(OverRanks):
    """A batch of sequences that grow by prompts and by what a model makes of them.

    model: the same on all ranks. batch: number of sequences. communicator: the ranks that share them; None for one.
    chunk: tokens of each prompt that go through the model at once, over all ranks. interleave, page: of the cache.
    strategy, rates, coefficients, pieces: whether K/V or queries travel for a prompt, and how, see prefix_attention.
    decode: how new tokens meet the keys, see decode.py. "tree" has every token go through the model on all ranks; with
        the others each rank has the tokens of its own sequences. "auto": "allgather_q" where ranks get as many each.
    attention_dtype: of scores, probabilities and states, that of the model by default; with fp64 one in bf16 or fp16
        gives the same on any number of ranks, see Note [Wide attention] in cached_attention.py. Keys and values that
        travel are of it, and so are states; the cache is not.

    Raises ValueError for a chunk below 1, and a way to decode that the batch does not allow.
    """

    def __init__(
        self,
        model: Model,
        batch: int = 1,
        communicator: AgreeingCommunicator | None = None,
        *,
        chunk: int = 2048,
        interleave: int = 64,
        page: int = 256,
        strategy: Strategy = "auto",
        rates: Rates | None = None,
        coefficients: Coefficients | None = None,
        pieces: int = 1,
        decode: DecodeMethod = "auto",
        attention_dtype: torch.dtype | None = None,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk={chunk} tokens of a prompt at once: give 1 or more.")
        self._model, self.communicator, self._chunk = model, communicator, chunk
        self._strategy, self._rates, self._coefficients, self._pieces = strategy, rates, coefficients, pieces
        self._attention_dtype = attention_dtype
        self._method = _method(decode, batch, self.size)
        self._counts = shares(batch, self.size)
        self.cache = ShardedKVCache(
            batch,
            model.windows,
            rank=self.rank,
            size=self.size,
            interleave=interleave,
            firsts=tuple(sample % self.size for sample in range(batch)),
            page=page,
        )
        self._agreement = None
        if communicator is not None:
            subject = Subject("generation", "give all ranks the same model, prompts and options")
            self._agreement = Agreement(communicator.apart, on_host=communicator.on_host, subject=subject)
        self._model_words = model.words if communicator is not None else ""
        self._last: list[int | None] = [None] * batch
        """Chosen, and not yet gone through the model."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        ends: frozenset[int] = frozenset(),
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Step]:
        """Go on with each sequence by its prompt, then give up to so many tokens for each, step by step; 0 for none.

        Nothing is done before the first step is asked for: with 0 tokens, `list(...)` of it does the prompts. All ranks
        ask for as many steps.

        prompts: tokens of each sequence, one at least in the first turn. ends: tokens after which a sequence ends,
        until its next prompt. progress: told after each chunk of the prompts.

        Raises ValueError, on every rank, for prompts that are empty or not one for each sequence, for num_tokens below
        0, where ranks were given different ones, and for logits that are no numbers; LostRank where a rank is gone.
        """
        new = self._agreed(prompts, num_tokens, sampling, ends)
        logits, holders = self._prefill(new, progress), self._keepers
        self._last = [None] * self.cache.batch  # A turn that asks for no token chooses none.
        active = [True] * self.cache.batch
        for count in range(num_tokens):
            step = self._choose(logits, holders, active, sampling)
            for sample, choice in enumerate(step.choices):
                if choice is not None:
                    self._last[sample] = choice.token
                    active[sample] = choice.token not in ends
            yield step
            if count + 1 == num_tokens or not any(active):
                return
            logits, holders = self._decode(active), self._deciders

    def _agreed(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, sampling: Sampling, ends: frozenset[int]
    ) -> list[list[int]]:
        """The tokens that are new to the cache, of each sample; the same on all ranks."""
        new = [[*([] if last is None else [last]), *prompt] for last, prompt in zip(self._last, prompts, strict=False)]
        cache, refusal = self.cache, None
        if len(prompts) != cache.batch:
            refusal = f"{len(prompts)} prompts for a session of {cache.batch} sequences; give one for each."
        elif not all(new):
            refusal = f"prompt {[bool(each) for each in new].index(False)} is empty; give one token at least."
        elif num_tokens < 0:
            refusal = f"num_tokens={num_tokens} for each sequence: give 0, for the prompts alone, or more."
        else:
            lengths = [length + len(tokens) for length, tokens in zip(cache.lengths, new, strict=True)]
            needed, longest = max(lengths) + max(num_tokens - 1, 0), self._model.longest
            if longest is not None and needed > longest:
                refusal = f"prompts and new tokens make {needed} positions, and the model is set for {longest}; shorten"
                refusal += " them, or set it for more (for_length of one of transformers)."
        words = (
            f"{self._model_words}, "
            f"prompts of {[len(prompt) for prompt in prompts]} tokens ({_digest(new)}) after {list(cache.lengths)}, "
            f"{num_tokens} tokens, {sampling}, ends {sorted(ends)}, chunk={self._chunk}, "
            f"interleave={cache.interleave}, {self._strategy}, {self._rates}, {self._coefficients}, "
            f"{self._pieces} pieces, {self._method}, attention in {self._attention_dtype}, "
            f"windows {_digest([[window or 0 for window in cache.windows]])}"
        )
        if self._agreement is not None:
            self._agreement.reach(words, refusal=refusal, device=self._model.device)
        elif refusal is not None:
            raise ValueError(refusal)
        return new

    def _prefill(self, new: list[list[int]], progress: Callable[[Progress], None] | None) -> list[Tensor | None]:
        """Logits [vocabulary] after the last of the new tokens of each sample, on the rank that has it."""
        before, longest = self.cache.lengths, max(map(len, new))
        result: list[Tensor | None] = [None] * len(new)
        for start in range(0, longest, self._chunk):
            stop = min(start + self._chunk, longest)
            spans = [
                Span(length + min(start, len(tokens)), length + min(stop, len(tokens)))
                for length, tokens in zip(before, new, strict=True)
            ]
            attention = Prefill(
                *(self.cache, spans, self.communicator),
                strategy=self._strategy,
                rates=self._rates,
                coefficients=self._coefficients,
                pieces=self._pieces,
                dtype=self._attention_dtype,
            )
            held = [list(attention.layout.positions(self.cache.rank, sample)) for sample in range(len(new))]
            # The place of each sample's last token, on the rank that has it.
            last = {
                sample: len(positions) - 1
                for sample, positions in enumerate(held)
                if positions and positions[-1] == before[sample] + len(new[sample]) - 1
            }
            rows = sorted(set(last.values())) or [0]
            tokens = [
                [new[sample][each - before[sample]] for each in positions] for sample, positions in enumerate(held)
            ]
            logits = self._model(self._padded(tokens), self._padded(held), attention, self._index(rows))
            for sample, place in last.items():
                result[sample] = logits[sample, rows.index(place)]
            if progress is not None:
                progress(Progress(stop, longest))
        return result

    def _decode(self, active: Sequence[bool]) -> list[Tensor | None]:
        """Feed what was chosen last; logits where they are, None for samples of other ranks or that have ended."""
        lengths = self.cache.lengths
        spans = [Span(length, length + going) for length, going in zip(lengths, active, strict=True)]
        attention = Decode(self.cache, spans, self.communicator, method=self._method, dtype=self._attention_dtype)
        own = range(self.cache.batch)[attention.own]
        tokens = self._padded([[self._last[sample] or 0] for sample in own])
        positions = self._padded([[lengths[sample]] for sample in own])
        logits = self._model(tokens, positions, attention, self._index([0]))
        result: list[Tensor | None] = [None] * self.cache.batch
        for place, sample in enumerate(own):
            result[sample] = logits[place, 0] if active[sample] else None
        return result

    @property
    def _keepers(self) -> list[int]:
        """The rank that keeps the last position of each sample."""
        cache, layout = self.cache, self.cache.layout([Span(0, length) for length in self.cache.lengths])
        return [
            owner(length - 1, cache.size, cache.interleave, layout.first(sample))
            for sample, length in enumerate(cache.lengths)
        ]

    @property
    def _deciders(self) -> list[int]:
        """The rank whose choice counts for each sample after a decode step: the keeper where all have its logits."""
        if self._method == "tree":
            return self._keepers
        return [rank for rank, count in enumerate(self._counts) for _ in range(count)]

    def _choose(
        self, logits: Sequence[Tensor | None], holders: Sequence[int], active: Sequence[bool], sampling: Sampling
    ) -> Step:
        """The choice for each sample, by the rank that is named for it; the same on all ranks."""
        cache = self.cache
        mine = torch.zeros((cache.batch, 3), dtype=torch.float64)
        for sample, (x, going) in enumerate(zip(logits, active, strict=True)):
            if going and holders[sample] == cache.rank:
                assert x is not None, "the rank that is named has the logits"
                mine[sample] = torch.tensor(sampling.choose(x, sample, cache.lengths[sample]), dtype=torch.float64)
        if self.communicator is None:
            chosen = mine.unsqueeze(0)
        else:
            chosen = self.communicator.all_gather(mine.to(self._model.device)).cpu()
        rows = [chosen[rank, sample].tolist() for sample, rank in enumerate(holders)]
        for sample, (row, going) in enumerate(zip(rows, active, strict=True)):
            if going and not math.isfinite(row[1]):
                raise ValueError(
                    f"the best logit of sequence {sample} at position {cache.lengths[sample]} is {row[1]}: the weights "
                    f"hold what is no number, or numbers leave the range of their dtype; try another one, as float32."
                )
        return Step(
            tuple(Choice(int(row[0]), *row[1:]) if going else None for row, going in zip(rows, active, strict=True))
        )

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, S], one at least: there are layers that do not take an empty tensor."""
        longest = max(1, *map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self._model.device)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, device=self._model.device)


def _method(decode: DecodeMethod, batch: int, size: int) -> Method:
    """The way to decode. Raises ValueError for one that there is not, or that the batch does not allow."""
    if decode not in (ways := ("auto", *get_args(Method))):
        raise ValueError(f"decode={decode!r} is none; give one of {', '.join(map(repr, ways))}.")
    if decode == "auto":
        return "tree" if batch % size else "allgather_q"
    if decode == "allgather_q" and batch % size:
        raise ValueError(
            f"decode='allgather_q' takes as many sequences on each of {size} ranks, and there are {batch}; use 'tree'"
            f"{' or ' + repr('ring_q') if batch >= size else ''}, or pad the batch."
        )
    if decode == "ring_q" and batch < size:
        raise ValueError(
            f"decode='ring_q' takes a sequence on each of {size} ranks at least, and there are {batch}; use 'tree'."
        )
    return decode


def _digest(tokens: Sequence[Sequence[int]]) -> str:
    return hashlib.blake2b(repr([list(each) for each in tokens]).encode(), digest_size=8).hexdigest()
