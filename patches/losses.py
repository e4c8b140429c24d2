"""Means over the tokens of all context-parallel ranks where Megatron divides by those of each rank.

Both are the same where every rank counts as many tokens. With a loss mask they are not: a rank with few unmasked tokens
would weigh as much as one with many, and the gradients would not be those of CP = 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from mindspeed_cp.layouts import StreamLayout
from mindspeed_cp.patches.packing import ends_with_padding, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall
from mindspeed_cp.sharding import has_next, restore, shard

_ROLL_TENSOR = "megatron.core.transformer.multi_token_prediction:roll_tensor"


def loss_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of Megatron's pipeline schedules and of multi-token prediction."""
    return (
        Patch(
            target="megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
            kind="around",
            function=functools.partial(_calculate_loss, plugin),
            parameters=("loss_func", "config"),
            why="It divides a micro-batch's loss by the tokens of each context-parallel rank: with a loss mask the "
            "gradients would not be those of CP = 1. And evaluation with --sft is a mean of each rank's means.",
            remove_when="Megatron divides by the tokens of all context-parallel ranks.",
        ),
        *(
            Patch(
                target=_ROLL_TENSOR,
                kind="around",
                function=functools.partial(_roll_tensor, plugin),
                parameters=("tensor", "cp_group", "packed_seq_params"),
                aliases=aliases,
                versions=versions,
                why="The loss of multi-token prediction is divided by the count that it gives, which is that of one "
                "context-parallel rank.",
                remove_when="Megatron counts the tokens of all context-parallel ranks.",
            )
            # Before 0.17 the model itself computes that loss.
            for versions, aliases in (("<0.17", ("megatron.core.models.gpt.gpt_model:roll_tensor",)), (">=0.17", ()))
        ),
    )


def _calculate_loss(plugin: Plugin, call: PatchedCall) -> Any:
    if plugin.groups is None:
        return call.proceed()
    group, loss_func = plugin.groups.context_parallel, call["loss_func"]
    if not torch.is_grad_enabled():
        loss_func = functools.partial(_report_of_all, loss_func, group)
    # --calculate-per-token-loss divides at the end, by the tokens of all ranks.
    if not call["config"].calculate_per_token_loss:
        loss_func = functools.partial(_divide_by_all_tokens, loss_func, group)
    return call.proceed(loss_func=loss_func)


def _divide_by_all_tokens(
    loss_func: Callable[..., Any], group: dist.ProcessGroup, output: Tensor, **options: Any
) -> Any:
    """What `loss_func` gives, with the loss divided already: by the mean number of tokens of a rank of `group`.

    A loss function gives the sum of this rank's losses, the number of its tokens, and what is to be logged. What is
    anything else (Megatron's older convention, or no loss) is left as it is.
    """
    outputs = loss_func(output, **options)
    if options or len(outputs) != 3:
        return outputs
    loss, num_tokens, report = outputs
    all_tokens = num_tokens.detach().clone()
    dist.all_reduce(all_tokens, group=group)
    # Not the mean in the place of the number: Megatron clamps that to 1.
    return loss * (group.size() / all_tokens.clamp(min=1)), torch.ones_like(num_tokens), report


def _report_of_all(loss_func: Callable[..., Any], group: dist.ProcessGroup, output: Tensor, **options: Any) -> Any:
    """What `loss_func` gives, with what is to be logged as that of all ranks of `group`.

    Of a micro-batch it is the sum of the losses and the number of tokens; with --sft Megatron's evaluation divides the
    one by the other before it asks other ranks.
    """
    outputs = loss_func(output, **options)
    if options or len(outputs) != 3:
        return outputs
    loss, num_tokens, report = outputs
    return loss, num_tokens, summed_reports([report], group)


def summed_reports(reports: Sequence[dict[str, Tensor]], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """One report of several of this rank's, and of the other ranks' of `group`: a loss is its sum and its tokens.

    What is given as another number than two is left as the last report has it.
    """
    summed = dict(reports[-1])
    for name, numbers in summed.items():
        if numbers.numel() == 2:
            summed[name] = torch.stack([report[name].view(-1) for report in reports]).sum(dim=0)
            dist.all_reduce(summed[name], group=group)
    return summed


def _roll_tensor(plugin: Plugin, call: PatchedCall) -> Any:
    tensor, group, packed = call["tensor"], call["cp_group"], call["packed_seq_params"]
    if tensor is None or group is None or group.size() == 1:
        return call.proceed()
    if packed is not None:
        ends = ends_with_padding(packed)
        stream = plugin.packing.stream_of(ends, group.rank(), group.size(), tensor.size(-1))
        return _roll_by(stream.layout, tensor, group)
    if plugin.length is not None:
        return _roll_by(layout_of_length(plugin.length, group.size()), tensor, group)
    rolled, total = call.proceed()
    # Tokens are rolled as well as the loss mask, and it may hold integers: one number too many travels for those.
    total = total.clone()
    dist.all_reduce(total, group=group)
    return rolled, total / group.size()


def _roll_by(layout: StreamLayout, tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Each token's successor in its document, 0 for the last, and the mean of a rank's sum.

    tensor: [..., t], what this rank holds by this layout. Megatron's rule at CP = 1; with more ranks it takes shards to
    be equal, and every document of a stream to be cut as a zigzag of its own, in lengths that 2 x CP divides.
    """
    tokens = [layout.num_tokens(rank) for rank in range(group.size())]
    filled = pad(tensor, (0, max(tokens) - tensor.size(-1)))
    shards = [torch.empty_like(filled) for _ in tokens]
    dist.all_gather(shards, filled.contiguous(), group=group)
    whole = restore([each[..., :length] for each, length in zip(shards, tokens, strict=True)], layout, -1)
    rolled = whole.roll(-1, dims=-1) * has_next(layout, whole.device)[0]
    return shard(rolled, layout, group.rank(), -1), rolled.sum() / group.size()
