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

    Where rows of X are gathered (1D, 3D, x*y), panel t is the rows of rank t, taken in the order t = r + s; where rows
    of Y are scattered, the part of rank t is computed when its turn comes, and leaves while the next one is.

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

    def start(self, step: int, own: Tensor) -> "_Arrival":
        """Start fetching the panel of a step from its owner, and sending this rank's own to its user."""
        return self._exchange(own, self.users[step], self.panels[step], self.sizes[self.panels[step]])

    def start_home(self, step: int, found: Tensor) -> "_Arrival":
        """Start sending what has been found for the panel of a step to its owner, and fetching what its user has found
        for this rank's own."""
        return self._exchange(found, self.panels[step], self.users[step], self.sizes[self.communicator.rank])

    def _exchange(self, send: Tensor, to: int, source: int, size: int) -> "_Arrival":
        """Empty panels, which uneven parts leave, are not sent."""
        if to == self.communicator.rank:
            assert source == to, (source, to)
            return _Arrival(send, None)
        shape = list(send.shape)
        shape[self.dim] = size
        send, receive = send.contiguous(), send.new_empty(shape)
        transfer = self.communicator.exchange(
            send if send.numel() else None, to, receive if receive.numel() else None, source
        )
        return _Arrival(receive, transfer)


class _Arrival(NamedTuple):
    """A tensor, to be read when the transfer has been waited for; None where it is this rank's own."""

    tensor: Tensor
    transfer: Transfer | None

    def wait(self) -> Tensor:
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


def row_route(communicator: Communicator, rows: int, dim: int) -> Route:
    """Route of panels that are equally many rows along a dim, of each rank in turn."""
    rank, size = communicator.rank, communicator.size
    panels = tuple((rank + step) % size for step in range(size))
    return Route(communicator, panels, tuple((rank - step) % size for step in range(size)), (rows,) * size, dim)


def travelling(routes: Sequence[Route], owns: Sequence[Tensor], *, overlap: bool) -> Iterator[tuple[int, list[Tensor]]]:
    """Each step with its panel of every operand, while those of the next step travel.

    owns: this rank's own panel of each. overlap: whether the next ones leave before these are used, or after.
    """
    last = len(routes[0].panels) - 1

    def start(step: int) -> list[_Arrival]:
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
    """Sums of what all ranks find for this rank's own panels, which arrive here step by step.

    overlap: whether what is found at a step travels during the next one. Additions are in the order of the steps, in
    fp32, either way.
    """

    def __init__(self, routes: Sequence[Route], *, overlap: bool) -> None:
        self._routes, self._overlap = routes, overlap
        self._totals: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []
        self._arriving: list[_Arrival] = []

    def send(self, step: int, found: Sequence[Tensor]) -> None:
        """Send what has been found for the panels of a step."""
        self._add()
        self._arriving = [route.start_home(step, each) for route, each in zip(self._routes, found, strict=True)]
        if not self._overlap:
            self._add()

    def sums(self) -> list[Tensor]:
        """When everything has been sent: the sums, in the dtype of what was found."""
        self._add()
        return [total.to(dtype) for total, dtype in zip(self._totals, self._dtypes, strict=True)]

    def _add(self) -> None:
        arrived = [each.wait() for each in self._arriving]
        if arrived and not self._totals:
            self._dtypes = [each.dtype for each in arrived]
            self._totals = [each.to(accumulation_dtype(each.dtype), copy=True) for each in arrived]
        elif arrived:
            for total, each in zip(self._totals, arrived, strict=True):
                total += each
        self._arriving = []
