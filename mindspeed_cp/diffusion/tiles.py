"""Decoding of latents in tiles, shared among all ranks of a mesh.

A decoder of diffusers cuts large latents into overlapping tiles itself, decodes one after another, and blends them at
the end. Its code runs on every rank: tile n is decoded by rank n modulo their number, the others get a promise of it,
and when blending begins all tiles are exchanged. So the picture is that of one rank, to the bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindspeed_cp.diffusion.mesh import AXES, ParallelMesh
from mindspeed_cp.diffusion.pending import PendingTensor
from mindspeed_cp.diffusion.tokens import exchange_parts

_MOST_DIMS = 5


def share_tiles(vae: Any, mesh: ParallelMesh) -> None:
    """Have the ranks of a mesh share the tiles of a decoder; it is changed in place.

    vae: has a `tiled_decode`, which calls its `decoder` for each tile, or for each frame of a tile with that tile's
    `feat_cache`. It tiles where it is told to (vae.enable_tiling()), and decodes the whole on every rank else.
    """
    tiled_decode, decode = vae.tiled_decode, vae.decoder.forward
    open_tiles: list[_Tiles] = []

    @functools.wraps(tiled_decode)
    def tiled(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        open_tiles.append(_Tiles(mesh, like=z))
        try:
            return tiled_decode(z, *args, **kwargs)
        finally:
            open_tiles.pop()

    @functools.wraps(decode)
    def decoded(*args: Any, **kwargs: Any) -> Any:
        if not open_tiles:
            return decode(*args, **kwargs)
        return open_tiles[-1].ask(lambda: decode(*args, **kwargs), kwargs.get("feat_cache"))

    vae.tiled_decode, vae.decoder.forward = tiled, decoded


class _Tiles:
    """The tiles of one picture. like: a tensor on its device, with as many dims."""

    def __init__(self, mesh: ParallelMesh, like: Tensor) -> None:
        self._mesh, self._like = mesh, like
        self._tile = -1
        self._cache: Any = None
        self._owners: list[int] = []
        self._mine: list[Tensor] = []
        self._place = _place(mesh)
        self._shared: list[Tensor] = []

    def ask(self, decode: Callable[[], Tensor], cache: Any) -> Tensor:
        """A promise of a tile, or of its next frame, which one rank decodes now. cache: one object for each tile."""
        if cache is None or cache is not self._cache:
            self._tile, self._cache = self._tile + 1, cache
        owner = self._tile % self._mesh.shape.size
        self._owners.append(owner)
        if owner == self._place:
            self._mine.append(decode())
        return PendingTensor.promised(functools.partial(self._output, len(self._owners) - 1))

    def _output(self, number: int) -> Tensor:
        """Of one call, shared with that of all calls before the first use."""
        if number >= len(self._shared):
            done = len(self._shared)
            self._shared += _exchanged(self._mine, self._owners[done:], self._like, self._mesh)
            self._mine = []
        return self._shared[number]


def _place(mesh: ParallelMesh) -> int:
    """This rank's number with the axes in their default order, in which `_exchanged` puts ranks together."""
    place = 0
    for axis in AXES:
        place = place * mesh.shape.size_of(axis) + mesh.index(axis)
    return place


def _exchanged(mine: list[Tensor], owners: list[int], like: Tensor, mesh: ParallelMesh) -> list[Tensor]:
    """The outputs of all ranks, in the order of `owners`, from each one's own."""
    size, place = mesh.shape.size, _place(mesh)
    most = max(owners.count(rank) for rank in range(size))
    # Tiles at the edges are smaller, and a rank that has none does not know how large a picture comes of a latent.
    sizes = [[0] * (_MOST_DIMS - part.dim()) + list(part.shape) for part in mine]
    sizes += [[0] * _MOST_DIMS] * (most - len(mine))
    told = mesh.all_gather(torch.tensor(sizes, device=like.device), AXES).tolist()
    shapes = [[shape[-like.dim() :] for shape in rank[: owners.count(number)]] for number, rank in enumerate(told)]
    flat = torch.cat([part.reshape(-1) for part in mine]) if mine else like.new_empty(0)
    lengths = [sum(math.prod(shape) for shape in rank) for rank in shapes]
    for axis in reversed(AXES):
        if axis in mesh.communicators:
            along = mesh.shape.size_of(axis)
            # Ranks that differ along this axis alone are neighbours by now: those joined before count as one.
            first = place // along * along
            parts = exchange_parts(flat, tuple(lengths[first : first + along]), mesh.communicators[axis], dim=0)
            flat, place = torch.cat(parts), place // along
            lengths = [sum(lengths[start : start + along]) for start in range(0, len(lengths), along)]
    pieces = iter(flat.split([math.prod(shape) for rank in shapes for shape in rank]))
    by_rank = [iter([next(pieces).view(shape) for shape in rank]) for rank in shapes]
    return [next(by_rank[owner]) for owner in owners]
