"""Flags of Megatron's that stop a job, hang it or compute something else only where they stand beside each other."""

import shlex
from importlib.util import find_spec

import pytest

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.patches import rules
from mindspeed_cp.patches.rules import notes_on_arguments
from unit_tests.argument_cases import config_from_arguments

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

MODEL = "--num-attention-heads 8 --seq-length 64 --attention-dropout 0 --hidden-dropout 0 --distributed-backend gloo"
CP2 = "--context-parallel-size 2"
WINDOW = "--window-size 7,0"
MLP = "--recompute-granularity selective --recompute-modules core_attn mlp"
CLIP = "--bf16 --qk-clip"
LATENT = "--multi-latent-attention"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A CPU, and the environment that Megatron wants."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(rules, "accelerator", lambda: None)


@pytest.mark.parametrize(
    ("stops", "message", "go_on"),
    [
        (f"{WINDOW} --attention-mask-type general", "says who sees whom too", ["--reset-attention-mask", "--sft"]),
        (f"{WINDOW} --attention-mask-type general", "says who sees whom too", ["--attention-mask-type causal"]),
        (MLP, "runs the checkpoint again without end", ["--disable-bias-linear", "--num-experts 4"]),
        ("--recompute-activations --recompute-modules mlp", "again without end", ["--recompute-modules core_attn"]),
        (f"{CLIP} --use-distributed-optimizer", "a flat part of it", []),
        (f"{CLIP} --tensor-model-parallel-size 2", "part of the weights for the whole matrix", [LATENT]),
    ],
)
@pytest.mark.parametrize("size", [CP2, "--attention-on-one-rank"])
def test_what_would_stop_at_the_first_batch_is_refused_when_it_is_parsed(parser, stops, message, go_on, size):
    flags = shlex.split(f"{MODEL} {size} {stops}")
    with pytest.raises(ConfigurationError, match=message):
        config_from_arguments(parser.parse_args(flags))
    for each in go_on:
        config_from_arguments(parser.parse_args([*flags, *shlex.split(each)]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reset-position-ids", "its data set says positions itself"),
        ("--reset-attention-mask --no-create-attention-mask-in-dataloader", "its data set says where documents end"),
    ],
)
@pytest.mark.parametrize("ranks", [CP2, "--hybrid-context-parallel --max-seqlen-per-dp-cp-rank 64"])
def test_what_the_data_set_of_conversations_asserts_is_refused_when_it_is_parsed(parser, flags, message, ranks):
    per_token = "--calculate-per-token-loss"
    flags = shlex.split(f"{MODEL} --sft {ranks} {per_token} {flags}")
    with pytest.raises(ConfigurationError) as refusal:
        config_from_arguments(parser.parse_args(flags))
    assert [message in sentence for sentence in refusal.value.sentences].count(True) == 1
    assert not any("documents would see each other" in sentence for sentence in refusal.value.sentences)


def test_clipped_scores_of_megatrons_own_attention_want_whole_weights_too(parser):
    flags = shlex.split(f"{MODEL} --use-distributed-optimizer --transformer-impl local --bf16")
    config_from_arguments(parser.parse_args([*flags, "--log-max-attention-logit"]))
    with pytest.raises(ConfigurationError, match="at CP = 1 too; leave out one of the two"):
        config_from_arguments(parser.parse_args([*flags, "--qk-clip"]))


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        (f"{WINDOW} --reset-attention-mask", 1),
        (f"{WINDOW} --reset-attention-mask --attention-on-one-rank", 0),
        (f"{WINDOW} --reset-attention-mask {CP2}", 0),
        ("--reset-attention-mask", 0),
        (WINDOW, 0),
    ],
)
def test_a_window_across_documents_in_megatrons_own_attention_is_said(parser, flags, number):
    args = parser.parse_args(shlex.split(f"{MODEL} --transformer-impl local {flags}"))
    notes = notes_on_arguments(args, config_from_arguments(args), {})
    assert sum("so that they see each other" in note for note in notes) == number


@pytest.mark.parametrize(
    ("changed", "number"),
    [("", 1), ("--micro-batch-size 1", 0), ("--context-parallel-size 1", 0)],
)
def test_experts_that_are_balanced_in_a_stream_of_several_samples_are_said(parser, changed, number):
    experts = "--num-experts 4 --moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1 0.1"
    flags = shlex.split(f"{MODEL} --sft --micro-batch-size 2 {CP2} {experts} {changed}")
    args = parser.parse_args(flags)
    notes = notes_on_arguments(args, config_from_arguments(args), {})
    assert sum("experts are balanced in all of it" in note for note in notes) == number


def test_one_rank_of_ours_takes_an_odd_length(parser):
    flags = f"{MODEL} --seq-length 67 --attention-on-one-rank"
    assert config_from_arguments(parser.parse_args(shlex.split(flags))).computes_on_one_rank
