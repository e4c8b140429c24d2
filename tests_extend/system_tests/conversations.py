"""Conversations for --sft, in place of a file and a chat tokenizer, which need packages of their own."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np

NUM_ROWS, PER_ROW = 64, 4
LONGEST = 14
"""Tokens of a conversation; a row fits a sequence of 64: what Megatron 0.16 does with longer ones ends in an error."""


class _Rows:
    """Rows of conversations, each of one message of token numbers; as SFTLowLevelDataset has them."""

    def __init__(self, path: str) -> None:
        rng = np.random.default_rng(0)
        self._rows = [
            [{"role": "system", "content": rng.integers(1, 250, rng.integers(3, LONGEST + 1))} for _ in range(PER_ROW)]
            for _ in range(NUM_ROWS)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> list[dict[str, object]]:
        return self._rows[number]


def _tokenize(
    tokenizer: object, conversation: list[dict[str, np.ndarray]], return_target: bool, add_generation_prompt: bool
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([message["content"] for message in conversation])
    return tokens, tokens


@contextlib.contextmanager
def made_up_conversations() -> Iterator[None]:
    """Within it, --sft reads these whatever file is named, and the null tokenizer can tell them."""
    from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText
    from megatron.training.datasets import sft_dataset

    with (
        mock.patch.object(sft_dataset, "SFTLowLevelDataset", _Rows),
        mock.patch.object(MegatronTokenizerText, "tokenize_conversation", _tokenize, create=True),
        mock.patch.object(MegatronTokenizerText, "pad", property(lambda tokenizer: 255), create=True),
    ):
        yield
