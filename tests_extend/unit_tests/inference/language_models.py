"""Small language models of transformers with random weights, a family for each thing that attention is told."""

from typing import Any

import torch

VOCABULARY, WINDOW = 97, 13
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 8192,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Scaled rotary embeddings, QK norm, windows, softcap, both kinds of layers, sinks and experts."""


def config_of(family, **more):
    """Its configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **SIZES | FAMILIES[family] | more)


def model_of(family, dtype=torch.float64, **more):
    """With weights large enough for texts that vary."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        config_of(family, **more), dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return model


@torch.no_grad()
def own_tokens(model, prompt, num_tokens, sampling, sample=0):
    """What a model writes by its own attention, going through the whole text for each token."""
    text = list(prompt)
    for _ in range(num_tokens):
        logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(sampling.choose(logits, sample, len(text)).token)
    return text[len(prompt) :]
