"""Two uses of states on one rank: keys in chunks, and a prefix that sequences share."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mindspeed_cp.inference.local import attention_state
from mindspeed_cp.inference.sequences import Spans
from mindspeed_cp.inference.states import State, merge_states
from mindspeed_cp.plan import CAUSAL, FULL, AttentionPlan


class Shared(NamedTuple):
    """Keys and values that groups of neighbouring sequences share: k [groups, G, T, D], v [groups, G, T, V]."""

    k: Tensor
    v: Tensor


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int, causal: bool = True, scale: float | None = None
) -> State:
    """Attention over so many keys at a time, exactly that over all at once; the last query sees the last key.

    q: [B, N, S, D]; k: [B, G, T, D]; v: [B, G, T, V]. Returns out in fp32 (fp64 for fp64), and lse. No gradients.
    Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} keys at a time: give 1 or more.")
    parts = [(first, min(first + chunk, k.size(2))) for first in range(0, k.size(2), chunk)] or [(0, 0)]
    plans = (_late_queries(q.size(2), k.size(2), part, causal) for part in parts)
    states = [
        attention_state(q, k[:, :, slice(*part)], v[:, :, slice(*part)], plan=plan, scale=scale)
        for part, plan in zip(parts, plans, strict=True)
    ]
    return merge_states(*zip(*states, strict=True))


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: Sequence[Shared],
    *,
    causal: bool = True,
    scale: float | None = None,
) -> State:
    """Attention over prefixes that sequences share, each read once for all that share it, and over their own keys.

    q: [B, N, S, D]; k: [B, G, T, D]; v: [B, G, T, V], each sequence's own tokens, behind all prefixes; the last query
    sees the last key. shared: from the first level to the last; sequence b reads group b // (B / groups) of each.

    Returns out in fp32 (fp64 for fp64), and lse. No gradients. Raises ValueError where groups do not divide the
    sequences.
    Source: Hydragen arXiv:2402.05099.
    """
    states = [chunked_attention(q, k, v, chunk=max(k.size(2), 1), causal=causal, scale=scale)]
    for prefix in shared:
        groups = prefix.k.size(0)
        if groups < 1 or q.size(0) % groups:
            raise ValueError(f"{groups} shared prefixes for {q.size(0)} sequences; give a number that divides them.")
        # The group's sequences are more queries of one: (g s) n t d -> g n (s t) d. All of them see all of the prefix.
        together = q.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2, 3)
        state = attention_state(together, prefix.k, prefix.v, scale=scale)
        out, lse = (x.unflatten(2, (-1, q.size(2))).transpose(1, 2).flatten(0, 1) for x in state)
        states.append(State(out, lse))
    return merge_states(*zip(*states, strict=True))


def _late_queries(num_queries: int, num_keys: int, part: tuple[int, int], causal: bool) -> AttentionPlan:
    """The plan of the last queries of a sequence over a part of its keys."""
    first = num_keys - num_queries
    if first < 0 and causal:
        raise ValueError(
            f"{num_queries} queries over {num_keys} keys: the first ones would see none; give their keys too."
        )
    queries = ((max(first, 0), max(first, 0) + num_queries),) if num_queries else ()
    keys = (part,) if part[0] < part[1] else ()
    return AttentionPlan(Spans(((queries,),)), Spans(((keys,),)), CAUSAL if causal else FULL)
