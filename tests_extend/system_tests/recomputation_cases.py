"""Training through Megatron with what is sent counted by passes, and what checkpoints keep."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

from system_tests.block_cases import sent
from system_tests.compare_losses import ITERATION, losses_in
from system_tests.training_cases import log_of_training


class Counted(NamedTuple):
    """Losses by iteration, on the last rank; of this rank, bytes that attention has sent in forward and in backward
    passes, the most bytes that checkpoints have kept when one of the latter began, and what they keep after each step.
    """

    losses: dict[int, float]
    forward: int
    backward: int
    most_kept: int
    left: list[int]


def train_counted(world_size: int, port: int, flags: list[str]) -> Counted:
    """Train as log_of_training does, on Megatron's schedules of pipelines."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    from mindspeed_cp.megatron_adaptor import plugin

    in_backward, kept, left = list[int](), [0], list[int]()

    def backward_step(*args: Any, run: Callable[..., Any] = schedules.backward_step, **kwargs: Any) -> Any:
        kept.append(plugin.recomputation.nbytes)
        with sent() as messages:
            result = run(*args, **kwargs)
        in_backward.extend(messages)
        return result

    def train_step(*args: Any, run: Callable[..., Any] = training.train_step, **kwargs: Any) -> Any:
        result = run(*args, **kwargs)
        left.append(plugin.recomputation.nbytes)
        return result

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(schedules, "backward_step", backward_step))
        stack.enter_context(mock.patch.object(training, "train_step", train_step))
        messages = stack.enter_context(sent())
        losses = losses_in(log_of_training(world_size, port, flags), ITERATION)
    # The inner count has posted through the outer one.
    return Counted(losses, sum(messages) - sum(in_backward), sum(in_backward), max(kept), left)
