"""Small pipelines of diffusers with random weights, given prompts that are encoded already."""

from typing import Any

import torch
from torch import Tensor

from unit_tests.diffusion.diffusers_cases import made

PIPELINES = ("SD3", "Flux", "Wan", "PixArt")


def _text() -> Tensor:
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5))


def _decoder(latent_channels: int, blocks: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8, 16, 16, 16)[:blocks], latent_channels=latent_channels, norm_num_groups=4,
        sample_size=8 * 2 ** (blocks - 1), shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def pipeline(name: str, *, tiled: bool = False) -> Any:
    """A pipeline, the same weights each time."""
    import diffusers

    transformer = made(name, torch.float32)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "SD3":
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        made_of: dict[str, Any] = dict.fromkeys(names) | {"scheduler": euler, "vae": _decoder(4, 2)}
        kind = diffusers.StableDiffusion3Pipeline
    elif name == "Flux":
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        made_of = dict.fromkeys(names) | {"scheduler": euler, "vae": _decoder(1, 2)}
        kind = diffusers.FluxPipeline
    elif name == "Wan":
        vae = diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        vae.tile_sample_min_height = vae.tile_sample_min_width = 32
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
        made_of = {"text_encoder": None, "tokenizer": None, "scheduler": euler, "vae": vae}
        kind = diffusers.WanPipeline
    else:
        made_of = {"text_encoder": None, "tokenizer": None, "vae": _decoder(4, 4)}
        made_of["scheduler"] = diffusers.DPMSolverMultistepScheduler()
        kind = diffusers.PixArtAlphaPipeline
    made_of["vae"].eval()
    if tiled:
        made_of["vae"].enable_tiling()
    result = kind(transformer=transformer, **made_of)
    result.set_progress_bar_config(disable=True)
    return result


def picture(name: str, pipe: Any, *, seed: int = 3, guidance: float = 4.0, **options: Any) -> Tensor:
    """What it paints."""
    text = _text()
    negative, positive = text[:1], text[1:]
    embeds: dict[str, Any] = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    pooled = {"pooled_prompt_embeds": positive[:, 0, :16], "negative_pooled_prompt_embeds": negative[:, 0, :16]}
    scale = {"guidance_scale": guidance}
    size = {"height": 40, "width": 56}
    if name == "SD3":
        embeds |= pooled
    elif name == "Flux":
        embeds |= pooled
        scale = {"true_cfg_scale": guidance, "guidance_scale": 1.0}
    elif name == "Wan":
        scale["num_frames"] = 5
        size = {"height": 48, "width": 64}
        embeds = {key: torch.cat([each, each[:, :1]], dim=1) for key, each in embeds.items()}
    else:
        mask = torch.ones(1, 7)
        embeds |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
        size = {"height": 80, "width": 112, "use_resolution_binning": False}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(
        **embeds, **scale, **size, num_inference_steps=4, generator=generator, output_type="pt", **options
    )  # fmt: skip
    return output.frames if name == "Wan" else output.images
