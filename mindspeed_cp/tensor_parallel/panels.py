"""A product of which neither operand is ever whole on a rank: panels travel, and the next one while one is multiplied.

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

Sources: SUMMA, van de Geijn and Watts 1997; 2D tensor parallelism arXiv:2104.05343; Cannon 1969.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm import Communicator, Transfer
from mindspeed_cp.comm.reduction import accumulation_dtype
from mindspeed_cp.tensor_parallel.collectives import raw_reduce
from mindspeed_cp.tensor_parallel.grid import Axes, part
from mindspeed_cp.tensor_parallel.mesh import TensorMesh


class Step(NamedTuple):
    """One panel's turn. panel: t. input_user, weight_user: who, along either axis, then takes this rank's own panel."""

    panel: int
    input_user: int
    weight_user: int


@dataclass(frozen=True)
class Panels:
    """How the panels of one layer travel on one rank, see Note [Panels].

    input: ranks along the axis that shards X's features, this rank being j of q. weight: along the axis that shards
    W's columns, i of q. features: of the whole X. overlap: whether the next panel leaves before one is multiplied.
    """

    input: Communicator
    weight: Communicator
    features: int
    overlap: bool

    def steps(self) -> list[Step]:
        """In their order."""
        i, j, size = self.weight.rank, self.input.rank, self.input.size
        return [Step((i + j + s) % size, (j - i - s) % size, (i - j - s) % size) for s in range(size)]

    def width(self, panel: int) -> int:
        """Features of a panel."""
        return part(self.features, self.input.size, panel).size

    def operands(self, x: Tensor, weight: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Each step with its panels of X and W, while the next ones travel.

        x: [N, own features]; weight: [O, own features]; contiguous. Yields [N, width] and [O, width].
        """
        steps = self.steps()
        arriving = self._start(steps[0], x, weight)
        for number, step in enumerate(steps):
            panels = arriving.wait()
            following = steps[number + 1] if number + 1 < len(steps) else None
            if self.overlap and following is not None:
                arriving = self._start(following, x, weight)
            yield step, *panels
            if not self.overlap and following is not None:
                arriving = self._start(following, x, weight)

    def send_home(self, step: Step, dx: Tensor, dweight: Tensor) -> "_Panels":
        """Start sending what has been found of the step's panels, and receiving what others have of this rank's own."""
        i, j = self.weight.rank, self.input.rank
        mine_x, mine_weight = (x.new_empty(x.size(0), self.width(own)) for x, own in ((dx, j), (dweight, i)))
        return _Panels(
            _exchange(self.input, dx, step.panel, mine_x, step.input_user),
            _exchange(self.weight, dweight, step.panel, mine_weight, step.weight_user),
        )

    def _start(self, step: Step, x: Tensor, weight: Tensor) -> "_Panels":
        width = self.width(step.panel)
        return _Panels(
            _exchange(self.input, x, step.input_user, x.new_empty(x.size(0), width), step.panel),
            _exchange(self.weight, weight, step.weight_user, weight.new_empty(weight.size(0), width), step.panel),
        )


class _Arrival(NamedTuple):
    """A tensor, to be read when the transfer has been waited for; None where it is this rank's own."""

    tensor: Tensor
    transfer: Transfer | None


class _Panels(NamedTuple):
    x: _Arrival
    weight: _Arrival

    def wait(self) -> tuple[Tensor, Tensor]:
        for each in self:
            if each.transfer is not None:
                each.transfer.wait()
        return self.x.tensor, self.weight.tensor


def _exchange(communicator: Communicator, send: Tensor, to: int, receive: Tensor, source: int) -> _Arrival:
    """Empty panels, which uneven parts leave, are not sent."""
    if to == communicator.rank:
        assert source == communicator.rank, (to, source)
        return _Arrival(send, None)
    return _Arrival(
        receive,
        communicator.exchange(send if send.numel() else None, to, receive if receive.numel() else None, source),
    )


def linear_in_panels(x: Tensor, weight: Tensor, mesh: TensorMesh, panels: Panels, shared_weight: Axes) -> Tensor:
    """X W^T in panels, differentiable.

    x: [..., own features]; weight: [O, own features], where the whole X has `panels.features`. Returns [..., O].
    shared_weight: axes along which dW is summed as well.
    """
    rows: Tensor = _PanelLinear.apply(x.flatten(0, -2).contiguous(), weight, mesh, panels, shared_weight)
    return rows.view(*x.shape[:-1], weight.size(0))


class _PanelLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mesh: TensorMesh, panels: Panels, shared_weight: Axes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mesh, ctx.panels, ctx.shared_weight = mesh, panels, shared_weight
        y = x.new_zeros((x.size(0), weight.size(0)), dtype=accumulation_dtype(x.dtype))
        for _, panel_x, panel_weight in panels.operands(x, weight):
            y += F.linear(panel_x, panel_weight)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), dy = ctx.saved_tensors, grads[0].contiguous()
        dx, dweight = (torch.zeros_like(each, dtype=accumulation_dtype(each.dtype)) for each in (x, weight))
        home: _Panels | None = None

        def arrive() -> None:
            if home is not None:
                for total, found in zip((dx, dweight), home.wait(), strict=True):
                    total += found

        for step, panel_x, panel_weight in ctx.panels.operands(x, weight):
            found_x, found_weight = dy @ panel_weight, dy.t() @ panel_x
            arrive()
            home = ctx.panels.send_home(step, found_x, found_weight)
            if not ctx.panels.overlap:
                arrive()
                home = None
        arrive()
        dweight = raw_reduce(dweight.to(weight.dtype), ctx.mesh, ctx.shared_weight)
        return dx.to(x.dtype), dweight, None, None, None
