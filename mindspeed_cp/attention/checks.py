"""Whether the arguments of a call fit: what a rank finds by itself, before ranks compare what they have come with.

Shapes: B batch, N query heads, G key/value heads, S query tokens, T keys, D key head size, V value head size.
"""

import torch
from torch import Tensor

from mindspeed_cp.attention.terms import default_scale
from mindspeed_cp.kernels import TileCase, TileTerms
from mindspeed_cp.kernels.precision import autocast_is_on
from mindspeed_cp.plan import AttentionPlan


def in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype: where they differ, that of torch.autocast, if it is on.

    That is what it does for torch's own scaled_dot_product_attention, but for fp64, which it leaves alone.
    """
    if any(hasattr(x, "to_local") for x in (q, k, v)):
        raise ValueError("q, k or v is a DTensor, and attention takes each rank's own shard; give q.to_local().")
    device_type = q.device.type
    if q.dtype == k.dtype == v.dtype or not autocast_is_on(device_type):
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    q, k, v = (x.to(dtype) if x.dtype in castable else x for x in (q, k, v))
    return q, k, v


def check_shards(q: Tensor, k: Tensor, v: Tensor, *, same_tokens: bool = True) -> None:
    """Raise ValueError unless these are the shards of one rank, see Attention. same_tokens: as many of q as of k."""
    if q.dim() == k.dim() == v.dim() == 4 and not min(q.size(1), q.size(3), k.size(1), v.size(3)):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: one head and a head size of 1 at least; only "
            f"batch and tokens may be 0."
        )
    TileCase.of(q, k, v, TileTerms(1.0))
    if same_tokens and q.size(2) != k.size(2):
        raise ValueError(
            f"a rank's q has {q.size(2)} tokens and its k {k.size(2)}: without a plan it gives those of the same "
            f"tokens; do so, or give plan=, with queries and keys of their own."
        )


def check_mask(visible: Tensor, q: Tensor, keys: int, num_ranks: int) -> None:
    """Raise ValueError unless these are the mask's rows for one of so many ranks, see Attention."""
    rows = q.size(2)
    needed = f"give [{rows}, {keys}] or [1 or {q.size(0)}, 1 or {q.size(1)}, {rows}, {keys}]"
    of_heads = visible.dim() == 4 and visible.size(0) in (1, q.size(0)) and visible.size(1) in (1, q.size(1))
    if (visible.dim() != 2 and not of_heads) or tuple(visible.shape[-2:]) != (rows, keys):
        raise ValueError(
            f"a mask of {tuple(visible.shape)} is not one for this rank's {rows} queries over the {keys} keys of "
            f"{num_ranks} ranks, q being {tuple(q.shape)}; {needed}."
        )
    if visible.device != q.device:
        raise ValueError(f"a mask is on {visible.device} and q on {q.device}; move it, visible.to(q.device).")
    if visible.dtype != torch.bool:
        raise ValueError(
            f"a mask is boolean, True where a query sees a key, and this one is {visible.dtype}; "
            f"give `mask > 0`, or `mask == 0` for one that is added to the scores."
        )


def check_plan(plan: AttentionPlan, q: Tensor, k: Tensor, rank: int, num_ranks: int) -> None:
    """Raise ValueError unless q [B, N, S, D] and k [B, G, T, D] are what a plan of these ranks has on this one."""
    for name, x, layout in (("q", q, plan.queries), ("k", k, plan.keys)):
        if layout.num_ranks != num_ranks:
            raise ValueError(
                f"the plan deals {name} to {layout.num_ranks} ranks, and the context-parallel group has {num_ranks}; "
                f"make it for {num_ranks}."
            )
        if x.size(2) != layout.num_tokens(rank):
            raise ValueError(
                f"{name} {tuple(x.shape)} has {x.size(2)} tokens, and the plan has {layout.num_tokens(rank)} on rank "
                f"{rank}; shard by the plan's own layout, for this rank."
            )
        samples = {run.sample for run in layout.runs(rank)} - {None}
        if samples and (samples != set(range(x.size(0)))):
            raise ValueError(
                f"{name} {tuple(x.shape)} has {x.size(0)} samples, and the plan has documents for {len(samples)}; give "
                f"the batch that it was made for."
            )


def refuse_other_plans(plan: object) -> None:
    """Raise ValueError for what is no plan."""
    if plan is None or isinstance(plan, AttentionPlan):
        return
    way_out = "plan=batch.plan" if isinstance(getattr(plan, "plan", None), AttentionPlan) else "an AttentionPlan"
    raise ValueError(f"plan is a {type(plan).__name__}; give {way_out}.")


def refuse_mask(visible: Tensor | None, plan: AttentionPlan | None, *, causal: bool) -> None:
    """Raise ValueError where a causal attention is given a mask, or one beside a plan that says who sees whom."""
    if visible is not None and plan is not None and not plan.shows_all:
        raise ValueError(
            "a call with a plan takes no mask tensor: each says who sees whom; leave out `visible`, or give a plan of "
            "one document in which all see all."
        )
    if causal and visible is not None:
        raise ValueError(
            "a causal attention takes no mask tensor: it would be one of the two; build it with "
            "attention_mask_type='general' to use the tensor."
        )


def refuse_learnt(scale: float | Tensor | None) -> None:
    """Raise ValueError for a scale that wants a gradient."""
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scale is a tensor that requires a gradient, and attention gives it none; multiply q by it, and give "
            "scale=1.0."
        )


def scale_as_number(scale: float | Tensor | None, q: Tensor) -> float:
    """The factor on the scores as a number. Raises ValueError for one that is none, or that wants a gradient."""
    if scale is None:
        return default_scale(q.size(-1))
    refuse_learnt(scale)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(f"scale is a tensor of {tuple(scale.shape)}; give one number, or multiply q by it.")
    value = float(scale) + 0.0  # -0.0 is 0.0.
    largest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max
    if not abs(value) <= largest:
        raise ValueError(
            f"scale is {value}, and scores are computed up to {largest:.2g}; give a finite number, or None for "
            f"1 / sqrt({q.size(-1)})."
        )
    return value
