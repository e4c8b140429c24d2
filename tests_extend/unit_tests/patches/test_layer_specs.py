"""`--spec` of MindSpeed-LLM: taken where Megatron's layers compute the same, else refused with what is missing."""

import pytest

from mindspeed_cp.patches.mindspeed.record import Disposition
from mindspeed_cp.patches.mindspeed.translate import translate

LATENT = (
    "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor 40 --use-fused-rotary-pos-emb "
    "--rope-scaling-original-max-position-embeddings 4096 --disable-bias-linear"
)
MEGATRONS = {"--spec": None, "--multi-latent-attention": None, "--disable-bias-linear": None, "--add-qkv-bias": None}


def finding(spec, beside=""):
    """What becomes of --spec, beside other flags; and whether it is still on Megatron's command line."""
    argv = ["--spec", f"mindspeed_llm.tasks.models.spec.{spec}", "layer_spec", *beside.split()]
    findings, words = translate(argv, MEGATRONS)
    (found,) = [each for each in findings if each.flag.startswith("--spec")]
    assert "--spec" not in words
    return found


@pytest.mark.parametrize(("spec", "beside"), [("qwen3_spec", ""), ("deepseek_spec", LATENT)])
def test_layers_that_are_megatron_s_own_are_taken(spec, beside):
    assert finding(spec, beside).disposition is Disposition.NOTED


@pytest.mark.parametrize(
    "missing",
    ["--multi-latent-attention", "--rope-scaling-type yarn", "--use-fused-rotary-pos-emb", "--disable-bias-linear"],
)
def test_latent_layers_that_differ_are_refused_with_what_would_make_them_the_same(missing):
    found = finding("deepseek_spec", LATENT.replace(missing, ""))
    assert found.disposition is Disposition.REFUSED
    assert found.sentence == f"Megatron's layers compute the same with {missing} alone; add it"


def test_latent_layers_with_biases_are_refused():
    found = finding("deepseek_spec", f"{LATENT} --add-qkv-bias")
    assert found.disposition is Disposition.REFUSED
    assert found.sentence.endswith("leave out --add-qkv-bias")


@pytest.mark.parametrize("spec", ["qwen3_next_spec", "longcat_spec", "qwen2_moe_spec"])
def test_other_layers_are_refused(spec):
    assert finding(spec, LATENT).disposition is Disposition.REFUSED
