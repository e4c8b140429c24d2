"""Classifier-free guidance: how a step's branches are combined, and their computation shared among ranks.

    rank along cfg     0              1                  branch i is computed by rank i modulo their number; then each
    computes           negative       positive           sends what it has to the others, once a step, and all combine

Ranks that are left over wait.

Sources: classifier-free guidance arXiv:2207.12598; rescaling arXiv:2305.08891, section 3.4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mindspeed_cp.diffusion.mesh import ParallelMesh
from mindspeed_cp.diffusion.tokens import exchange_parts

Output = TypeVar("Output", Tensor, tuple[Tensor, ...])
Combined = TypeVar("Combined")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NUM_WORDS, _END = 128, -1


def guide(positive: Tensor, negative: Tensor, scale: float, *, normalize: bool = False, rescale: float = 0.0) -> Tensor:
    """The guided prediction: negative + scale * (positive - negative), [B, ...].

    normalize: give each vector along the last dim the norm of the positive one's. rescale: from 0 to 1, how far each
    sample's standard deviation is brought to the positive one's.

    Raises ValueError for shapes that differ, or a rescale outside 0..1.
    """
    if positive.shape != negative.shape:
        raise ValueError(f"branches of {tuple(positive.shape)} and {tuple(negative.shape)}: give them alike.")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale={rescale} is a share of the way; give 0 (off) to 1.")
    guided = negative + scale * (positive - negative)
    if normalize:
        norm = guided.norm(dim=-1, keepdim=True)
        guided = guided * (positive.norm(dim=-1, keepdim=True) / norm.clamp(min=torch.finfo(norm.dtype).tiny))
    if rescale:
        dims = tuple(range(1, guided.dim()))
        deviation = guided.std(dim=dims, keepdim=True).clamp(min=torch.finfo(guided.dtype).tiny)
        rescaled = guided * (positive.std(dim=dims, keepdim=True) / deviation)
        guided = rescale * rescaled + (1.0 - rescale) * guided
    return guided


class GuidanceParallel:
    """The branches of a step, shared among the ranks along the mesh's cfg axis.

    An object is kept for all steps: where ranks are left over, the first step tells them what they will receive.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self._communicator = mesh.communicators.get("cfg")
        self._forms: dict[object, _Form] = {}

    @property
    def size(self) -> int:
        """Ranks that share the branches."""
        return self._mesh.shape.cfg

    def computes(self, branch: int) -> bool:
        """Whether this rank computes the branch of that number."""
        return branch % self.size == self._mesh.index("cfg")

    def __call__(
        self,
        predict: Callable[..., Output],
        branches: Sequence[Mapping[str, Any]],
        combine: Callable[..., Combined],
    ) -> Combined:
        """What `combine(*outputs)` gives of all branches' outputs, in their order, on every rank.

        predict: a branch's output, a tensor or a tuple of tensors of one dtype, from its keyword arguments. branches:
        those arguments of each branch, alike on all ranks; 2 or more.

        Raises ValueError where there is one branch for several ranks, or outputs differ in form.
        """
        mine = {number: predict(**each) for number, each in enumerate(branches) if self.computes(number)}
        found = (each for branch in branches for each in branch.values() if isinstance(each, Tensor))
        like = next(found, None)
        if like is None:
            raise ValueError("no branch has a tensor among its arguments; give what is predicted from by keyword.")
        return combine(*self.share(mine, len(branches), like))

    def share(self, mine: Mapping[int, Output], num_branches: int, like: Tensor) -> list[Output]:
        """The outputs of all branches, in their order, from those that this rank has computed.

        like: a tensor on the device of the outputs, of one shape on all ranks.
        """
        refuse_one_branch(num_branches, self.size)
        if self._communicator is None:
            return [mine[number] for number in range(num_branches)]
        form = self._form(mine, num_branches, like)
        size, numbers = self.size, sum(shape.numel() for shape in form.shapes)
        owned = [range(owner, num_branches, size) for owner in range(size)]
        flat = [part.reshape(-1) for number in sorted(mine) for part in _parts(mine[number])]
        sent = torch.cat(flat) if flat else like.new_empty(0, dtype=form.dtype)
        lengths = tuple(len(each) * numbers for each in owned)
        received = exchange_parts(sent, lengths, self._communicator, dim=0)
        outputs = {
            number: form.of(content)
            for branches, message in zip(owned, received, strict=True)
            for number, content in zip(branches, message.view(len(branches), numbers), strict=True)
        }
        return [outputs[number] for number in range(num_branches)]

    def _form(self, mine: Mapping[int, Output], num_branches: int, like: Tensor) -> "_Form":
        """What an output is made of; ranks that are left over are told by the first one, and remember it."""
        forms = {_Form.read_off(each) for each in mine.values()}
        if len(forms) > 1:
            raise ValueError(f"the branches of a step give outputs of several forms, {forms}; give all of them alike.")
        if num_branches >= self.size:
            return forms.pop()
        case = num_branches, tuple(like.shape)
        if case not in self._forms:
            assert self._communicator is not None
            words = forms.pop().words() if forms else [0] * _NUM_WORDS
            told = self._communicator.all_gather(torch.tensor(words, device=like.device))
            self._forms[case] = _Form.from_words(told[0].tolist())
        return self._forms[case]


class _Form(NamedTuple):
    """Shapes of the tensors that an output is made of, and their dtype. is_tuple: whether it is a tuple of them."""

    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    is_tuple: bool

    @classmethod
    def read_off(cls, output: Tensor | tuple[Tensor, ...]) -> "_Form":
        """Of an output."""
        parts = _parts(output)
        dtypes = {part.dtype for part in parts}
        if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
            raise ValueError(
                f"a branch gives tensors of {dtypes}; one message takes one of {', '.join(map(str, _DTYPES))}."
            )
        return cls(tuple(part.shape for part in parts), dtypes.pop(), isinstance(output, tuple))

    def of(self, content: Tensor) -> Any:
        """The output whose numbers these are."""
        pieces = content.split([shape.numel() for shape in self.shapes])
        parts = tuple(piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        return parts if self.is_tuple else parts[0]

    def words(self) -> list[int]:
        """As integers, of which there are always as many."""
        words = [_DTYPES.index(self.dtype), int(self.is_tuple)]
        for shape in self.shapes:
            words += [len(shape), *shape]
        if len(words) >= _NUM_WORDS:
            raise ValueError(
                f"an output of {len(self.shapes)} tensors is too much for ranks that are left over; use fewer."
            )
        return words + [_END] * (_NUM_WORDS - len(words))

    @classmethod
    def from_words(cls, words: list[int]) -> "_Form":
        """The inverse of `words`."""
        shapes, place = [], 2
        while words[place] != _END:
            end = place + 1 + words[place]
            shapes.append(torch.Size(words[place + 1 : end]))
            place = end
        return cls(tuple(shapes), _DTYPES[words[0]], bool(words[1]))


def refuse_one_branch(num_branches: int, num_ranks: int) -> None:
    """Raise ValueError where several ranks along cfg would have one branch."""
    if num_branches < 2 <= num_ranks:
        raise ValueError(
            f"a step has {num_branches} branch and cfg={num_ranks}: guidance is off (a scale of 1, or no negative "
            f"prompt), so that the other ranks would wait; use cfg=1, with ulysses or ring in its stead, or turn it on."
        )


def _parts(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
