"""Pretrain a GPT on megatron.training of megatron-core 0.17 and later, for those without a Megatron-LM checkout.

Takes Megatron's flags and those of mindspeed_cp, and trains on --data-path (.bin/.idx; with --sft, conversations) or
--mock-data:

    torchrun --nproc-per-node 4 scripts/pretrain_gpt.py --context-parallel-size 4 --mock-data ...
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split
from packaging.version import Version
from torch import Tensor
from torch.distributed import ProcessGroup

from mindspeed_cp import megatron_adaptor


class Batch(NamedTuple):
    """This rank's tokens of a micro-batch: [B, S], and [B, 1, S, T] for the mask, with T the tokens of all ranks.

    packed_seq_params: where documents end, of samples that are one stream: [1, S].
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    packed_seq_params: PackedSeqParams | None


def load_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> Batch:
    """The next micro-batch: read by one rank of each tensor-parallel group, sharded over the context-parallel ranks."""
    data = None if data_iterator is None else {name: x.cuda() for name, x in next(data_iterator).items()}
    batch = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    batch |= tensor_parallel.broadcast_data(["loss_mask"], data, torch.float32)
    if get_args().create_attention_mask_in_dataloader:
        batch |= tensor_parallel.broadcast_data(["attention_mask"], data, torch.bool)

    packed = None
    if is_packed():
        batch |= tensor_parallel.broadcast_data(["cu_seqlens", "max_seqlen"], data, torch.int32)
        from megatron.core.utils import flatten_batch_for_packed_sequences  # Of those releases that have the flag.

        batch = flatten_batch_for_packed_sequences(batch)
        ends, longest = batch["cu_seqlens"][0], int(batch.pop("max_seqlen"))
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
        if get_args().hybrid_context_parallel:
            sharing = tensor_parallel.broadcast_data(["local_cp_size"], data, torch.int32)
            packed.local_cp_size = int(sharing["local_cp_size"])
            packed.cp_group = ranks_of_document(packed.local_cp_size)
    shards = megatron_adaptor.shard_batch({"attention_mask": None, **batch}, packed and packed.cp_group)
    shards.pop("cu_seqlens", None)
    return Batch(**shards, packed_seq_params=packed)


def ranks_of_document(number: int) -> ProcessGroup | None:
    """Those that share a document; None where it has one."""
    return None if number == 1 else mpu.get_hybrid_data_context_parallel_groups(group_size=number)


def is_packed() -> bool:
    """Whether samples are streams of documents, or of conversations, as Megatron's data sets give them since 0.19."""
    return get_args().sft or masks_between_documents()


def masks_between_documents() -> bool:
    """Whether pretraining data are streams of documents, by a flag that Megatron has since 0.19."""
    return getattr(get_args(), "dataloader_inter_document_masking", False)


def forward_step(data_iterator: Iterator[dict[str, Tensor]] | None, model: GPTModel) -> tuple[Tensor, partial]:
    """The losses of one micro-batch, and the function that sums them up."""
    if not (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()):
        return model(None, None, None), partial(sum_losses, None)
    batch = load_batch(data_iterator)
    losses = model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.packed_seq_params,
    )
    return losses, partial(sum_losses, batch.loss_mask)


def sum_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of this rank's losses, the number of its tokens, and both for the log; Megatron divides over all ranks."""
    loss = (losses.flatten().float() * loss_mask.flatten()).sum()
    num_tokens = loss_mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[MegatronDataset | None, ...]:
    """Training, validation and test data of these numbers of samples."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        # Of those releases that have the flag.
        **({"inter_document_masking": True} if masks_between_documents() else {}),
    )
    return BlendedMegatronDatasetBuilder(dataset_class(), num_samples, reads_data, config).build()


def dataset_class() -> type[MegatronDataset]:
    """What --sft, --mock-data or --data-path alone asks for."""
    if get_args().sft:
        return SFTDataset
    return MockGPTDataset if get_args().mock_data else GPTDataset


def reads_data() -> bool:
    """Whether this rank reads the data set; the others are sent their batches or need none."""
    has_stage = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
    return has_stage and mpu.get_tensor_model_parallel_rank() == 0


def build_model(
    pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **groups: object
) -> GPTModel:
    """The model that the flags describe, or a pipeline stage of it; Megatron 0.19 builds it itself.

    groups: the process groups, and a configuration that is None in pretraining.
    """
    args = get_args()
    for option in ("spec", "yaml_cfg", "heterogeneous_layers_config_path", "experimental_attention_variant", "sft"):
        if getattr(args, option, None) not in (None, False):
            raise SystemExit(
                f"error: --{option.replace('_', '-')} needs megatron-core 0.19 here, and this is {megatron_version}; "
                f"use the pretrain_gpt.py of a Megatron-LM checkout."
            )
    config = core_transformer_config_from_args(args)
    kind = {
        "use_transformer_engine": args.transformer_impl == "transformer_engine",
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
    }
    further_predictions = None
    if args.mtp_num_layers is not None:
        last_layer = get_gpt_decoder_layer_specs(config, **kind)[-1]
        further_predictions = get_gpt_mtp_block_spec(
            config, last_layer, kind["use_transformer_engine"], vp_stage=vp_stage
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **kind),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=further_predictions,
        vp_stage=vp_stage,
        pg_collection=groups.get("pg_collection"),
    )


def main() -> None:
    """Parse the flags and train, as this release of Megatron has it."""
    build_datasets.is_distributed = True  # built on all ranks; `reads_data` says on which they are kept
    release = Version(megatron_version).release
    if release < (0, 18):
        pretrain(build_datasets, build_model, ModelType.encoder_or_decoder, forward_step)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    if release < (0, 19):
        config = pretrain_cfg_container_from_args(args)
        pretrain(config, build_datasets, build_model, ModelType.encoder_or_decoder, forward_step)
        return
    from megatron.training.argument_utils import gpt_config_from_args

    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, build_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
