"""Training through Megatron with learnable sinks, and the gradients of these alone."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from torch import Tensor

from system_tests.training_cases import log_of_training


def gradients_of_sinks(world_size: int, port: int, flags: Sequence[str], each_counts: bool) -> list[list[float]]:
    """Of all sinks of this rank, in each step, as the optimizer gets them: summed over the ranks that it sums over.

    Adam makes the same step of a gradient and of twice as much, and a dozen numbers are lost in a norm of all: only the
    gradients themselves show a sum that is one too many. each_counts: makes that mistake, a sum of our own.
    """
    from megatron.training import training

    import mindspeed_cp.megatron_adaptor  # noqa: F401  (its patches go beneath what is noted here)
    from mindspeed_cp.patches.layer_attention import LayerAttention

    found: list[list[float]] = []

    def finalize(
        model: list[Any], *rest: Any, run: Callable[..., Any] = training.finalize_model_grads, **kwargs: Any
    ) -> None:
        run(model, *rest, **kwargs)
        sinks = [each for part in model for name, each in part.named_parameters() if name.endswith("softmax_offset")]
        found.append([number for each in sinks for number in each.main_grad.tolist()])

    def counted(
        attention: LayerAttention, sinks: Tensor, *rest: Any, terms: Callable[..., Any] = LayerAttention._terms
    ) -> Any:
        return terms(attention, sinks.detach() + attention.size * (sinks - sinks.detach()), *rest)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "finalize_model_grads", finalize))
        if each_counts:
            stack.enter_context(mock.patch.object(LayerAttention, "_terms", counted))
        log_of_training(world_size, port, flags)
    return found
