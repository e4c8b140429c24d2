"""Counts of what a rank sends to others."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Operations and bytes that one rank has sent to other ranks, by kind of operation ("all_to_all", ...)."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)

    def record(self, operation: str, bytes_sent: int) -> None:
        """Add one call of `operation` that sends `bytes_sent` to other ranks."""
        self.calls[operation] += 1
        self.bytes_sent[operation] += bytes_sent

    def clear(self) -> None:
        """Start counting anew."""
        self.calls.clear()
        self.bytes_sent.clear()
