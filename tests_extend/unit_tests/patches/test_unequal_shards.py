"""Ranks that hold unequal numbers of tokens: what Megatron's options need, and what is counted over all of them."""

from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.any_length import refuse_length
from mindspeed_cp.patches.expert_losses import expert_loss_patches
from mindspeed_cp.patches.packing import CAUSAL_WINDOW, Packing, layout_of_length
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry
from mindspeed_cp.sharding import shard
from unit_tests.patches.test_any_length import arguments

FOUR = ContextParallelConfig(context_parallel_size=4)
EXPERTS = dict(num_experts=4, expert_model_parallel_size=2, moe_token_dispatcher_type="alltoall")
UNSHARED = dict(num_experts=4, expert_model_parallel_size=1, moe_token_dispatcher_type="allgather")


@pytest.mark.parametrize(
    "options",
    [
        dict(sft=True),
        dict(dataloader_inter_document_masking=True, mtp_num_layers=1),
        EXPERTS,
        UNSHARED,
        dict(**{**EXPERTS, "moe_token_dispatcher_type": "allgather"}, seq_length=60),
        dict(**UNSHARED, calculate_per_token_loss=True, moe_z_loss_coeff=0.0),
    ],
)
def test_options_beside_unequal_shards_are_taken(options):
    refuse_length(arguments(**options), FOUR)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        (
            {**EXPERTS, "moe_token_dispatcher_type": "allgather"},
            "--moe-token-dispatcher-type allgather with experts on several ranks needs: Megatron gathers as many "
            "tokens of each rank; use 60, 64 or --moe-token-dispatcher-type alltoall.",
        ),
        (
            {**UNSHARED, "expert_tensor_parallel_size": 2},
            "--moe-token-dispatcher-type allgather with experts on several ranks needs: Megatron gathers as many "
            "tokens of each rank; use 60, 64 or --moe-token-dispatcher-type alltoall.",
        ),
        (
            {**EXPERTS, "moe_pad_expert_input_to_capacity": True},
            "--moe-pad-expert-input-to-capacity with experts on several ranks needs: Megatron takes the capacity of "
            "an expert to be that of this rank on all; use 60, 64 or no --moe-pad-expert-input-to-capacity.",
        ),
        (
            {**UNSHARED, "moe_router_load_balancing_type": ["quantile_balancing"]},
            "--moe-router-load-balancing-type quantile_balancing needs: Megatron gathers as many scores of each rank; "
            "use 60, 64 or another --moe-router-load-balancing-type.",
        ),
        (
            {**UNSHARED, "moe_z_loss_coeff": 0.1, "calculate_per_token_loss": True},
            "--moe-z-loss-coeff with --calculate-per-token-loss needs: Megatron weighs that loss by the tokens of each "
            "rank; use 60, 64 or no --calculate-per-token-loss.",
        ),
        (
            {"mtp_num_layers": 1, "calculate_per_token_loss": True},
            "--mtp-num-layers with --calculate-per-token-loss needs: Megatron weighs that loss by the tokens of each "
            "rank; use 60, 64 or no --calculate-per-token-loss.",
        ),
    ],
)
def test_options_that_need_equal_shards_are_refused_with_the_reason(options, needs):
    with pytest.raises(ConfigurationError) as refusal:
        refuse_length(arguments(**options), FOUR)
    assert str(refusal.value) == f"--seq-length 61 is not a multiple of --context-parallel-size 4, which {needs}"


def test_a_stream_has_a_plan_on_each_rank_and_other_tokens_are_refused():
    ends = torch.tensor([0, 5, 13], dtype=torch.int32)
    packed = Namespace(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = None
    packing = Packing()
    plans = {packing.plan(packed, tokens, rank, 4, CAUSAL_WINDOW) for rank, tokens in enumerate((4, 3, 3, 3))}
    assert len(plans) == 1 and packing.is_unequal and not Packing().is_unequal
    with pytest.raises(ValueError) as refusal:
        Packing().plan(packed, 4, 3, 4, CAUSAL_WINDOW)
    assert str(refusal.value) == (
        "cu_seqlens ends at 13, which gives rank 3 of 4 3 tokens, and 4 came; let the last document, or what pads it, "
        "end where the stream does, and cut the batch by megatron_adaptor.shard_batch."
    )
    with pytest.raises(ValueError, match="cu_seqlens ends at 13, and the stream has 12 tokens; let the last document"):
        Packing().cut({"tokens": torch.zeros(1, 12)}, ends, rank=0, num_ranks=4)


class OfThree(Plugin):
    """The plugin of a rank of three."""

    place = (0, 3)


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_losses_of_experts_are_those_of_one_rank(adaptor, monkeypatch):
    from megatron.core.transformer.moe import moe_utils, router

    whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    chosen = torch.zeros(7, 4, dtype=torch.bool).scatter_(1, whole.topk(2).indices, True)
    shards = [shard(whole, layout_of_length(7, 3), rank, 0) for rank in range(3)]

    def summed(tensor, group):
        return tensor.fill_(7.0) if tensor.dim() == 0 else chosen.sum(dim=0)

    monkeypatch.setattr(torch.distributed, "all_reduce", summed)
    monkeypatch.setattr(moe_utils, "reduce_from_tensor_model_parallel_region", summed)
    one, three = (Namespace(size=lambda size=size: size) for size in (1, 3))
    _, _, alone = router.get_tokens_per_expert_and_token_count(chosen, one, topk=2)
    with PatchRegistry(expert_loss_patches(OfThree(length=7, groups=Namespace(context_parallel=None)))).applied():
        for each in shards:
            mine = torch.zeros_like(each, dtype=torch.bool).scatter_(1, each.topk(2).indices, True)
            per_expert, of_rank, total = router.get_tokens_per_expert_and_token_count(mine, three, topk=2)
            assert torch.equal(per_expert, chosen.sum(dim=0)) and total == alone == 7
            assert of_rank * 3 == total
        losses = [router.z_loss_func(each, 0.5 / 3) for each in shards]
    torch.testing.assert_close(sum(losses), router.z_loss_func(whole, 0.5))


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize(("seq_length", "unequal"), [(61, 61), (60, 60), (64, None), (None, None)])
def test_configure_takes_a_length(adaptor, monkeypatch, seq_length, unequal):
    monkeypatch.setattr("mindspeed_cp.patches.rules.accelerator", lambda: "cuda")
    for name in ("config", "length"):
        monkeypatch.setattr(adaptor.plugin, name, None)
    adaptor.configure(context_parallel_size=4, seq_length=seq_length)
    assert adaptor.plugin.length == unequal
    with pytest.raises(ConfigurationError, match="--seq-length 3 is below --context-parallel-size 4; use 4 or more"):
        adaptor.configure(context_parallel_size=4, seq_length=3)
