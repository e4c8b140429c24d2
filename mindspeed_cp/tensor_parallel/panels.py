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

Note [Pieces]
    In 1D, 3D and x*y rows of X are gathered among x ranks, or the rows of Y are summed and scattered among y ranks, or
    both. Panel t is the rows that rank t of the x has, part u those that rank u of the y gets; cut where either ends,
    they are lcm(x, y) pieces, each of one panel and one part. With x = 4 and y = 2, and rank (r, v) = (0, 1),

        step             0               1               2               3
        panel            0, its own      3               1               2         the next one travels meanwhile
        part             0, sent to 0    1, its own      0, sent to 0    1, its own

    a rank takes its own panel first, which is there, and the others from a place that depends on v, so that at one step
    ranks of one r find pieces of several parts, which go to several ranks. Only what is found last has no product
    beside it. A rank that gathers nothing (x = 1) takes its own part last, and everything travels beside a product.
    Backward, dY is gathered and dX scattered the same way; then panels of X travel beside the products of dW.

Sources: SUMMA, van de Geijn and Watts 1997; Cannon 1969; 2D tensor parallelism arXiv:2104.05343.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
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
    """Sums of what all ranks find for this rank's own panels, which come home step by step.

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


def piece_order(panel_rank: int, panels: int, part_rank: int, parts: int) -> tuple[int, ...]:
    """Pieces in the order in which a rank computes them, see Note [Pieces]: rank r of x, and v of y."""
    per_panel = math.lcm(panels, parts) // panels
    first = part_rank * panels // parts
    others = (1 + (step + first) % (panels - 1) for step in range(panels - 1))
    return tuple(
        (panel_rank + distance) % panels * per_panel + (part_rank + 1 + place) % per_panel
        for distance in (0, *others)
        for place in range(per_panel)
    )


@dataclass(frozen=True)
class RowFlow:
    """Rows gathered, multiplied and scattered piece by piece, see Note [Pieces].

    gathered: the ranks whose panels are gathered; summed: those that get the sums; None for this rank alone. dim: of
    the rows. overlap: whether transfers and products go on side by side.
    """

    gathered: Communicator | None
    summed: Communicator | None
    dim: int
    overlap: bool

    def panels(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The panels of all ranks, with their numbers."""
        if self.gathered is None:
            yield 0, own
            return
        rank, size = self.gathered.rank, self.gathered.size
        panels = tuple(piece // self._per_panel for piece in self._order[:: self._per_panel])
        users = tuple((2 * rank - panel) % size for panel in panels)
        route = Route(self.gathered, panels, users, (own.size(self.dim),) * size, self.dim)
        for step, (panel,) in travelling([route], [own], overlap=self.overlap):
            yield panels[step], panel

    def products(self, own: Tensor, multiply: Callable[[Tensor], Tensor]) -> "Flowing":
        """Multiply the rows of all panels. own: this rank's panel."""
        step, panels = 0, {}
        sums = _Sums(self.summed, self._orders, self.dim, overlap=self.overlap)
        for number, panel in self.panels(own):
            panels[number] = panel
            pieces = panel.chunk(self._per_panel, self.dim)
            for _ in range(self._per_panel):
                sums.send(step, multiply(pieces[self._order[step] % self._per_panel]))
                step += 1
        return Flowing(panels, sums)

    @property
    def _per_panel(self) -> int:
        return len(self._order) // _size(self.gathered)

    @property
    def _order(self) -> tuple[int, ...]:
        return self._orders[_rank(self.summed)]

    @functools.cached_property
    def _orders(self) -> tuple[tuple[int, ...], ...]:
        """Of every rank that finds parts of the same sums."""
        rank, panels, parts = _rank(self.gathered), _size(self.gathered), _size(self.summed)
        return tuple(piece_order(rank, panels, part, parts) for part in range(parts))


class Flowing(NamedTuple):
    """What has been gathered, by the number of the panel, and sums, of which the last may still be under way."""

    panels: dict[int, Tensor]
    sums: "_Sums"


class _Sums:
    """Sums of what ranks find for each other's parts of the rows; see Note [Pieces].

    orders: pieces of each rank by step. Additions are in the order of steps and of ranks, in fp32, with overlap or not.
    """

    def __init__(
        self, communicator: Communicator | None, orders: tuple[tuple[int, ...], ...], dim: int, *, overlap: bool
    ) -> None:
        self._communicator, self._orders, self._dim, self._overlap = communicator, orders, dim, overlap
        self._rank, self._size = _rank(communicator), _size(communicator)
        self._per_part = len(orders[0]) // len(orders)
        self._total: Tensor | None = None
        self._arriving: list[tuple[int | None, _Arrival]] = []

    def send(self, step: int, found: Tensor) -> None:
        """Send what has been found at a step to whose part it is, and receive what others have found."""
        self._add()
        self._dtype, found = found.dtype, found.contiguous()
        owner = self._place(self._rank, step)[0]
        for distance in range(self._size):
            to, source = (self._rank + distance) % self._size, (self._rank - distance) % self._size
            own, place = self._place(source, step)
            sends, receives = owner == to, own == self._rank
            if self._communicator is None or distance == 0:
                arrival = _Arrival(found, None)
            else:
                received = torch.empty_like(found)
                transfer = self._communicator.exchange(
                    found if sends else None, to, received if receives else None, source
                )
                arrival = _Arrival(received, transfer)
            self._arriving.append((place if receives else None, arrival))
        if not self._overlap:
            self._add()

    def wait(self) -> Tensor:
        """When everything has been sent: the sums of this rank's part, in the dtype of what was found."""
        self._add()
        assert self._total is not None
        return self._total.to(self._dtype)

    def _place(self, rank: int, step: int) -> tuple[int, int]:
        """Whose part the piece of a rank is in, and where in it."""
        return divmod(self._orders[rank][step], self._per_part)

    def _add(self) -> None:
        for place, arrival in self._arriving:
            piece = arrival.wait()
            if place is None:
                continue
            rows = piece.size(self._dim)
            if self._total is None:
                shape = list(piece.shape)
                shape[self._dim] = rows * self._per_part
                dtype = piece.dtype if self._size == 1 else accumulation_dtype(piece.dtype)
                self._total = piece.new_zeros(shape, dtype=dtype)
            self._total.narrow(self._dim, place * rows, rows).add_(piece)
        self._arriving = []


def _rank(communicator: Communicator | None) -> int:
    return 0 if communicator is None else communicator.rank


def _size(communicator: Communicator | None) -> int:
    return 1 if communicator is None else communicator.size
