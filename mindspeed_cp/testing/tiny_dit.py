"""A small diffusion transformer in plain torch, as a user might have written it.

Shapes: B batch, S tokens of the picture, T tokens of the prompt, C channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention; over the prompt's tokens too where it is given `context`, whose output it then gives as well."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, S, W], and [B, T, W] or None, as they came."""
        tokens = x if context is None else torch.cat([context, x], dim=1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if context is None:
            return out, None
        return out[:, context.size(1) :], out[:, : context.size(1)]


class CrossAttention(nn.Module):
    """Attention to the prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """[B, S, W] from the picture's tokens and the prompt's [B, T, W]."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """joint: whether picture and prompt attend together; else the picture attends to the prompt."""

    def __init__(self, width: int, heads: int, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        self.attn = Attention(width, heads)
        if not joint:
            self.cross = CrossAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Picture's and prompt's tokens."""
        shift, scale, gate, gate_mlp = self.modulation(F.silu(condition))[:, None].chunk(4, dim=-1)
        normed = _norm(x) * (1 + scale) + shift
        if self.joint:
            out, out_text = self.attn(normed, _norm(text))
            assert out_text is not None
            text = text + out_text
        else:
            out, _ = self.attn(normed)
        x = x + gate * out
        if not self.joint:
            x = x + self.cross(_norm(x), text)
        return x + gate_mlp * self.fc2(F.gelu(self.fc1(_norm(x)))), text


class TinyDiT(nn.Module):
    """Predicts noise. joint: see Block."""

    def __init__(
        self, *, width: int = 64, heads: int = 8, layers: int = 2, channels: int = 4, joint: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.embed_text = nn.Linear(channels, width), nn.Linear(width, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, joint) for _ in range(layers))
        self.final = nn.Linear(width, channels)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Noise [B, S, C] in tokens [B, S, C] at time [B], 0 to 1, given the prompt [B, T, W]."""
        width = self.embed.out_features
        positions = _waves(torch.arange(x.size(1), device=x.device).to(x.dtype), width)
        x = self.embed(x) + positions
        condition, text = self.time(_waves(1000 * time, width)), self.embed_text(text)
        for block in self.blocks:
            x, text = block(x, text, condition)
        out: Tensor = self.final(_norm(x))
        return out


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _waves(x: Tensor, width: int) -> Tensor:
    """[..., width] of sines and cosines."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=x.dtype) / width)
    angles = x[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
