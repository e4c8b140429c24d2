"""What attention is told beside queries, keys and values, and who sees whom."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """Terms of the scores.

    scale: factor on them, above 0. visible: the mask's rows for this rank's queries, [S, T] or [1 or B, 1 or N, S, T]
    bool with T the tokens of the whole sequence in order, True where a query sees a key that the plan lets it see.
    """

    scale: float
    visible: Tensor | None = None
