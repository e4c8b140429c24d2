"""Multi-latent attention: what each form that can travel sends and computes, for predictions and the choice of one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindspeed_cp.config import LatentForm
from mindspeed_cp.planner.attention import AttentionPass, AttentionShape
from mindspeed_cp.planner.clock import Compute, Event
from mindspeed_cp.program import Phase
from mindspeed_cp.topology import CPTopology


@dataclass(frozen=True, kw_only=True)
class LatentShape(AttentionShape):
    """Multi-latent attention of one sequence, in one of its forms. head_size: of queries and keys, U + R.

    latent, rotated: L and R, a payload's numbers. value_size: V. ulysses: of a Ulysses group, whose ranks all get whole
    payloads. num_kv_heads is not looked at: there are as many as heads.
    """

    form: LatentForm
    latent: int = 512
    rotated: int = 64
    value_size: int = 128
    ulysses: int = 1

    @property
    def _absorbed(self) -> bool:
        return self.form == "absorbed"

    @property
    def payload(self) -> int:
        """Numbers of a token that travel as a latent."""
        return self.latent + self.rotated

    def kv_bytes(self, num_tokens: int) -> int:
        """What travels of so many tokens: keys and values, or payloads, one for each rank of a Ulysses group."""
        if self.form == "expanded":
            return num_tokens * self.num_heads * (self.head_size + self.value_size) * self.element_size
        return num_tokens * self.payload * self.element_size * self.ulysses

    def q_bytes(self, num_tokens: int) -> int:
        """See AttentionShape."""
        size = self.payload if self._absorbed else self.head_size
        return num_tokens * self.num_heads * size * self.element_size

    def out_bytes(self, num_tokens: int) -> int:
        """See AttentionShape."""
        size = self.latent if self._absorbed else self.value_size
        return num_tokens * self.num_heads * size * self.element_size

    def flops(self, area: float, phase: Phase) -> float:
        """See AttentionShape."""
        keys, values = (self.payload, self.latent) if self._absorbed else (self.head_size, self.value_size)
        products = keys + values if phase is Phase.FORWARD else 3 * keys + 2 * values
        return 2 * area * self.num_heads * products

    def making_flops(self, num_keys: int, phase: Phase) -> float:
        """See AttentionShape: in the backward pass they are made again, and have two gradients."""
        if self.form != "latent":
            return 0.0
        return self.projection_flops(num_keys) * (1 if phase is Phase.FORWARD else 3)

    def own_flops(self, num_tokens: int, phase: Phase) -> float:
        """Around attention, of a rank's own tokens: keys and values made, or queries and outputs multiplied."""
        if self.form == "latent":
            return 0.0
        return self.projection_flops(num_tokens) * (1 if phase is Phase.FORWARD else 2)

    def projection_flops(self, num_tokens: int) -> float:
        """By the up projection, all heads: of latents, or of queries and outputs, which are as many."""
        unshared = self.head_size - self.rotated
        return 2.0 * num_tokens * self.num_heads * self.latent * (unshared + self.value_size)


@dataclass(frozen=True)
class LatentPass:
    """A pass over a grid of ranks from queries and latents to outputs, or back."""

    shape: LatentShape
    topology: CPTopology
    phase: Phase
    flops_per_s: float
    overlap: bool = True

    @property
    def attention(self) -> AttentionPass:
        """The part of it that is attention."""
        return AttentionPass(
            topology=self.topology,
            shape=replace(self.shape, ulysses=self.topology.ulysses),
            phase=self.phase,
            flops_per_s=self.flops_per_s,
            overlap=self.overlap,
        )

    def events(self, rank: int) -> Iterator[Event]:
        """What `rank` does."""
        yield Compute(self.shape.own_flops(self.shape.num_tokens // self.topology.size, self.phase) / self.flops_per_s)
        yield from self.attention.events(rank)
