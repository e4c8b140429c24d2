"""Names in profiles."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def in_profiles(name: str | Callable[[], str]) -> AbstractContextManager[object]:
    """Within it, what runs has this name in a profile. Without a profiler it costs one look, and no name is made."""
    if not _profiler_is_on():
        return _NOTHING
    return record_function(name if isinstance(name, str) else name())


_profiler_is_on = torch._C._autograd._profiler_enabled
_NOTHING = nullcontext()
