"""Which token comes next: the best one, or one drawn so that the number of ranks does not matter."""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CLOSE = {torch.float64: 0.0, torch.float32: 1e-4}
"""Logits closer than this; 1e-2 in other dtypes."""


class Choice(NamedTuple):
    """A token, the best logit, and by how much that is above the second best."""

    token: int
    best: float
    margin: float

    def is_close(self, dtype: torch.dtype) -> bool:
        """Whether the best two logits may change places with the order of additions, in a model of this dtype.

        In bf16 and fp16 that takes attention in fp64, see Note [Wide attention] in cached_attention.py.
        """
        return self.margin < _CLOSE.get(dtype, 1e-2)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature: 0 is the best one always. top_k, top_p: only among the k best, or the best
    ones that have probability p together. seed: what is drawn depends on it, the sample and the position alone.

    Raises ValueError for a temperature below 0, top_k below 1, and top_p outside of 0..1.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < torch.inf:
            raise ValueError(f"temperature={self.temperature}: give 0 for the best token always, or a number above.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give 1 or more, or None for all tokens.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: give a probability above 0, up to 1 for all tokens.")

    def choose(self, logits: Tensor, sample: int, position: int) -> Choice:
        """The token for a position of a sample. logits: [vocabulary]; where the best is no number, none is drawn."""
        logits = logits.double().cpu()
        best = logits.topk(min(2, logits.numel()))
        highest, margin = best.values[0].item(), (best.values[0] - best.values[-1]).item()
        if not self.temperature or not math.isfinite(highest):
            return Choice(int(best.indices[0]), highest, margin)
        # The best is 0, and temperatures close to 0 overflow to -inf alone.
        ordered, tokens = ((logits - highest) / self.temperature).sort(descending=True, stable=True)
        probabilities = ordered[: self.top_k].softmax(0)
        # Those before which less than p has come: at least one.
        kept = probabilities[probabilities.cumsum(0) - probabilities < self.top_p]
        edges = kept.cumsum(0)
        drawn = self._uniform(sample, position) * edges[-1]
        return Choice(int(tokens[min(int((edges <= drawn).sum()), len(kept) - 1)]), highest, margin)

    def _uniform(self, sample: int, position: int) -> float:
        """A number from 0 to 1."""
        digest = hashlib.blake2b(f"{self.seed} {sample} {position}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / 2**56
