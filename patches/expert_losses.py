"""Losses that balance experts, where the ranks of a sequence hold unequal numbers of tokens.

Megatron counts this rank's tokens and takes the others to have as many. Both losses are means over all of them.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import Patch, PatchedCall

_UTILS = "megatron.core.transformer.moe.moe_utils"
_ROUTER = "megatron.core.transformer.moe.router"


def expert_loss_patches(plugin: Plugin) -> tuple[Patch, ...]:
    """Patches of what the auxiliary losses divide by, and of the loss of large scores."""
    why = "It takes the other ranks to have as many tokens as this one."
    remove_when = "Megatron counts the tokens of all ranks, as it does beside a padding mask."
    return (
        Patch(
            target=f"{_UTILS}:get_tokens_per_expert_and_token_count",
            kind="around",
            function=functools.partial(_count_tokens, plugin),
            parameters=("reduce_group", "with_padding_mask"),
            aliases=(f"{_ROUTER}:get_tokens_per_expert_and_token_count",),
            why=why,
            remove_when=remove_when,
        ),
        Patch(
            target=f"{_UTILS}:z_loss_func",
            kind="around",
            function=functools.partial(_z_loss, plugin),
            parameters=("logits",),
            aliases=(f"{_ROUTER}:z_loss_func",),
            why=why,
            remove_when=remove_when,
        ),
    )


def _count_tokens(plugin: Plugin, call: PatchedCall) -> tuple[Tensor, Any, Any]:
    if not plugin.is_unequal or call["with_padding_mask"]:
        counts: tuple[Tensor, Any, Any] = call.proceed()
        return counts
    # Each token has topk experts: their sum counts the tokens of all ranks.
    per_expert, _, total = call.proceed(with_padding_mask=True)
    # Of this rank, by which losses are weighed that are divided by all tokens in the end: the mean of a rank.
    return per_expert, total / call["reduce_group"].size(), total


def _z_loss(plugin: Plugin, call: PatchedCall) -> Tensor:
    loss: Tensor = call.proceed()
    if not plugin.is_unequal or plugin.groups is None:
        return loss
    logits = call["logits"]
    tokens = torch.tensor(float(logits.size(0)), device=logits.device)
    total = tokens.clone()
    dist.all_reduce(total, group=plugin.groups.context_parallel)
    return loss * (tokens * plugin.place[1] / total)
