"""Every rule about parsed arguments, checked right after parsing, and what is said of those that keep them."""

import sys
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches import rules
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.rules import asks_for_cpu, fixed_document_length
from mindspeed_cp.patches.unsupported import difference_notes, refuse_unsupported
from mindspeed_cp.topology import CPTopology
from unit_tests.argument_cases import CP4, MODEL, config_from_arguments, is_known, option_of, refusal_of

pytestmark = [
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
    pytest.mark.usefixtures("ampere_machine"),
]


def test_arguments_that_keep_the_rules_give_the_configuration(parser):
    config = config_from_arguments(parser.parse_args(CP4))
    assert config == ContextParallelConfig(context_parallel_size=4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tensor-model-parallel-size", "4"],
            "--num-attention-heads 8 with --tensor-model-parallel-size 4 gives each rank 2, fewer than the Ulysses "
            "degree 4 (--context-parallel-size), which wants one at least for each of its ranks; use hybrid_cp_algo "
            "with a --ulysses-degree-in-cp of 2, or megatron_cp_algo.",
        ),
        (
            ["--group-query-attention", "--num-query-groups", "3"],
            "--num-query-groups 3 does not divide --num-attention-heads 8; use 1, 2, 4 or 8.",
        ),
        (
            ["--seq-length", "3"],
            "--seq-length 3 is below --context-parallel-size 4; use 4 or more.",
        ),
        (
            ["--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", "3"],
            "--ulysses-degree-in-cp 3 does not divide --context-parallel-size 4; use 2.",
        ),
    ],
)
def test_arguments_that_break_a_rule_are_refused(parser, flags, message):
    flags = ["--context-parallel-algo", "ulysses_cp_algo", *flags]  # Another one that is named after it counts.
    assert refusal_of(config_from_arguments, parser.parse_args([*CP4, *flags])) == message


def test_query_groups_without_group_query_attention_are_not_read(parser):
    # Megatron's default of --num-query-groups is 1, whether or not there are groups.
    args = parser.parse_args(CP4)
    assert (args.num_query_groups, args.group_query_attention) == (1, False)
    config_from_arguments(args)


def with_cp4(text):
    """The message of a refusal, from the option and what follows the size."""
    option, _, reason = text.partition(": ")
    return f"{option} with --context-parallel-size 4: {reason}"


REFUSED_FLAGS = [
    (["--cache-mla-latents"], "--cache-mla-latents: inference is not available; leave it out."),
    (
        ["--experimental-attention-variant", "dsa"],
        "--experimental-attention-variant dsa: it has an attention of its own; leave it out.",
    ),
    (["--use-kitchen-attention"], "--use-kitchen-attention: it has an attention of its own; leave it out."),
    (
        ["--cuda-graph-impl", "local"],
        "--cuda-graph-impl local: attention has not been tried within a captured graph; use none.",
    ),
    (
        ["--enable-cuda-graph"],
        "--enable-cuda-graph: attention has not been tried within a captured graph; leave it out.",
    ),
    (
        ["--external-cuda-graph"],
        "--external-cuda-graph: attention has not been tried within a captured graph; leave it out.",
    ),
    (
        ["--window-size", "8,-1"],
        "--window-size 8,-1: below 0 Megatron's own attention hides each token from itself, and TransformerEngine's "
        "sees all; use two numbers from 0 on, or leave it out.",
    ),
    (["--batch-invariant-mode"], "--batch-invariant-mode: no kernel here makes that promise; leave it out."),
    *(
        (
            [option],
            f"{option}: Megatron's loop of reinforcement learning gives each rank of a sequence the whole of it; a "
            "program may cut its bins by megatron_adaptor.shard_batch; leave it out.",
        )
        for option in ("--perform-rl-step", "--rl-use-sequence-packing")
    ),
    (
        ["--position-embedding-type", "relative"],
        "--position-embedding-type relative: T5 alone has it, whose batches Megatron does not cut for the ranks of a "
        "sequence; use rope or learned_absolute.",
    ),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED_FLAGS, ids=[" ".join(flags) for flags, _ in REFUSED_FLAGS])
def test_option_that_cannot_be_honoured_is_refused_by_name(parser, flags, message):
    if not is_known(option_of(flags)):
        pytest.skip("this Megatron does not have the option yet")
    args = parser.parse_args([*CP4, *flags])
    assert refusal_of(config_from_arguments, args) == with_cp4(message)
    args.context_parallel_size = 1
    assert config_from_arguments(args).context_parallel_size == 1


@pytest.mark.parametrize("option", ["fp8_dot_product_attention", "fp8_multi_head_attention"])
def test_option_of_a_layer_s_configuration_is_refused_by_name(option):
    spelled = "--" + option.replace("_", "-")
    message = with_cp4(f"{spelled}: attention in fp8 is not available; leave it out.")
    config = ContextParallelConfig(context_parallel_size=4)
    assert refusal_of(refuse_unsupported, SimpleNamespace(**{option: True}), config) == message
    refuse_unsupported(SimpleNamespace(**{option: False}), config)
    refuse_unsupported(SimpleNamespace(**{option: True}), ContextParallelConfig())


def test_every_refused_option_is_tested_here():
    from mindspeed_cp.patches.unsupported import _REFUSALS

    tested = {option_of(flags) for flags, _ in REFUSED_FLAGS}
    assert {refusal.option for refusal in _REFUSALS} == tested | {
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
    }


def test_every_refused_option_is_one_of_megatron_s(parser):
    from megatron.core.transformer import TransformerConfig

    from mindspeed_cp.patches.unsupported import _REFUSALS

    known = vars(parser.parse_args([])).keys() | TransformerConfig.__dataclass_fields__.keys()
    assert [option for option, *_ in _REFUSALS if (option in known) != is_known(option)] == []


def test_documents_are_not_kept_apart_where_no_mask_is_made_at_cp_1(parser):
    args = parser.parse_args([*CP4, "--reset-attention-mask", "--no-create-attention-mask-in-dataloader"])
    assert "no mask is made, so documents would see each other" in refusal_of(config_from_arguments, args)


def test_documents_are_found_in_the_data_and_no_mask_is_made(parser, validation):
    args = parser.parse_args([*CP4, "--reset-attention-mask", "--reset-position-ids"])
    validation.validate(args, {})
    assert validation.plugin.document_rule == DocumentRule(positions_restart=True)
    assert validation.plugin.apart_by == "--reset-attention-mask"
    assert not args.create_attention_mask_in_dataloader
    alone = parser.parse_args([*MODEL, "--reset-attention-mask"])
    validation.validate(alone, {})
    assert alone.create_attention_mask_in_dataloader, "Megatron's own attention reads it"


def test_no_mask_is_made_beside_conversations_whose_data_set_asserts_that(parser, validation):
    args = parser.parse_args([*MODEL, "--sft"])
    validation.validate(args, {})
    assert not args.create_attention_mask_in_dataloader


def test_all_broken_rules_are_said_at_once(parser):
    broken = ["--use-kitchen-attention", "--cache-mla-latents", "--seq-length", "3", "--cp-window-size", "0"]
    args = parser.parse_args([*CP4, *broken])
    args.world_size = 6
    assert refusal_of(config_from_arguments, args).splitlines() == [
        "4 things stand in the way:",
        "  --cp-window-size 0 is below 1; use 1 or more.",
        "  --cache-mla-latents with --context-parallel-size 4: inference is not available; leave it out.",
        "  --use-kitchen-attention with --context-parallel-size 4: it has an attention of its own; leave it out.",
        "  --context-parallel-size 4 * --tensor-model-parallel-size 1 * --pipeline-model-parallel-size 1 = 4 does not "
        "divide the 6 ranks; use a --context-parallel-size of 1, 2, 3 or 6, or a multiple of 4 ranks.",
    ]
    args.cp_window_size = 1
    assert "  --seq-length 3 is below --context-parallel-size 4; use 4 or more." in refusal_of(
        config_from_arguments, args
    )


@pytest.mark.parametrize(
    ("flags", "length", "said"),
    [
        (["--reset-attention-mask", "--fix-sub-seq-length", "16"], 16, ""),
        (
            ["--fix-sub-seq-length", "16"],
            None,
            "--fix-sub-seq-length 16 has no effect: it needs --reset-attention-mask.",
        ),
        (
            ["--reset-attention-mask", "--fix-sub-seq-length", "65"],
            None,
            "--fix-sub-seq-length 65 has no effect: it is above --seq-length.",
        ),
        (["--reset-attention-mask"], None, ""),
    ],
)
def test_documents_of_one_length_reach_the_plugin(parser, validation, flags, length, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validation.validate(parser.parse_args([*MODEL, *flags]), {})
    documents = validation.plugin.document_rule
    assert (None if documents is None else documents.length) == length
    assert [str(one.message) for one in caught if "--fix-sub" in str(one.message)] == [said] * bool(said)


def test_documents_of_one_length_fit_whichever_of_its_two_names_the_sample_s_length_has(parser):
    flags = [*(word.replace("--seq-length", "--encoder-seq-length") for word in MODEL), "--reset-attention-mask"]
    for given, length in (("16", 16), ("65", None)):
        assert fixed_document_length(parser.parse_args([*flags, "--fix-sub-seq-length", given])) == length


def test_masked_multi_token_prediction_refuses_to_be_weighed_by_each_rank(parser):
    flags = [*CP4, "--mtp-num-layers", "1", "--eod-mask-loss", "--calculate-per-token-loss"]
    assert refusal_of(config_from_arguments, parser.parse_args(flags)) == (
        "--mtp-num-layers 1 --eod-mask-loss --calculate-per-token-loss with --context-parallel-size 4: that loss "
        "would be weighed by the tokens of each rank; leave out --calculate-per-token-loss."
    )
    for left_out in ("--eod-mask-loss", "--calculate-per-token-loss"):
        config_from_arguments(parser.parse_args([flag for flag in flags if flag != left_out]))


@pytest.mark.parametrize(
    ("flags", "topology"),
    [
        ([], CPTopology(ulysses=4)),
        (["--context-parallel-algo", "megatron_cp_algo"], CPTopology(inner=4)),
        (["--context-parallel-algo", "megatron_cp_algo", "--cp-window-size", "2"], CPTopology(outer=2, inner=2)),
        (
            ["--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", "2"],
            CPTopology(inner=2, ulysses=2),
        ),
    ],
)
def test_every_algorithm_is_available(parser, flags, topology):
    assert config_from_arguments(parser.parse_args([*CP4, *flags])).topology == topology


@pytest.mark.parametrize("device", ["cuda", "npu"])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_an_accelerator_is_used_whatever_the_backend(monkeypatch, device, backend):
    monkeypatch.setattr(rules, "accelerator", lambda: device)
    assert asks_for_cpu(backend) is False


def test_gloo_without_an_accelerator_asks_for_the_cpu(monkeypatch):
    monkeypatch.setattr(rules, "accelerator", lambda: None)
    assert asks_for_cpu("gloo") is True


def test_no_accelerator_and_no_gloo_is_refused(monkeypatch):
    monkeypatch.setattr(rules, "accelerator", lambda: None)
    assert refusal_of(asks_for_cpu, "nccl") == (
        "--distributed-backend nccl needs an accelerator, and neither torch.cuda nor torch.npu finds one; "
        "use --distributed-backend gloo to train on the CPU."
    )


@pytest.mark.parametrize("connections", [None, "8"])
@pytest.mark.parametrize(
    ("flags", "spelled"),
    [
        (["--context-parallel-size", "4"], "--context-parallel-size 4"),
        (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size 2"),
        (
            ["--context-parallel-size", "4", "--tensor-model-parallel-size", "2"],
            "--context-parallel-size 4 --tensor-model-parallel-size 2",
        ),
    ],
)
def test_missing_environment_variable_is_said(parser, monkeypatch, connections, flags, spelled):
    if connections is None:
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    else:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    assert refusal_of(config_from_arguments, parser.parse_args([*MODEL, *flags])) == (
        f"{spelled}: Megatron needs the environment variable CUDA_DEVICE_MAX_CONNECTIONS set to 1 here; "
        f"export CUDA_DEVICE_MAX_CONNECTIONS=1."
    )


@pytest.mark.parametrize(
    ("flags", "device", "major"),
    [
        (MODEL, "cuda", 8),
        (CP4, "cuda", 10),
        ([*CP4, "--use-torch-fsdp2"], "cuda", 8),
        ([*CP4, "--use-megatron-fsdp"], "cuda", 8),
        ([*CP4, "--overlap-moe-expert-parallel-comm"], "cuda", 8),
    ],
)
def test_environment_variable_is_not_asked_for_where_megatron_does_not(parser, monkeypatch, flags, device, major):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(rules, "accelerator", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    config_from_arguments(parser.parse_args(flags))


@pytest.mark.parametrize("device", [None, "npu"])
def test_environment_variable_is_asked_for_without_a_gpu_too(parser, monkeypatch, device):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS")
    monkeypatch.setattr(rules, "accelerator", lambda: device)
    message = refusal_of(config_from_arguments, parser.parse_args(CP4))
    assert message.startswith("--context-parallel-size 4: Megatron needs the environment variable")


def test_validation_checks_first_and_configures_the_plugin_last(parser, validation):
    args, defaults = parser.parse_args(CP4), {}
    assert validation.validate(args, defaults) == "validated"
    assert validation.calls == [("validate_args", args, defaults, None)]
    assert validation.plugin.config == ContextParallelConfig(context_parallel_size=4)


def test_validation_passes_keywords_on(parser, validation):
    assert validation.validate(args=parser.parse_args(CP4), defaults={"a": 1}) == "validated"
    assert validation.calls[0][2] == {"a": 1}


def test_validation_turns_to_the_cpu_before_megatron_looks_for_a_gpu(parser, validation, monkeypatch):
    monkeypatch.setattr(rules, "accelerator", lambda: None)
    validation.validate(parser.parse_args([*CP4, "--distributed-backend", "gloo"]), {})
    assert [call if call == "use_cpu" else call[0] for call in validation.calls] == ["use_cpu", "validate_args"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--cache-mla-latents"],
            "--cache-mla-latents with --context-parallel-size 4: inference is not available; leave it out.",
        ),
        (
            ["--seq-length", "3"],
            "--seq-length 3 is below --context-parallel-size 4; use 4 or more.",
        ),
    ],
)
def test_refusal_ends_the_program_with_one_line_and_status_2(parser, validation, monkeypatch, capsys, flags, line):
    monkeypatch.setattr(sys, "argv", ["/somewhere/pretrain_gpt.py", *CP4, *flags])
    with pytest.raises(SystemExit) as stop:
        validation.validate(parser.parse_args([*CP4, *flags]), {})
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"pretrain_gpt.py: error: {line}\n")
    assert (validation.calls, validation.plugin.config) == ([], None)


def test_missing_accelerator_ends_the_program_with_one_line_and_status_2(parser, validation, monkeypatch, capsys):
    monkeypatch.setattr(rules, "accelerator", lambda: None)
    with pytest.raises(SystemExit) as stop:
        validation.validate(parser.parse_args(CP4), {})
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert validation.calls == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--context-parallel-algo", "megatron_cp_algo", "--cp-window-size", "2"],
        ["--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", "2"],
    ],
)
def test_flags_of_a_cluster_script_are_harmless_on_one_rank(parser, validation, flags):
    with pytest.warns(UserWarning, match="has no effect with --context-parallel-size 1"):
        assert validation.validate(parser.parse_args([*MODEL, *flags]), {}) == "validated"


@pytest.mark.parametrize(("rank", "sentences"), [(None, 2), ("0", 2), ("1", 0)])
def test_flags_without_effect_are_said_once_by_the_first_rank(parser, validation, monkeypatch, rank, sentences):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(rules, "kernel_notes", lambda *given: [])
    ulysses = ["--context-parallel-algo", "ulysses_cp_algo"]
    args = parser.parse_args([*CP4, *ulysses, "--cp-window-size", "2", "--use-cp-send-recv-overlap"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        validation.validate(args, {})
    assert len(said) == sentences
    assert all(" has no effect with --context-parallel-algo ulysses_cp_algo" in str(one.message) for one in said)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1: each rank draws the random numbers of its own tokens"),
        (
            ["--moe-input-jitter-eps", "0.01"],
            "--moe-input-jitter-eps 0.01: each rank draws the random numbers of its own tokens",
        ),
        (
            ["--moe-expert-capacity-factor", "1.5"],
            "--moe-expert-capacity-factor 1.5: each rank drops tokens among its own, as data-parallel ranks do",
        ),
        (
            ["--moe-router-load-balancing-type", "sinkhorn"],
            "--moe-router-load-balancing-type sinkhorn: each rank balances its own tokens, as data-parallel ranks do",
        ),
    ],
)
def test_option_that_is_honoured_within_each_rank_is_said(parser, flags, sentence):
    args = parser.parse_args([*CP4, *flags])
    whole = f"{sentence}, so the losses are not those of --context-parallel-size 1."
    assert difference_notes(args, config_from_arguments(args)) == [whole]
    assert difference_notes(args, ContextParallelConfig()) == []


def test_no_difference_is_said_of_a_model_without_randomness(parser):
    flags = ["--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss"]
    args = parser.parse_args([*CP4, *flags, "--moe-aux-loss-coeff", "0.01", "0.01"])
    assert difference_notes(args, config_from_arguments(args)) == []
