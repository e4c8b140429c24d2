"""Products of which no operand is ever whole on a rank: panels travel, and the next one while one is multiplied.

Note [Panels]
    In 2D, rank (i, j) holds X_ij and W_ij, the parts of X and W^T in block row i and block column j, and needs
    Y_ij = sum over t of X_it W_tj. SUMMA sends X_it along row i and W_tj along column j for t = 0, 1, ..., so that at
    every step one rank of each row sends to all others, and the rest send nothing. Here rank (i, j) takes the panels in
    Cannon's order instead, t = i + j + s (mod q) at step s. Then each step is a permutation: with q = 3,

        step 0          step 1          step 2          t by rank; X_it comes from rank (i, t), W_tj from rank (t, j)
        0 1 2           1 2 0           2 0 1
        1 2 0           2 0 1           0 1 2
        2 0 1           0 1 2           1 2 0

    every rank sends one panel of its own to one rank of its row and one of its column, straight from owner to user, and
    all links are in use. Bytes are SUMMA's and the gather's, (q-1) panels of each operand; the memory is two panels.

    Backward, the same panels travel once more, and what a rank finds of dX_it and dW_tj goes straight home to the
    owner, which adds in the order of the steps, in fp32. Parts may differ in size: a message is as long as its panel.

    Where rows of X are gathered (1D), panel t is the rows of rank t, taken in the order t = r + s; where rows of Y are
    scattered, the part of rank t is computed when its turn comes, its own one last, and leaves while the next one is.

Note [Slices]
    In x*y and 3D one product both gathers rows and scatters them, along two axes. Panel by panel the ranks of one axis
    would find parts for the same rank of the other at the same time, and links would stand idle. So X is cut along a
    dim along which nothing travels, the batch in x*y and the sequence in 3D: a slice is gathered from all ranks and its
    results go to all while the next slice is multiplied, with all links in use. What stays is the first slice's gather
    and the last one's scatter, 1/n of each with n slices. Where that dim is of one, panels of X hide the gather alone.

Sources: SUMMA, van de Geijn and Watts 1997; Cannon 1969; 2D tensor parallelism arXiv:2104.05343.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mindspeed_cp.comm import Communicator, Transfer
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.tensor_parallel.grid import part


@dataclass(frozen=True)
class Route:
    """How the panels of one operand travel among the ranks of a group, one of which owns each.

    panels: whose panel this rank has at each step. users: who then has this rank's own.
    sizes: of each panel along dim `dim`.
    """

    communicator: Communicator
    panels: tuple[int, ...]
    users: tuple[int, ...]
    sizes: tuple[int, ...]
    dim: int

    def start(self, step: int, own: Tensor) -> "Arrival":
        """Start fetching the panel of a step from its owner, and sending this rank's own to its user."""
        return self._exchange(own, self.users[step], self.panels[step], self.sizes[self.panels[step]])

    def start_home(self, step: int, found: Tensor) -> "Arrival":
        """Start sending what has been found for the panel of a step to its owner, and fetching what its user has found
        for this rank's own."""
        return self._exchange(found, self.panels[step], self.users[step], self.sizes[self.communicator.rank])

    def _exchange(self, send: Tensor, to: int, source: int, size: int) -> "Arrival":
        """Empty panels, which uneven parts leave, are not sent."""
        if to == self.communicator.rank:
            assert source == to, (source, to)
            return Arrival(send, None)
        shape = list(send.shape)
        shape[self.dim] = size
        send, receive = send.contiguous(), send.new_empty(shape)
        transfer = self.communicator.exchange(
            send if send.numel() else None, to, receive if receive.numel() else None, source
        )
        return Arrival(receive, transfer)


class Arrival(NamedTuple):
    """A tensor, to be read when the transfer has been waited for; None where it is this rank's own."""

    tensor: Tensor
    transfer: Transfer | None

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        if self.transfer is not None:
            self.transfer.wait()
        return self.tensor


def square_routes(input: Communicator, weight: Communicator, features: int) -> tuple[Route, Route]:
    """Routes of the panels of X [N, features] and W [O, features] in 2D, see Note [Panels].

    input: the ranks that hold a block row of X, this one being j of q; weight: a block column of W, i of q.
    """
    i, j, size = weight.rank, input.rank, input.size
    assert size == weight.size, (size, weight.size)
    panels = tuple((i + j + step) % size for step in range(size))
    sizes = tuple(part(features, size, panel).size for panel in range(size))
    return (
        Route(input, panels, tuple((j - i - step) % size for step in range(size)), sizes, -1),
        Route(weight, panels, tuple((i - j - step) % size for step in range(size)), sizes, -1),
    )


def row_route(communicator: Communicator, rows: int, dim: int, *, own_last: bool = False) -> Route:
    """Route of panels that are equally many rows along a dim, of each rank in turn, its own one first or last."""
    rank, size = communicator.rank, communicator.size
    distances = [*range(own_last, size), *range(own_last)]
    panels, users = (tuple((rank + sign * each) % size for each in distances) for sign in (1, -1))
    return Route(communicator, panels, users, (rows,) * size, dim)


@dataclass(frozen=True)
class SliceRoute:
    """How slices of rows are gathered from all ranks of a group, or scattered to them, see Note [Slices].

    dim: of the rows that travel.
    """

    communicator: Communicator
    dim: int

    def gather(self, own: Tensor) -> "Slice":
        """Start fetching the others' rows of a slice."""
        route = row_route(self.communicator, own.size(self.dim), self.dim)
        arrivals = {panel: route.start(step, own) for step, panel in enumerate(route.panels)}
        return Slice([arrivals[panel] for panel in sorted(arrivals)], self.dim)

    def scatter(self, found: Tensor) -> "Slice":
        """Start sending each rank its rows of what was found of a slice, and fetching what others have found."""
        parts = found.chunk(self.communicator.size, self.dim)
        route = row_route(self.communicator, parts[0].size(self.dim), self.dim)
        arrivals = {user: route.start_home(step, parts[route.panels[step]]) for step, user in enumerate(route.users)}
        return Slice([arrivals[user] for user in sorted(arrivals)], self.dim)


class Slice(NamedTuple):
    """What comes from each rank, by rank."""

    arrivals: list["Arrival"]
    dim: int

    def joined(self) -> Tensor:
        """The rows of all ranks."""
        return torch.cat([each.wait() for each in self.arrivals], self.dim)

    def summed(self) -> Tensor:
        """What all ranks have found, added in their order, in fp32, and rounded once."""
        rows = [each.wait() for each in self.arrivals]
        return torch.stack(rows).sum(dim=0, dtype=accumulation_dtype(rows[0].dtype)).to(rows[0].dtype)


def travelling(routes: Sequence[Route], owns: Sequence[Tensor], *, overlap: bool) -> Iterator[tuple[int, list[Tensor]]]:
    """Each step with its panel of every operand, while those of the next step travel.

    owns: this rank's own panel of each. overlap: whether the next ones leave before these are used, or after.
    """
    last = len(routes[0].panels) - 1

    def start(step: int) -> list[Arrival]:
        return [route.start(step, own) for route, own in zip(routes, owns, strict=True)]

    arriving = start(0)
    for step in range(last + 1):
        panels = [each.wait() for each in arriving]
        if overlap and step < last:
            arriving = start(step + 1)
        yield step, panels
        if not overlap and step < last:
            arriving = start(step + 1)


class Homecoming:
    """Sum of what all ranks find for this rank's own panel, which comes home step by step.

    overlap: whether what is found at a step travels during the next one. Additions are in the order of the steps, in
    fp32, either way.
    """

    def __init__(self, route: Route, *, overlap: bool) -> None:
        self._route, self._overlap = route, overlap
        self._total: Tensor | None = None
        self._arriving: Arrival | None = None

    def send(self, step: int, found: Tensor) -> None:
        """Send what has been found for the panel of a step."""
        self._add()
        self._dtype = found.dtype
        self._arriving = self._route.start_home(step, found)
        if not self._overlap:
            self._add()

    def sum(self) -> Tensor:
        """When everything has been sent: the sum, in the dtype of what was found."""
        self._add()
        assert self._total is not None
        return self._total.to(self._dtype)

    def _add(self) -> None:
        if self._arriving is None:
            return
        arrived = self._arriving.wait()
        if self._total is None:
            self._total = arrived.to(accumulation_dtype(arrived.dtype), copy=True)
        else:
            self._total += arrived
        self._arriving = None
