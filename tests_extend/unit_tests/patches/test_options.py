"""Rules about Megatron's options that depend on its own defaults, and on several options at once."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.unsupported import difference_notes, refuse_unloadable_optimizer
from unit_tests.argument_cases import config_from_arguments

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.usefixtures("ampere_machine"),
]

CP2 = ["--num-attention-heads", "8", "--context-parallel-size", "2"]
QUIET = ["--attention-dropout", "0", "--hidden-dropout", "0"]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (["--seq-length", "252"], "use 248 or 256."),
        (["--encoder-seq-length", "252"], "use 248 or 256."),
        (["--seq-length", "4"], "use 8."),
    ],
)
def test_sequence_parallelism_needs_tokens_for_each_tensor_parallel_rank(parser, lengths, message):
    flags = [*CP2, *QUIET, *lengths, "--tensor-model-parallel-size", "4"]
    with pytest.raises(ConfigurationError) as refusal:
        config_from_arguments(parser.parse_args([*flags, "--sequence-parallel"]))
    assert str(refusal.value) == (
        f"--seq-length {lengths[1]} is not a multiple of --context-parallel-size 2 * --tensor-model-parallel-size 4 = "
        f"8, which --sequence-parallel needs; {message}"
    )
    config_from_arguments(parser.parse_args(flags))


DRAWS = "each rank draws the random numbers of its own tokens"
DROPS = "each rank drops tokens among its own, as data-parallel ranks do"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"moe_router_force_load_balancing": True}, f"--moe-router-force-load-balancing: {DRAWS}"),
        ({"moe_router_force_biased": -0.5}, f"--moe-router-force-biased -0.5: {DRAWS}"),
        ({"moe_expert_rank_capacity_factor": 1.5}, f"--moe-expert-rank-capacity-factor 1.5: {DROPS}"),
        ({"hidden_dropout": 0.1}, f"--hidden-dropout 0.1 (Megatron's default): {DRAWS}"),
    ],
)
def test_what_each_rank_draws_or_drops_for_itself_is_said_in_every_release(options, sentence):
    # Some releases lack the options: the others' arguments are not there.
    notes = difference_notes(
        SimpleNamespace(**options), ContextParallelConfig(context_parallel_size=2), {"hidden_dropout": 0.1}
    )
    assert notes == [f"{sentence}, so the losses are not those of --context-parallel-size 1."]


def test_unset_options_that_would_differ_are_not_spoken_of(parser):
    args = parser.parse_args([*CP2, *QUIET, "--seq-length", "64"])
    assert difference_notes(args, config_from_arguments(args)) == []


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a checkpoint of a training run, as far as one looks for it before it is read."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    return tmp_path


def resumed(folder, **changes):
    """Megatron's arguments after validate_args, of a run that goes on from a checkpoint."""
    values = {"use_distributed_optimizer": True, "load": str(folder), "no_load_optim": None, "finetune": False}
    return SimpleNamespace(**values | changes)


def test_state_of_the_distributed_optimizer_is_not_loaded_into_torchs_adam(monkeypatch, checkpoint):
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", False)
    config = ContextParallelConfig(context_parallel_size=2)
    with pytest.raises(ConfigurationError) as refusal:
        refuse_unloadable_optimizer(resumed(checkpoint), config)
    assert str(refusal.value) == (
        f"--use-distributed-optimizer with --load {checkpoint} and --context-parallel-size 2: Megatron loads its state "
        "into TransformerEngine's or apex's Adam alone, at CP = 1 too, and neither is installed; install one, or "
        "start Adam anew with --no-load-optim."
    )
    refuse_unloadable_optimizer(resumed(checkpoint), ContextParallelConfig())
    for change in ({"use_distributed_optimizer": False}, {"no_load_optim": True}, {"finetune": True}, {"load": None}):
        refuse_unloadable_optimizer(resumed(checkpoint, **change), config)
    refuse_unloadable_optimizer(resumed(checkpoint / "nothing yet"), config)
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True)
    refuse_unloadable_optimizer(resumed(checkpoint), config)


def test_a_checkpoint_of_weights_alone_is_loaded(monkeypatch, checkpoint):
    monkeypatch.setattr("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", False)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("release")
    refuse_unloadable_optimizer(resumed(checkpoint), ContextParallelConfig(context_parallel_size=2))
