"""A small language model in plain torch, whose attention is a session's, or dense: the oracle."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mindspeed_cp.attention import AttentionTerms
from mindspeed_cp.inference import Choice

VOCABULARY, HEADS, KV_HEADS, SIZE = 53, 4, 2, 8
WIDTH = HEADS * SIZE


class Dense:
    """Attention of a whole sequence, which is there at once."""

    def __init__(self, windows):
        self._windows = windows

    def attend(self, layer, q, k, v, scale, terms):
        num_tokens = q.size(2)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        scores = terms.softcap * torch.tanh(q @ k.mT * scale / terms.softcap)
        distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        window = self._windows[layer] or num_tokens
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        sinks = terms.sinks[:, None, None].expand(q.size(0), -1, num_tokens, 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ v


@dataclass(frozen=True)
class ToyModel:
    """Two layers, one with a window; grouped queries, rotary embeddings, sinks, softcap."""

    dtype: torch.dtype = torch.float64
    windows: tuple[int | None, ...] = (None, 9)
    softcap: float | None = 4.0
    device: ClassVar[torch.device] = torch.device("cpu")
    longest: ClassVar[int | None] = None

    @property
    def words(self) -> str:
        """See Model."""
        return repr(self)

    def __call__(self, tokens: Tensor, positions: Tensor, attention, rows: Tensor) -> Tensor:
        """See Model."""
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(self.dtype)

        x = weight(VOCABULARY, WIDTH)[tokens]
        for layer in range(len(self.windows)):
            heads = [(x @ weight(WIDTH, n * SIZE)).unflatten(-1, (n, SIZE)) for n in (HEADS, KV_HEADS, KV_HEADS)]
            q, k, v = (each.transpose(1, 2) for each in heads)
            q, k = (turned(each, positions) for each in (q, k))
            terms = AttentionTerms(sinks=weight(HEADS, 1)[:, 0], softcap=self.softcap)
            x = x + attention.attend(layer, q, k, v, 0.4, terms).transpose(1, 2).flatten(2) @ weight(WIDTH, WIDTH)
            x = x + torch.tanh(x @ weight(WIDTH, 2 * WIDTH)) @ weight(2 * WIDTH, WIDTH)
        return 2.0 * x[:, rows] @ weight(WIDTH, VOCABULARY)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """[B, H, S, D] turned by positions [B, S]."""
    angles = positions[:, None, :, None] * 10.0 ** -torch.arange(0, 2, 4 / SIZE, dtype=torch.float64)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


def dense_choices(prompt, num_tokens, sampling, sample=0, model=None, ends=frozenset()) -> list[Choice]:
    """What a model chooses that goes through the whole text again for each token."""
    model, text, choices = model or ToyModel(), list(prompt), []
    while len(choices) < num_tokens and not (choices and choices[-1].token in ends):
        tokens, positions = torch.tensor([text]), torch.arange(len(text))[None]
        logits = model(tokens, positions, Dense(model.windows), torch.tensor([len(text) - 1]))[0, 0]
        choices.append(sampling.choose(logits, sample, len(text)))
        text.append(choices[-1].token)
    return choices
