"""Tokens of a sequence in parts of any length: who holds how many, and tensors cut and put together along them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_cp.comm import Communicator
from mindspeed_cp.diffusion.mesh import ParallelMesh
from mindspeed_cp.plan import Run


@dataclass(frozen=True)
class Shares:
    """How many tokens each rank holds, one after another: a plan's Layout, see there."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, num_tokens: int, num_ranks: int) -> "Shares":
        """As equal as can be: the first ranks have one token more where it does not come out even."""
        least, more = divmod(num_tokens, num_ranks)
        return cls(tuple(least + (rank < more) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        """See Layout."""
        return len(self.lengths)

    def num_tokens(self, rank: int) -> int:
        """See Layout."""
        return self.lengths[rank]

    def runs(self, rank: int) -> tuple[Run, ...]:
        """See Layout."""
        return (Run(0, self.lengths[rank], self.start(rank)),) if self.lengths[rank] else ()

    def start(self, rank: int) -> int:
        """Tokens that ranks before this one hold."""
        return sum(self.lengths[:rank])


def split(x: Tensor, mesh: ParallelMesh, dim: int) -> Tensor:
    """This rank's share of a tensor that all ranks have whole; a view of it."""
    shares = Shares.of(x.size(dim), mesh.shape.sequence)
    return x.narrow(dim, shares.start(mesh.sequence_index), shares.lengths[mesh.sequence_index])


def gather(x: Tensor, shares: Shares, mesh: ParallelMesh, dim: int) -> Tensor:
    """The whole tensor on all ranks from each one's share along `dim`: the inverse of `split`.

    First within the Ulysses group, then across the ring. A rank sends (P - 1) shares in all, and nothing is padded.
    """
    degree, ring_index = mesh.shape.ulysses, mesh.index("ring")
    groups = [shares.lengths[first : first + degree] for first in range(0, shares.num_ranks, degree)]
    if "ulysses" in mesh.communicators:
        x = gather_parts(x, groups[ring_index], mesh.communicators["ulysses"], dim)
    if "ring" in mesh.communicators:
        x = gather_parts(x, tuple(map(sum, groups)), mesh.communicators["ring"], dim)
    return x


def gather_parts(x: Tensor, lengths: tuple[int, ...], communicator: Communicator, dim: int) -> Tensor:
    """Every rank's part of `lengths[rank]` along `dim`, concatenated by rank. Each sends its own to every other."""
    return torch.cat(exchange_parts(x, lengths, communicator, dim), dim=dim)


def exchange_parts(x: Tensor, lengths: tuple[int, ...], communicator: Communicator, dim: int) -> list[Tensor]:
    """Every rank's part, by rank, this one's own as it is; all messages are posted at once."""
    rank, size = communicator.rank, communicator.size
    assert x.size(dim) == lengths[rank], (x.shape, dim, lengths, rank)
    sent = x.contiguous()
    parts = [sent if place == rank else x.new_empty(_with(x.shape, dim, lengths[place])) for place in range(size)]
    transfers = []
    for distance in range(1, size):
        to, source = (rank + distance) % size, (rank - distance) % size
        transfers.append(communicator.exchange(_some(sent), to, _some(parts[source]), source))
    for transfer in transfers:
        transfer.wait()
    return parts


def _some(x: Tensor) -> Tensor | None:
    """The message; None for one of nothing."""
    return x if x.numel() else None


def _with(shape: torch.Size, dim: int, length: int) -> list[int]:
    sizes = list(shape)
    sizes[dim] = length
    return sizes
