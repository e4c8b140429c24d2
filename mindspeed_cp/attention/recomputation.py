"""Attention under activation checkpointing: what the forward pass has found serves the recomputation.

Note [Recomputation]
    A checkpoint runs a function twice, and what a rank sends in it travels twice. Here each call of a checkpoint has a
    record. While the function runs first, everything that attention gets from other ranks or computes from it is put
    there: output, log-sum-exp and what kernels keep, under Ulysses the exchanged q, k, v and the output that has come
    back. When it runs again attention is given that, in place of computing: it builds the graph for its backward pass
    and sends nothing, not even what ranks agree on.

    The record belongs to the function that this one call of the checkpoint holds, and to nothing else: it is found
    whichever micro-batch is recomputed first, and is gone with the graph where no backward pass comes. Within a call
    results are in the order of the function, which a recomputation repeats; one that was made for another case is not
    used. Each is handed out once, and all that is left when a recomputation ends is dropped: a further one, as
    retain_graph allows, computes anew, on all ranks alike. A checkpoint within a checkpoint puts what it finds into the
    record of the outer one too, since that runs it again.

Sources: LightSeq (DistFlashAttn) arXiv:2310.03294 keeps out and lse of rematerialised layers; BurstEngine's
selective_checkpoint++.
"""

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

Found = TypeVar("Found")


class Recomputation:
    """The records of the checkpoints that `around` has been put around; see Note [Recomputation].

    One for all layers of a rank, given to `build_attention` too.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._records: weakref.WeakSet[_Record] = weakref.WeakSet()

    def around(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint whose recomputation does not run attention again.

        checkpoint: takes the function that is to be recomputed first, as torch.utils.checkpoint.checkpoint does.

        Raises ValueError for what cannot be called.
        """
        if not callable(checkpoint):
            raise ValueError(f"{checkpoint!r} is no checkpoint; give a function as torch.utils.checkpoint.checkpoint.")

        @functools.wraps(checkpoint)
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                # Its graph has no two runs of the function, but an operator that it repeats or, by a policy, keeps.
                if _takes_policy(checkpoint, kwargs):
                    kwargs["context_fn"] = _KEEPING_ATTENTION
                return checkpoint(function, *args, **kwargs)
            if not torch.is_grad_enabled():
                return checkpoint(function, *args, **kwargs)
            record = _Record(self._current)
            before = _modes()
            self._records.add(record)

            @functools.wraps(function)
            def run(*of_function: Any, **named: Any) -> Any:
                # A policy counts the operations that it sees, and attention's are there in one of the two runs alone.
                record.is_hidden = len(_modes()) > len(before)
                with self._within(record):
                    return function(*of_function, **named)

            return checkpoint(run, *args, **kwargs)

        return checkpointed

    @property
    def is_within(self) -> bool:
        """Whether a checkpointed function runs, first or again, so that what is found is kept or was."""
        return self._current is not None

    def replay(self, case: object, find: Callable[[], Found]) -> Found:
        """What `find` gives; in a recomputation what it has given before.

        case: what it is found for. Outside of checkpoints nothing is kept.
        """
        record = self._current
        return find() if record is None else record.replay(case, find)

    def kept_now(self) -> Iterator[Tensor]:
        """All that the checkpoints keep in which this runs."""
        record = self._current
        while record is not None:
            yield from record.tensors()
            record = record.outer

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        kept = [x.untyped_storage() for record in self._records for x in record.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())

    def __deepcopy__(self, memo: object) -> "Recomputation":
        """The same object: a model that is copied stays within the checkpoints that know it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Recomputation, ()

    @property
    def _current(self) -> "_Record | None":
        return getattr(self._here, "record", None)

    @contextmanager
    def _within(self, record: "_Record") -> Iterator[None]:
        before, self._here.record = self._current, record
        try:
            yield
        finally:
            self._here.record = before
            record.end_run()


def replay(recomputation: Recomputation | None, case: object, find: Callable[[], Found]) -> Found:
    """`Recomputation.replay` of one that may not be there."""
    return find() if recomputation is None else recomputation.replay(case, find)


class _Kept(NamedTuple):
    """A tensor beside what the function makes of it: an alias that is in no graph."""

    alias: Tensor
    version: int

    def tensor(self) -> Tensor:
        """Raises RuntimeError where it has been written to since."""
        if self.alias._version != self.version:
            raise RuntimeError(
                "what attention gave within a checkpoint was changed in place, and a recomputation would take the "
                "changed one; write out = out + x in place of out += x, or leave out the kept outputs "
                "(--context-parallel-keep-outputs)."
            )
        return self.alias.detach()


class _Record:
    """What one call of a checkpoint has found. outer: of the checkpoint around it, as long as the function runs first.

    is_hidden: whether the checkpoint's dispatch modes see nothing of how it is found.
    """

    def __init__(self, outer: "_Record | None") -> None:
        self.outer = outer
        self.is_hidden = False
        self._found: deque[tuple[object, Any]] = deque()
        self.is_repeated = False

    def replay(self, case: object, find: Callable[[], Found]) -> Found:
        """See Recomputation.replay."""
        if not self.is_repeated:
            with _disable_modes() if self.is_hidden else nullcontext():
                found = find() if self.outer is None else self.outer.replay(case, find)
            self._found.append((case, _mapped(found, Tensor, lambda x: _Kept(x.detach(), x._version))))
            return found
        if self._found and self._found[0][0] == case:
            return cast("Found", _mapped(self._found.popleft()[1], _Kept, _Kept.tensor))
        self._found.clear()
        return find()

    def end_run(self) -> None:
        """What is left of a recomputation is not asked for again."""
        if self.is_repeated:
            self._found.clear()
        self.is_repeated, self.outer = True, None

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        aliases: list[Tensor] = []
        for _, found in self._found:
            _mapped(found, _Kept, lambda kept: aliases.append(kept.alias))
        yield from aliases


def _takes_policy(checkpoint: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether it is torch's, not reentrant, and called without a policy."""
    function, named = checkpoint, given
    if isinstance(checkpoint, functools.partial):
        function, named = checkpoint.func, {**checkpoint.keywords, **given}
    return function is torch_checkpoint and named.get("use_reentrant") is False and "context_fn" not in named


def _keep_attention(_: object, function: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    ours = function is torch.ops.mindspeed_cp.attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


_KEEPING_ATTENTION = functools.partial(create_selective_checkpoint_contexts, _keep_attention)


def _modes() -> list[object]:
    return cast("list[object]", _get_current_dispatch_mode_stack())


def _disable_modes() -> AbstractContextManager[object]:
    return cast("AbstractContextManager[object]", _disable_current_modes())


def _mapped(found: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same tuples and dicts, with what is of a kind changed."""
    if isinstance(found, kind):
        return change(found)
    if isinstance(found, tuple):
        changed = [_mapped(each, kind, change) for each in found]
        return found._make(changed) if hasattr(found, "_make") else tuple(changed)
    if isinstance(found, dict):
        return {key: _mapped(each, kind, change) for key, each in found.items()}
    return found
