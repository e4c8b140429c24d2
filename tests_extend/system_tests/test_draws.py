"""Layers of Megatron's draw their dropout apart from each other."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.every_release]

PREDICTS_TWICE = """
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_cp import megatron_adaptor

dist.init_process_group("gloo")
megatron_adaptor.configure(distributed_backend="gloo", attention_on_one_rank=True)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
config = TransformerConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, mtp_num_layers=1, hidden_dropout=0.0,
    masked_softmax_fusion=False, apply_rope_fusion=False,
)
layer = get_gpt_layer_local_spec()
model = GPTModel(config, layer, 64, 8, mtp_block_spec=get_gpt_mtp_block_spec(config, layer, False))
tokens = torch.arange(8)[None]
model(tokens, tokens, None, labels=tokens, loss_mask=torch.ones(1, 8))
print(*sorted(name for name in get_cuda_rng_tracker().states_ if "draws" in name), sep="\\n")
"""


def test_a_layer_of_multi_token_prediction_draws_by_a_number_that_no_decoder_layer_has(training):
    drawn = training.run_program(1, PREDICTS_TWICE)[0].splitlines()
    assert drawn == [f"mindspeed_cp: draws of attention dropout in layer {number}" for number in (1, 2, 3)]
