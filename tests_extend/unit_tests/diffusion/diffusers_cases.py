"""Small transformers of diffusers with random weights, and a step of denoising for each, as its pipeline does it."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from mindspeed_cp.diffusion import MeshShape, ParallelMesh, on_virtual_ranks, parallelize
from mindspeed_cp.diffusion.families import plan_for

HEADS, HEAD_SIZE, TEXT, LAYERS = 8, 8, 7, 2
WIDTH = HEADS * HEAD_SIZE


class Family(NamedTuple):
    """make: the transformer. latents: their shape. step: the guided prediction from model, latents and time."""

    make: Callable[[], nn.Module]
    latents: tuple[int, ...]
    step: Callable[[nn.Module, Tensor, Tensor], Tensor]


def _text(width: int = 24) -> Tensor:
    """Negative prompt, then positive."""
    return torch.randn(2, TEXT, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=LAYERS, attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS, joint_attention_dim=24, caption_projection_dim=WIDTH, pooled_projection_dim=16,
        out_channels=4, pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_step(model: nn.Module, latents: Tensor, time: Tensor) -> Tensor:
    text = _text().to(latents)
    both = model(
        hidden_states=torch.cat([latents] * 2), timestep=time.expand(2), encoder_hidden_states=text,
        pooled_projections=text[:, 0, :16], return_dict=False,
    )[0]  # fmt: skip
    negative, positive = both.chunk(2)
    return negative + 4.0 * (positive - negative)


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def _flux_step(model: nn.Module, latents: Tensor, time: Tensor) -> Tensor:
    text = _text().to(latents)
    image_ids = torch.stack([torch.zeros(latents.size(1)), *divmod_ids(latents.size(1), 23)], dim=1)

    def branch(number: int) -> Tensor:
        return model(
            hidden_states=latents, timestep=time.expand(1) / 1000, encoder_hidden_states=text[number, None],
            pooled_projections=text[number, None, 0, :16], img_ids=image_ids, txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )[0]  # fmt: skip

    positive = branch(1)
    negative = branch(0)
    return negative + 4.0 * (positive - negative)


def divmod_ids(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of patches."""
    places = torch.arange(tokens)
    return (places // width).float(), (places % width).float()


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=24, freq_dim=32, ffn_dim=64, num_layers=1,
    )  # fmt: skip


def _wan_step(model: nn.Module, latents: Tensor, time: Tensor) -> Tensor:
    text = _text().to(latents)

    def branch(number: int) -> Tensor:
        return model(
            hidden_states=latents, timestep=time.expand(1), encoder_hidden_states=text[number, None], return_dict=False
        )[0]

    positive = branch(1)
    negative = branch(0)
    return negative + 4.0 * (positive - negative)


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE, in_channels=4, out_channels=4, num_layers=LAYERS,
        cross_attention_dim=WIDTH, sample_size=32, patch_size=2, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip


def _pixart_step(model: nn.Module, latents: Tensor, time: Tensor) -> Tensor:
    text = _text().to(latents)
    mask = torch.ones(2, TEXT, dtype=latents.dtype)
    mask[0, 4:] = 0
    both = model(
        torch.cat([latents] * 2), encoder_hidden_states=text, timestep=time.expand(2), encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0]  # fmt: skip
    negative, positive = both.chunk(2)
    return negative + 4.0 * (positive - negative)


FAMILIES = {
    "SD3": Family(_sd3, (1, 4, 10, 14), _sd3_step),
    "Flux": Family(_flux, (1, 35, 4), _flux_step),
    "Wan": Family(_wan, (1, 4, 3, 6, 8), _wan_step),
    "PixArt": Family(_pixart, (1, 4, 10, 14), _pixart_step),
}


def made(name: str, dtype: torch.dtype) -> nn.Module:
    """The transformer of a family, the same weights each time."""
    torch.manual_seed(0)
    model = FAMILIES[name].make()
    for parameter in model.parameters():
        # Some are zero at first, and would hide what comes before them.
        if not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


@torch.no_grad()
def denoised(name: str, model: Any, dtype: torch.dtype, steps: int = 4) -> Tensor:
    """Latents after some Euler steps from noise that is the same each time."""
    family = FAMILIES[name]
    latents = torch.randn(family.latents, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for step in range(steps):
        time = torch.tensor(1000.0 * (1 - step / steps), dtype=dtype)
        latents = latents - family.step(model, latents, time) / steps
    return latents


def differences(name: str, meshes: Iterable[MeshShape], dtype: torch.dtype) -> Iterator[tuple[MeshShape, float]]:
    """The largest difference from one rank of all ranks' latents, on each mesh.

    What models cast to fp32 stays fp64 where it is: an island of fp32 makes 1e-16 a step of 1e-7.
    """
    whole = made(name, dtype)
    with mock.patch.object(torch.Tensor, "float", _float_at_least):
        expected = denoised(name, whole, dtype)
        for shape in meshes:
            found = on_virtual_ranks(functools.partial(_denoised_on, name, whole, dtype), shape)
            yield shape, max((each - expected).abs().max().item() for each in found)


def _float_at_least(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _denoised_on(name: str, whole: nn.Module, dtype: torch.dtype, mesh: ParallelMesh) -> Tensor:
    model = copy.deepcopy(whole)
    parallelize(model, mesh, plan_for(model))
    return denoised(name, model, dtype)
