"""What is expected of an algorithm: its bytes by formula, and its events, which a network's rates turn into time."""

from collections.abc import Iterator
from dataclasses import dataclass

from mindspeed_cp.attention.build import KEPT
from mindspeed_cp.benchmark.cases import Algorithm
from mindspeed_cp.planner import AttentionPass, AttentionShape, Compute, Event, Post, Wait, all_to_all
from mindspeed_cp.program import Phase


@dataclass(frozen=True)
class ExpectedPass:
    """One pass of an algorithm, the library's own or a baseline, with a kernel of so many FLOPs a second."""

    algorithm: Algorithm
    shape: AttentionShape
    phase: Phase
    flops_per_s: float

    def num_bytes(self) -> int:
        """What all ranks together send: nothing, P(P-1) blocks of keys and values, or AttentionPass.num_bytes."""
        size = self.algorithm.topology.size
        if self.algorithm.kind == "single device":
            return 0
        if self.algorithm.kind == "all-gather":
            return size * (size - 1) * self.shape.kv_bytes(self.shape.num_tokens // size)
        return self._attention().num_bytes()

    def held_bytes(self) -> int:
        """K/V of others that the fullest rank holds: none, P-1 blocks, or AttentionPass.held_bytes."""
        size = self.algorithm.topology.size
        if self.algorithm.kind == "single device":
            return 0
        if self.algorithm.kind == "all-gather":
            return (size - 1) * self.shape.kv_bytes(self.shape.num_tokens // size)
        return self._attention().held_bytes()

    def events(self, rank: int) -> Iterator[Event]:
        """What `rank` does."""
        if self.algorithm.kind == "single device":
            if rank == 0:
                yield Compute(self._whole_s())
        elif self.algorithm.kind == "all-gather":
            yield from self._all_gather(rank)
        else:
            yield from self._attention().events(rank)

    def _attention(self) -> AttentionPass:
        algorithm = self.algorithm
        return AttentionPass(
            topology=algorithm.topology,
            shape=self.shape,
            phase=self.phase,
            flops_per_s=self.flops_per_s,
            overlap=algorithm.overlap,
            pieces=algorithm.pieces,
            kept=KEPT[algorithm.policy],
        )

    def _whole_s(self) -> float:
        """The kernel's time for the whole sequence."""
        return self.shape.flops(self.shape.num_tokens**2 / 2, self.phase) / self.flops_per_s

    def _all_gather(self, rank: int) -> Iterator[Event]:
        size = self.algorithm.topology.size
        block, compute = self.shape.kv_bytes(self.shape.num_tokens // size), Compute(self._whole_s() / size)
        if self.phase is Phase.FORWARD:
            # gloo's is a ring.
            for step in range(size - 1):
                yield Post(step, {(rank + 1) % size: block}, ((rank - 1) % size,))
                yield Wait(step)
            yield compute
        else:
            yield compute
            yield from all_to_all("gradients", rank, tuple(range(size)), block)
