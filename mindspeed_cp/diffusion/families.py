"""Plans of the transformers of diffusers, by the name of their class; data.

A model that is not listed says itself where tokens are split, where diffusers has been told (`_cp_plan`): see
`declared_plan`.
"""

from typing import Any

from torch import nn

from mindspeed_cp.diffusion.transformer import Gather, Guidance, Split, TransformerPlan


def _all(patterns: str) -> dict[str, int]:
    return dict.fromkeys(patterns.split(), 1)


def _rows(patterns: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(patterns.split(), ())


FAMILIES = {
    # Text and image are two streams that attend together: both are shared, and only the image comes back.
    "SD3Transformer2DModel": TransformerPlan(
        splits=(Split("transformer_blocks.0", "hidden_states"), Split("transformer_blocks.0", "encoder_hidden_states")),
        gathers=(Gather("proj_out"),),
        columns=_all(
            "transformer_blocks.*.to_q transformer_blocks.*.to_k transformer_blocks.*.to_v "
            "transformer_blocks.*.add_q_proj transformer_blocks.*.add_k_proj transformer_blocks.*.add_v_proj "
            "transformer_blocks.*.net.0.proj"
        ),
        rows=_rows("transformer_blocks.*.to_out.0 transformer_blocks.*.to_add_out transformer_blocks.*.net.2"),
        guidance="batch",
        optional=True,
    ),
    # Rotary positions are made of text's and image's ids, so these are shared before anything is computed.
    "FluxTransformer2DModel": TransformerPlan(
        splits=(
            Split("", "hidden_states"),
            Split("", "encoder_hidden_states"),
            Split("", "img_ids", -2),
            Split("", "txt_ids", -2),
        ),
        gathers=(Gather("proj_out"),),
        columns=_all(
            "*transformer_blocks.*.to_q *transformer_blocks.*.to_k *transformer_blocks.*.to_v "
            "transformer_blocks.*.add_q_proj transformer_blocks.*.add_k_proj transformer_blocks.*.add_v_proj "
            "transformer_blocks.*.net.0.proj single_transformer_blocks.*.proj_mlp"
        ),
        rows=_rows("transformer_blocks.*.to_out.0 transformer_blocks.*.to_add_out transformer_blocks.*.net.2")
        | {"single_transformer_blocks.*.proj_out": ("attn.to_v", "proj_mlp")},
        guidance="calls",
        optional=True,
    ),
    "WanTransformer3DModel": TransformerPlan(
        # Timesteps of two dims are of tokens.
        splits=(Split("blocks.0", "hidden_states"), Split("rope", 0), Split("rope", 1), Split("", "timestep")),
        gathers=(Gather("proj_out"),),
        columns=_all(
            "blocks.*.to_q blocks.*.to_k blocks.*.to_v blocks.*.add_k_proj blocks.*.add_v_proj blocks.*.ffn.net.0.proj"
        ),
        rows=_rows("blocks.*.to_out.0 blocks.*.ffn.net.2"),
        norms=("blocks.*.norm_q", "blocks.*.norm_k", "blocks.*.norm_added_k"),
        guidance="calls",
        optional=True,
    ),
    "PixArtTransformer2DModel": TransformerPlan(
        splits=(Split("transformer_blocks.0", "hidden_states"),),
        gathers=(Gather("proj_out"),),
        columns=_all(
            "transformer_blocks.*.to_q transformer_blocks.*.to_k transformer_blocks.*.to_v "
            "transformer_blocks.*.net.0.proj"
        ),
        rows=_rows("transformer_blocks.*.to_out.0 transformer_blocks.*.net.2"),
        guidance="batch",
        optional=True,
    ),
}


def plan_for(model: nn.Module, guidance: Guidance | None = None) -> TransformerPlan:
    """The plan of a transformer of diffusers. guidance: how its pipeline computes branches, where it is not listed.

    Raises ValueError for a model that is neither listed nor tells diffusers where its tokens are split.
    """
    name = type(model).__name__
    if name in FAMILIES:
        return FAMILIES[name]
    if not getattr(model, "_cp_plan", None):
        raise ValueError(
            f"{name} is not one of {', '.join(FAMILIES)}, and tells diffusers of no place where its tokens are split "
            f"(_cp_plan); give parallelize a TransformerPlan for it."
        )
    return declared_plan(model._cp_plan, guidance)


def declared_plan(declared: Any, guidance: Guidance | None = None) -> TransformerPlan:
    """What a model declares for diffusers' own context parallelism, as a plan; without a split of layers."""
    splits: list[Split] = []
    gathers: list[Gather] = []
    for module, said in declared.items():
        if not isinstance(said, dict):
            gathers.append(Gather(module, dim=said.gather_dim))
            continue
        for tensor, place in said.items():
            splits.append(Split(module, tensor, place.split_dim))
    return TransformerPlan(splits=tuple(splits), gathers=tuple(gathers), guidance=guidance)
