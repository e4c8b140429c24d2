"""Ranks on nodes, and the rates of the links between them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Network:
    """Nodes of `ranks_per_node` neighbouring ranks each, and the links between them.

    fast_mbit, slow_mbit: rate in each direction of a rank's link inside its node, and of a link between nodes.
    slow_link: whether each rank has a link out of its node, or its node has one for all of them.

    Raises ValueError where the ranks do not fill the nodes, or a rate is below 1 Mbit/s.
    """

    num_ranks: int
    ranks_per_node: int
    fast_mbit: float
    slow_mbit: float
    slow_link: Literal["rank", "node"] = "rank"

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.num_ranks < 1 or self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"{self.num_ranks} ranks do not fill nodes of {self.ranks_per_node}; give a multiple of it."
            )
        if min(self.fast_mbit, self.slow_mbit) < 1:
            raise ValueError(f"a link of {min(self.fast_mbit, self.slow_mbit)} Mbit/s; use 1 or more.")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.num_ranks // self.ranks_per_node

    def node(self, rank: int) -> int:
        """The node that a rank is on."""
        return rank // self.ranks_per_node

    def links(self, source: int, to: int) -> tuple[tuple[str, int], ...]:
        """What a message from one rank to another goes over: the link out of one end and the link into the other."""
        if self.node(source) == self.node(to):
            return ("fast out", source), ("fast in", to)
        if self.slow_link == "rank":
            return ("slow out", source), ("slow in", to)
        return ("slow out", self.node(source)), ("slow in", self.node(to))

    def rate(self, link: tuple[str, int]) -> float:
        """Bytes a second over one of `links`."""
        return (self.fast_mbit if link[0].startswith("fast") else self.slow_mbit) * 1e6 / 8
