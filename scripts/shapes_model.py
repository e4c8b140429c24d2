"""Small diffusion models of coloured shapes, trained here in minutes: pictures (SD3's kind) and clips (Wan's kind).

They are transformers and pipelines of diffusers as they are, on pixels in the place of latents. What a prompt says is
its words: a colour and a shape, each a fixed vector. Trained as rectified flows (arXiv:2209.03003), with the prompt
left out at times, so that guidance has something to guide away from.
"""

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

Kind = Literal["picture", "clip"]

COLOURS = {"red": (0.9, 0.15, 0.1), "green": (0.1, 0.75, 0.2), "blue": (0.15, 0.3, 0.95), "yellow": (0.95, 0.8, 0.1)}
SHAPES = ("circle", "square", "triangle")
SIZES: dict[Kind, int] = {"picture": 24, "clip": 32}
"""Height and width; Wan's pipeline takes multiples of 16."""

FRAMES, WORDS, WORD_WIDTH = 4, 2, 32
HEADS, HEAD_SIZE, LAYERS = 8, 12, 3


class PixelSpace(nn.Module):
    """Stands where a pipeline has its autoencoder: latents are pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            block_out_channels=(1,), scaling_factor=1.0, shift_factor=0.0, latent_channels=3, z_dim=3,
            latents_mean=[0.0] * 3, latents_std=[1.0] * 3, scale_factor_temporal=1, scale_factor_spatial=1,
        )  # fmt: skip
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The pixels."""
        return (z,)


class Words(NamedTuple):
    """Tokens [B, 2, W] of prompts, and their sum [B, W]."""

    tokens: Tensor
    pooled: Tensor


def encode(prompts: list[str]) -> Words:
    """Of prompts such as "red circle"; words beyond the second are left out, and an empty prompt is zeros."""
    rows = []
    for prompt in prompts:
        vectors = [_vector(word) for word in prompt.lower().replace("a ", "").split()[:WORDS]]
        rows.append(torch.stack(vectors + [torch.zeros(WORD_WIDTH)] * (WORDS - len(vectors))))
    tokens = torch.stack(rows)
    return Words(tokens, tokens.sum(1))


def _vector(word: str) -> Tensor:
    known = (*COLOURS, *SHAPES)
    if word not in known:
        raise ValueError(f"the model knows no word {word!r}; use a colour and a shape of {', '.join(known)}.")
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big")
    return torch.randn(WORD_WIDTH, generator=torch.Generator().manual_seed(seed))


def drawn(prompts: list[str], kind: Kind, generator: torch.Generator) -> Tensor:
    """What prompts say, in several sizes: [B, 3, frames, H, W], from -1 to 1; in clips it moves to the right."""
    count, size, frames = len(prompts), SIZES[kind], FRAMES if kind == "clip" else 1
    middle = (size - 1) / 2
    radius = (6 + 2 * torch.rand(count, generator=generator)) * size / 24
    x_first, y = middle + 3 * (torch.rand(2, count, generator=generator) - 0.5)
    pictures = []
    for frame in range(frames):
        x = x_first + 2.0 * (frame - (frames - 1) / 2)
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        dy, dx = rows - y[:, None, None], columns - x[:, None, None]
        r = radius[:, None, None]
        distances = {
            "circle": (dx.square() + dy.square()).sqrt() - r,
            "square": torch.maximum(dx.abs(), dy.abs()) - 0.85 * r,
            "triangle": torch.maximum(0.9 * dx.abs() + 0.45 * dy, -dy) - 0.5 * r,
        }
        shapes = [prompt.split()[1] for prompt in prompts]
        inside = torch.stack([distances[shape][number] for number, shape in enumerate(shapes)])
        cover = (0.5 - inside).clamp(0, 1)[:, None]
        colour = torch.tensor([COLOURS[prompt.split()[0]] for prompt in prompts])[:, :, None, None]
        pictures.append(2 * (cover * colour + (1 - cover) * 0.08) - 1)
    return torch.stack(pictures, dim=2)


def transformer(kind: Kind) -> nn.Module:
    """An untrained one."""
    width = HEADS * HEAD_SIZE
    if kind == "picture":
        return diffusers.SD3Transformer2DModel(
            sample_size=SIZES[kind], patch_size=4, in_channels=3, out_channels=3, num_layers=LAYERS,
            attention_head_dim=HEAD_SIZE, num_attention_heads=HEADS, joint_attention_dim=WORD_WIDTH,
            caption_projection_dim=width, pooled_projection_dim=WORD_WIDTH, pos_embed_max_size=SIZES[kind],
        )  # fmt: skip
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 4, 4), num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE, in_channels=3, out_channels=3,
        text_dim=WORD_WIDTH, freq_dim=64, ffn_dim=3 * width, num_layers=LAYERS,
    )  # fmt: skip


def pipeline(kind: Kind, model: nn.Module) -> Any:
    """The pipeline of diffusers that a model is made for."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if kind == "picture":
        absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        return diffusers.StableDiffusion3Pipeline(
            transformer=model, scheduler=scheduler, vae=PixelSpace(), **dict.fromkeys(absent)
        )
    return diffusers.WanPipeline(
        transformer=model, scheduler=scheduler, vae=PixelSpace(), text_encoder=None, tokenizer=None
    )


def paint(kind: Kind, pipe: Any, prompt: str, *, guidance: float, steps: int, seed: int) -> Tensor:
    """Frames [F, 3, H, W], from 0 to 1; a picture is one."""
    words, nothing = encode([prompt]), encode([""])
    given = {"prompt_embeds": words.tokens, "negative_prompt_embeds": nothing.tokens, "guidance_scale": guidance}
    if kind == "picture":
        given |= {"pooled_prompt_embeds": words.pooled, "negative_pooled_prompt_embeds": nothing.pooled}
    else:
        given |= {"num_frames": FRAMES}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(
        **given, height=SIZES[kind], width=SIZES[kind], num_inference_steps=steps, generator=generator, output_type="pt"
    )
    return output.images if kind == "picture" else output.frames[0]


def train(kind: Kind, path: Path, steps: int, report: Callable[[str], None]) -> nn.Module:
    """The trained model: that of the file, or a new one, which is written there."""
    torch.manual_seed(0)
    model = transformer(kind)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    prompts = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    began, average = time.monotonic(), math.nan
    for step in range(steps):
        batch = [prompts[number] for number in torch.randint(len(prompts), (24,), generator=generator)]
        pixels = drawn(batch, kind, generator)
        told = ["" if torch.rand((), generator=generator) < 0.15 else prompt for prompt in batch]
        # As a rank's pipeline calls it.
        loss = _loss(kind, model, pixels if kind == "clip" else pixels[:, :, 0], encode(told), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if step % 50 == 49:
            report(f"step {step + 1} of {steps}: loss {average:.3f}, {time.monotonic() - began:.0f} s")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def _loss(kind: Kind, model: nn.Module, pixels: Tensor, words: Words, generator: torch.Generator) -> Tensor:
    noise = torch.randn(pixels.shape, generator=generator)
    sigma = torch.randn(pixels.size(0), generator=generator).sigmoid()
    weight = sigma.view(-1, *[1] * (pixels.dim() - 1))
    given = {"pooled_projections": words.pooled} if kind == "picture" else {}
    predicted = model(
        hidden_states=(1 - weight) * pixels + weight * noise, timestep=1000 * sigma,
        encoder_hidden_states=words.tokens, return_dict=False, **given,
    )[0]  # fmt: skip
    return (predicted - (noise - pixels)).square().mean()
