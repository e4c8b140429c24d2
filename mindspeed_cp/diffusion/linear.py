"""Linear layers of a transformer split over the ranks of tensor parallelism, each with its part of the weights.

Y = X W^T of a layer with weight W [out, in], on two ranks:

    by columns of the output    W = [W0; W1]    Y = [Y0, Y1]    each rank has a part of Y, which the next layer takes
                                                                as it is, or which an all-gather concatenates
    by rows of the input        W = [W0, W1]    Y = Y0 + Y1     each rank has a part of X, and an all-reduce sums the
                                                                products; the bias is added once, after it

(Columns and rows are those of W^T, as it multiplies X.) An MLP splits its first layer by columns and its second one by
rows: one all-reduce for both. Attention likewise, its heads being columns.

Source: Megatron-LM arXiv:1909.08053.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_cp.comm import Communicator
from mindspeed_cp.comm.reduction import accumulation_dtype, all_reduce


class _Split(nn.Module):
    """What the layers share: this rank's part of each parameter, which whole state dicts are cut into on loading.

    communicator: the ranks of tensor parallelism. widths: of the blocks that lie one after another along the dim that
    is cut; each rank has its part of every block.
    """

    _DIMS: dict[str, int]
    """Along which each parameter is cut; those that are not named are whole on every rank."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, communicator: Communicator, widths: Sequence[int], what: str) -> None:
        super().__init__()
        for width in widths:
            if width % communicator.size:
                raise ValueError(
                    f"tp={communicator.size} does not divide the {width} {what} of a layer; use a divisor of {width}."
                )
        self._communicator, self._widths = communicator, tuple(widths)

    def _take(self, name: str, whole: Tensor | None) -> None:
        """Keep this rank's part of a parameter."""
        part = None if whole is None else nn.Parameter(self._part(name, whole.detach()), requires_grad=False)
        self.register_parameter(name, part)

    def _part(self, name: str, whole: Tensor) -> Tensor:
        if name not in self._DIMS:
            return whole
        dim, size, rank = self._DIMS[name], self._communicator.size, self._communicator.rank
        blocks = whole.split(self._widths, dim)
        return torch.cat([block.chunk(size, dim)[rank] for block in blocks], dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a whole parameter's part; one that is a part already is taken as it is."""
        for name, held in self.named_parameters(recurse=False):
            whole = state_dict.get(prefix + name)
            if whole is not None and whole.shape != held.shape:
                state_dict[prefix + name] = self._part(name, whole)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ColumnLinear(_Split):
    """A linear layer of which this rank has a part of the outputs.

    linear: the whole layer. blocks: of equal width that its outputs consist of, of each of which a rank has its part: 3
    for q, k and v in one. gather: whether the parts are concatenated on every rank, which one block allows.

    Raises ValueError where the ranks do not divide the outputs.
    """

    _DIMS = {"weight": 0, "bias": 0}

    def __init__(self, linear: nn.Linear, communicator: Communicator, *, blocks: int = 1, gather: bool = False) -> None:
        if linear.out_features % blocks or (gather and blocks > 1):
            raise ValueError(
                f"{linear.out_features} outputs in {blocks} blocks{' gathered in order' * gather}: give a number that "
                f"divides them{', which is 1 where they are gathered' * gather}."
            )
        super().__init__(communicator, [linear.out_features // blocks] * blocks, "outputs")
        self.in_features, self.out_features = linear.in_features, linear.out_features // communicator.size
        self._gather = gather
        self._take("weight", linear.weight)
        self._take("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of the outputs, or all of them, from whole inputs [..., in]."""
        y = F.linear(x, self.weight, self.bias)
        if not self._gather or not y.numel():
            return y
        return self._communicator.all_gather(y.contiguous()).movedim(0, -2).flatten(-2)


class RowLinear(_Split):
    """A linear layer of which this rank has a part of the inputs.

    linear: the whole layer. widths: of the blocks that its inputs consist of, where they come from several layers that
    are split by columns.

    Raises ValueError where the ranks do not divide the inputs.
    """

    _DIMS = {"weight": 1}

    def __init__(self, linear: nn.Linear, communicator: Communicator, *, widths: Sequence[int] | None = None) -> None:
        widths = [linear.in_features] if widths is None else widths
        if sum(widths) != linear.in_features:
            raise ValueError(f"blocks of {tuple(widths)} are no {linear.in_features} inputs; give widths that add up.")
        super().__init__(communicator, widths, "inputs")
        self.in_features, self.out_features = linear.in_features // communicator.size, linear.out_features
        self._take("weight", linear.weight)
        self._take("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """All outputs, on every rank, from this rank's part of the inputs [..., in / ranks]."""
        y = _sum(self._communicator, F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class ColumnRMSNorm(_Split):
    """RMS norm over features of which this rank has a part. norm: the whole one."""

    _DIMS = {"weight": 0}

    def __init__(self, norm: nn.RMSNorm, communicator: Communicator) -> None:
        (width,) = norm.normalized_shape
        super().__init__(communicator, [width], "normalised features")
        self._width, self._eps = width, norm.eps
        self._scaled = norm.elementwise_affine
        self._take("weight", norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of [..., features / ranks], with the mean square of all of them."""
        wide = x.to(accumulation_dtype(x.dtype))
        mean = _sum(self._communicator, wide.square().sum(-1, keepdim=True)) / self._width
        eps = torch.finfo(x.dtype).eps if self._eps is None else self._eps
        y = wide * torch.rsqrt(mean + eps)
        return (y * self.weight if self._scaled else y).to(x.dtype)


def _sum(communicator: Communicator, x: Tensor) -> Tensor:
    """Over the ranks; nothing is sent for a share of no tokens."""
    return all_reduce(communicator, x) if x.numel() else x
