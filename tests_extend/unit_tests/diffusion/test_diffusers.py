"""Transformers and pipelines of diffusers, unmodified, paint on a mesh what they paint on one rank."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.diffusion import MeshShape, ParallelMesh, on_virtual_ranks, parallelize
from mindspeed_cp.diffusion.families import FAMILIES, plan_for
from mindspeed_cp.diffusion.pipeline import parallelize_pipeline
from unit_tests.diffusion import diffusers_cases, pipeline_cases

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
    # One worker imports it.
    pytest.mark.xdist_group("diffusers"),
    pytest.mark.filterwarnings("ignore"),
]

NAMES = list(diffusers_cases.FAMILIES)
SAMPLE = [
    MeshShape(cfg=2, ring=2, tp=2),
    MeshShape(cfg=3, ulysses=2),
    MeshShape(ring=2, ulysses=2),
    MeshShape(ulysses=3),
]


@pytest.mark.parametrize("name", NAMES)
def test_meshes_give_the_latents_of_one_rank(name):
    """The whole table is a command of its own: python tests_extend/diffusion_meshes.py."""
    for shape, difference in diffusers_cases.differences(name, SAMPLE, torch.float64):
        assert difference < 1e-10, f"{shape}: {difference}"


def painted(name, shape, **options):
    """The pictures of a pipeline on each rank, and the pipeline of one of them."""
    pipelines = [pipeline_cases.pipeline(name, tiled=options.get("tiled", False)) for _ in range(shape.size)]

    def paint(mesh):
        parallelize_pipeline(pipelines[mesh.rank], mesh)
        given = {key: value for key, value in options.items() if key != "tiled"}
        return pipeline_cases.picture(name, pipelines[mesh.rank], **given), mesh

    return on_virtual_ranks(paint, shape)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "in tiles"])
@pytest.mark.parametrize("name", pipeline_cases.PIPELINES)
def test_pipeline_paints_the_picture_of_one_rank(name, tiled):
    expected = pipeline_cases.picture(name, pipeline_cases.pipeline(name, tiled=tiled))
    for found, mesh in painted(name, MeshShape(cfg=2, ring=2), tiled=tiled):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        # A step's message: the prediction, to one other rank; the decoder's tiles come once beside them.
        assert mesh.traffic["cfg"].calls["exchange"] == 4 + tiled


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "in tiles"])
def test_decoder_gives_the_picture_of_one_rank_to_the_bit(tiled):
    latents = torch.randn(1, 4, 20, 28, generator=torch.Generator().manual_seed(0))
    decoders = [pipeline_cases.pipeline("SD3", tiled=tiled).vae for _ in range(6)]
    with torch.no_grad():
        expected = decoders[0].decode(latents).sample
    counts = [0] * 6

    def decode(mesh):
        from mindspeed_cp.diffusion.tiles import share_tiles

        vae = decoders[mesh.rank]
        inner = vae.decoder.forward

        def counted(*args):
            counts[mesh.rank] += 1
            return inner(*args)

        vae.decoder.forward = counted
        share_tiles(vae, mesh)
        with torch.no_grad():
            return vae.decode(latents, return_dict=False)[0]

    for found in on_virtual_ranks(decode, MeshShape(cfg=2, ring=3)):
        assert torch.equal(found, expected)
    # 4 x 5 tiles of 8 latents, one every 6; without tiling each rank decodes the whole.
    assert counts == ([4, 4, 3, 3, 3, 3] if tiled else [1] * 6)


def test_callbacks_and_progress_are_the_pipelines_own():
    seen = []

    def callback(pipe, step, time, tensors):
        seen.append((step, tensors["latents"].clone()))
        return {}

    painted("Flux", MeshShape(cfg=2), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert sorted(step for step, _ in seen) == [0, 0, 1, 1, 2, 2, 3, 3]
    for step in range(4):
        first, second = (latents for at, latents in seen if at == step)
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["SD3", "Wan"])
def test_guidance_of_one_with_several_ranks_along_cfg_is_refused(name):
    with pytest.raises(ValueError, match="a step has 1 branch and cfg=2: guidance is off"):
        painted(name, MeshShape(cfg=2), guidance=1.0)


def test_noise_that_differs_between_ranks_is_refused():
    pipelines = [pipeline_cases.pipeline("SD3") for _ in range(2)]

    def paint(mesh):
        parallelize_pipeline(pipelines[mesh.rank], mesh)
        pipeline_cases.picture("SD3", pipelines[mesh.rank], seed=mesh.rank)

    with pytest.raises(
        ValueError, match=r"hidden_states of SD3Transformer2DModel differs between ranks \[0\] and ranks"
    ):
        on_virtual_ranks(paint, MeshShape(ring=2))


def test_model_that_declares_its_splits_needs_no_plan():
    """QwenImage is not listed here: what diffusers' own context parallelism is told is read off it."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    made = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    ).double().eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 15, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 6, 12, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def predict(model):
        return model(
            hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=None,
            timestep=torch.ones(1, dtype=torch.float64), img_shapes=[[(1, 3, 5)]], return_dict=False,
        )[0]  # fmt: skip

    expected = predict(made)

    def on_mesh(mesh):
        copied = copy.deepcopy(made)
        parallelize(copied, mesh, plan_for(copied))
        return predict(copied)

    for found in on_virtual_ranks(on_mesh, MeshShape(ring=2, ulysses=2)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("pipeline", "sentence"),
    [
        (
            SimpleNamespace(unet=torch.nn.Identity()),
            "SimpleNamespace has no transformer, and a U-Net's convolutions need",
        ),
        (SimpleNamespace(transformer=torch.nn.Identity()), "Identity is not one of SD3Transformer2DModel, Flux"),
    ],
)
def test_pipeline_that_cannot_be_shared_is_refused(pipeline, sentence):
    with pytest.raises(ValueError, match=sentence):
        parallelize_pipeline(pipeline, ParallelMesh())


def test_families_are_classes_of_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILIES)


@pytest.mark.slow
def test_script_paints_on_two_ranks_what_it_paints_on_one(tmp_path):
    """As a user starts it; two steps of training make no picture, but the same one on each mesh."""
    script = Path(__file__).resolve().parents[3] / "scripts" / "generate_image.py"
    options = ["--cfg", "2", "--kind", "clip", "--compare", "--steps", "2", "--train-steps", "2"]
    files = ["--models", tmp_path / "models", "--output", tmp_path / "clip.png"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, *options, *files],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"cfg=2: .*clip.png; rank 0 has sent cfg \d+ KiB", ended.stdout)
    assert re.search(r"largest difference from one rank: \d\.\de[-+]\d+ of 1", ended.stdout)
    assert (tmp_path / "clip.png").stat().st_size > 1000
