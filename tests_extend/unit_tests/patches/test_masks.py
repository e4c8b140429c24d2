"""Who sees whom in a layer: what its mask says, what its type says without one, and the masks that some stages lack."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.attention import build_attention
from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.layer_attention import LayerAttention
from mindspeed_cp.patches.unsupported import refuse_lost_documents, refuse_unsupported
from unit_tests.dense import causal_mask, dense_attention


def tensors():
    """Query, key and value of 6 tokens: [S, B, N, D]."""
    return torch.randn(3, 6, 2, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(mask_type, size=1):
    """A layer that reads masks; it takes itself for one of so many ranks."""
    configs = [ContextParallelConfig(attention_mask_type=kind) for kind in ("causal", "general")]
    causal, general = (
        replace(build_attention(config), config=replace(config, context_parallel_size=size)) for config in configs
    )
    return LayerAttention(causal, general, mask_type, scale=0.3)


@pytest.mark.parametrize(
    ("built", "called", "visible"),
    [
        ("causal", None, causal_mask(6)),
        ("causal", "no_mask", None),
        ("no_mask", None, None),
        ("no_mask", "causal", causal_mask(6)),
        ("padding", None, None),
    ],
)
def test_layer_without_a_mask_attends_as_its_type_says(built, called, visible):
    q, k, v = tensors()
    out = layer(built)(q, k, v, None, mask_type=called)
    dense = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    visible = torch.ones(6, 6, dtype=torch.bool) if visible is None else visible
    exact = dense_attention(*dense, torch.zeros_like(dense[0]), visible=visible, scale=0.3).out
    torch.testing.assert_close(out, exact.permute(2, 0, 1, 3).flatten(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_type", ["arbitrary", "padding_causal", "causal_bottom_right"])
def test_layer_whose_type_says_nothing_without_a_mask_asks_for_one(mask_type):
    with pytest.raises(ValueError, match=f"a layer with the mask type {mask_type} was given no attention_mask"):
        layer(mask_type)(*tensors(), None)
    layer(mask_type)(*tensors(), torch.zeros(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 6, 6), torch.bool),  # the tokens of this rank alone
        ((2, 1, 12, 12), torch.bool),  # not sharded
        ((2, 6, 12), torch.bool),
        ((3, 1, 6, 12), torch.bool),
        ((2, 3, 6, 12), torch.bool),
        ((2, 1, 6, 12), torch.uint8),  # which `~` would not negate
    ],
)
def test_mask_of_another_shape_or_dtype_is_refused_as_it_was_given(shape, dtype):
    message = (
        f"attention_mask is {list(shape)} of {dtype}, and this rank's 6 queries of 12 tokens need "
        f"[2 or 1, 4 or 1, 6, 12] of torch.bool, True where masked; "
        f"Megatron's get_batch_on_this_cp_rank gives each rank the rows of its own tokens."
    )
    with pytest.raises(ValueError) as refusal:
        layer("causal", size=2)(*tensors(), torch.zeros(shape, dtype=dtype))
    assert str(refusal.value) == message


def arguments(**changes):
    """Megatron's arguments after validate_args, of a run with documents masked from each other."""
    return SimpleNamespace(
        **{
            "reset_attention_mask": True,
            "create_attention_mask_in_dataloader": True,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("option", "release", "stages", "virtual", "whole"),
    [
        ("dataloader_inter_document_masking", "0.19.2", 4, None, 4),
        ("dataloader_inter_document_masking", "0.19.2", 2, 2, 4),
        ("sft", "0.16.1", 3, None, 3),
    ],
)
def test_packed_streams_are_refused_in_stages_that_are_not_told_where_they_end(option, release, stages, virtual, whole):
    config, pipeline = ContextParallelConfig(context_parallel_size=4), {"virtual_pipeline_model_parallel_size": virtual}
    args = arguments(**pipeline, **{option: True}, pipeline_model_parallel_size=stages)
    with pytest.raises(ConfigurationError) as refusal:
        refuse_lost_documents(args, config, release)
    assert str(refusal.value) == (
        f"--{option.replace('_', '-')} with --context-parallel-size 4 and {whole} pipeline stages, virtual ones "
        f"included: Megatron {release} tells the first and the last alone where documents end; use "
        f"--pipeline-model-parallel-size 1, or 2 without virtual stages, or --reset-attention-mask."
    )
    refuse_lost_documents(arguments(**pipeline, pipeline_model_parallel_size=stages), config, release)
    refuse_lost_documents(arguments(sft=True, pipeline_model_parallel_size=4), config, "0.17.1")
    refuse_lost_documents(arguments(**{option: True}, pipeline_model_parallel_size=2), config, release)


def test_packed_streams_are_refused_beside_fused_rotary_embeddings():
    config = ContextParallelConfig(context_parallel_size=4)
    fused = {"reset_attention_mask": False, "apply_rope_fusion": True}
    with pytest.raises(ConfigurationError, match=r"--sft with --context-parallel-size 4 and fused.*--no-rope-fusion"):
        refuse_unsupported(arguments(**fused, sft=True), config)
    refuse_unsupported(arguments(**fused), config)


@pytest.mark.parametrize("mask_type", ["general", "causal"])
def test_documents_are_not_masked_by_a_mask_that_is_not_made(mask_type):
    config = ContextParallelConfig(context_parallel_size=4, attention_mask_type=mask_type)
    args = arguments(create_attention_mask_in_dataloader=False)
    with pytest.raises(ConfigurationError) as refusal:
        refuse_unsupported(args, config)
    assert str(refusal.value) == (
        "--reset-attention-mask with --context-parallel-size 4 and --no-create-attention-mask-in-dataloader: no mask "
        "is made, so documents would see each other; leave out one of the two."
    )
    args.reset_attention_mask = False
    refuse_unsupported(args, config)
