"""A command line as a whole: all that stands in its way at once, and nothing else changed."""

import argparse
import sys
import warnings
from importlib.util import find_spec

import pytest

from mindspeed_cp.config import ConfigurationError
from mindspeed_cp.patches import arguments, rules
from mindspeed_cp.patches.arguments import argument_patches, examine_command_line
from mindspeed_cp.patches.command_line import examine
from mindspeed_cp.patches.flags import add_context_parallel_arguments
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry
from unit_tests.argument_cases import config_from_arguments

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

SIZES = "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64"
MODEL = f"{SIZES} --micro-batch-size 1 --attention-dropout 0 --hidden-dropout 0"
RING = "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo"
ULYSSES = "--context-parallel-size 4 --context-parallel-algo ulysses_cp_algo"
FUSED = "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb"
EXPERTS = "--num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 2"
LATENT = "--multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --v-head-dim 16"
TOKENIZER = "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path /models/some"
FIXED_ROUTER = (
    "--fix-router: Megatron has no such router; measure with --moe-router-force-load-balancing, or leave it out."
)

# Features of MindSpeed's manual put together with Megatron's, and the flags that stand in the way.
FLAG_SETS = [
    (f"{RING} {FUSED} --use-flash-attn --use-cp-send-recv-overlap --use-fused-ring-attention-update", []),
    (f"{RING} --cp-window-size 2 --cp-attention-mask-type causal --reuse-fp32-param --use-distributed-optimizer", []),
    (f"{ULYSSES} --use-ulysses-allgather-kv --swap-attention --swap-modules input_norm,self_attention", []),
    ("--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --use-mc2", []),
    (f"{RING} --reset-attention-mask --variable-seq-lengths --fix-sub-seq-length 16", []),
    (f"{ULYSSES} --group-query-attention --num-query-groups 4 --kv-head-repeat-before-uly-alltoall --swiglu", []),
    (f"{ULYSSES} --group-query-attention --num-query-groups 2 --kv-head-repeat-before-uly-alltoall", []),
    (f"{RING} --shape-order BNSD --sparse-mode 2 --pre-tockens 65536 --next-tockens 0", []),
    (f"{RING} --sparse-mode 4 --pre-tockens 32", []),
    ("--context-parallel-size 4 --context-parallel-algo adaptive_cp_algo --attention-mask-on-cpu", []),
    ("--context-parallel-size 4 --context-parallel-algo kvallgather_cp_algo", []),
    (f"{RING} --position-embedding-type alibi --alibi-fusion-attn-type 2", []),
    (f"{RING} {EXPERTS} --moe-permutation-async-comm --moe-token-dispatcher-type alltoall_seq", []),
    (
        f"{RING} {EXPERTS} --moe-intermediate-size 32 --n-shared-experts 2 --first-k-dense-replace 1",
        [],
    ),
    (f"{RING} {EXPERTS} --moe-router-load-balancing-type softmax_topk --moe-grouped-gemm", []),
    (
        f"{RING} {EXPERTS} --moe-router-load-balancing-type group_limited_greedy --topk-group 2 --fix-router --seq-aux",
        ["--moe-router-load-balancing-type", "--topk-group", "--fix-router"],
    ),
    (f"{RING} {EXPERTS} --num-zero-experts 4 --moe-zero-memory level0", ["--num-zero-experts"]),
    (f"{RING} {EXPERTS} --moe-alltoall-overlap-comm --moe-fb-overlap --schedules-method dualpipev --moe-zerc", []),
    (f"{RING} {LATENT} --qk-nope-head-dim 16 --qk-rope-head-dim 8 --mla-fa-without-pad --mla-mm-split", []),
    (
        f"{RING} {LATENT} --rope-scaling-type yarn --rope-scaling-factor 40 --beta-fast 32 --beta-slow 1 "
        "--rope-scaling-mscale 1.0 --rope-scaling-original-max-position-embeddings 4096",
        [],
    ),
    (f"{RING} {LATENT} --enable-dsa-indexer --index-topk 2048", ["--enable-dsa-indexer"]),
    (f"{RING} --rope-scaling-type longrope --long-factor 1,2", ["--rope-scaling-type"]),
    (f"{RING} --position-embedding-type rope --rotary-base 1e6 --normalization RMSNorm --qk-layernorm", []),
    (f"{RING} {TOKENIZER} --tokenizer-padding-side left --data-path data --split 949,50,1 --mock-data", []),
    (f"{RING} --noop-layers 6,7 --num-layer-list 4,4 --pipeline-model-parallel-size 2", ["--noop-layers"]),
    (f"{RING} --stage sft --is-instruction-dataset --prompt-type qwen", ["--stage", "--is-instruction-dataset"]),
    (f"{RING} --lora-r 8 --lora-alpha 16 --lora-target-modules linear_qkv linear_proj", ["--lora-target-modules"]),
    (f"{RING} --recompute-activation-function --enable-recompute-layers-per-pp-rank --recompute-granularity full", []),
    (f"{RING} --qk-clip --attention-dropout 0.1 --seq-length 3 --geglu", ["--qk-clip", "--seq-length", "--geglu"]),
    (
        f"{RING} --profile-level level1 --profile-with-cpu --use-ema --npu-deterministic --use-fused-rmsnrm",
        ["--use-ema", "--use-fused-rmsnrm"],
    ),
    ("--context-parallel-size 1 --use-ascend-coc --coc-mode 2 --tp-2d --tp-x 2 --tp-y 2 --sliding-window 8", []),
    (f"{RING} --tokenizer-model a {TOKENIZER} --micro-batch-size one", ["--tokenizer-type", "--micro-batch-size"]),
]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with a GPU that has a kernel for everything, and what Megatron wants of the environment."""
    monkeypatch.setattr(rules, "accelerator", lambda: "cuda")
    monkeypatch.setattr(rules, "check_kernels", lambda *given: None)
    monkeypatch.setattr(rules, "_wants_one_connection", lambda args: False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(("flags", "in_the_way"), FLAG_SETS)
def test_flag_set_passes_or_names_all_that_stands_in_its_way(parser, flags, in_the_way):
    found = examine_command_line(f"{MODEL} {flags}".split(), parser, num_ranks=8)
    assert {each.flag for each in found.blockers} == {*in_the_way}
    if not in_the_way:
        config_from_arguments(parser.parse_args(found.argv))


@pytest.fixture
def run(megatron_arguments, monkeypatch):
    """Parse a command line as Megatron does, patched; the arguments and what was warned of."""

    def run(flags, **options):
        argv = ["/somewhere/pretrain_gpt.py", *flags.split()]
        monkeypatch.setattr(sys, "argv", argv)
        patches = [each for each in argument_patches(Plugin(), print) if not each.target.endswith(":validate_args")]
        with PatchRegistry(patches).applied(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                args = megatron_arguments.parse_args(**options)
            finally:
                assert sys.argv is argv
        return args, [str(one.message) for one in caught if "MindSpeed" in str(one.message)]

    return run


def test_everything_is_said_at_once_and_no_usage_is_printed(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(SystemExit) as stop:
        run(f"{MODEL} {RING} {FUSED} --seq-length 3 --fix-router --use-fused-swiglo --seed x --swiglu y e s")
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "pretrain_gpt.py: error: 6 things stand in the way:",
        "  " + FIXED_ROUTER,
        "  --use-fused-swiglo: neither this Megatron nor MindSpeed has this flag; did you mean --use-fused-swiglu?",
        "  --seed x: it takes a whole number; give it one.",
        "  y e s: no flag takes this; leave it out.",
        "  --seq-length 3 is below --context-parallel-size 4; use 4 or more.",
        "  --context-parallel-size 4 * --tensor-model-parallel-size 1 * --pipeline-model-parallel-size 1 = 4 does not "
        "divide the 6 ranks; use a --context-parallel-size of 1, 2, 3 or 6, or a multiple of 4 ranks.",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num-layers", ""], "--num-layers '': it takes a whole number; give it one."),
        (["--lr", "fast"], "--lr fast: it takes a number; give it one."),
        (["--lr", "-1e-3"], "--lr -1e-3: a number in this form is taken for a flag; write --lr=-1e-3."),
        (
            ["--ema-decay", "-1e-3"],
            "--ema-decay -1e-3: a number in this form is taken for a flag; write --ema-decay=-1e-3.",
        ),
        (["--seed"], "--seed: it needs a value; give it one."),
        (["--swiglu=yes"], "--swiglu=yes: it takes no value; give the flag alone."),
        (["--attention-mask-type", "none"], "--attention-mask-type none: it has no such value; use causal or general."),
        (["--swiglu", ""], "'': no flag takes this; leave it out."),
    ],
)
def test_a_wrong_value_is_named_with_its_rule_and_a_way_out(parser, flags, sentence):
    assert [each.sentence for each in examine(flags, parser).blockers] == [sentence]


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--context-parallel-si", "--context-parallel-size"),
        ("--tensor-model-par", "--tensor-model-parallel-size"),
        ("--tp", "--tensor-model-parallel-size"),
        ("--cp-size", "--context-parallel-size"),
        ("--use-fused-rmsnrm", "--use-fused-rmsnorm"),
    ],
)
def test_an_unknown_flag_comes_with_what_may_be_meant(parser, flag, meant):
    (blocker,) = examine([flag, "4"], parser).blockers
    assert blocker.sentence.endswith(f"; did you mean {meant}?")


def test_a_few_letters_are_not_taken_for_a_flag_without_effect(parser):
    (blocker,) = examine(["--tp-z", "4"], parser).blockers
    assert "--tp-x" not in blocker.sentence and "--tp-y" not in blocker.sentence


def test_rules_are_not_judged_where_a_checkpoint_may_say_otherwise(run, capsys):
    with pytest.raises(SystemExit):
        run(f"{MODEL} {RING} --seq-length 3 --fix-router --use-checkpoint-args")
    assert capsys.readouterr().err == f"pretrain_gpt.py: error: {FIXED_ROUTER}\n"


def test_a_script_without_mindspeed_s_flags_sees_nothing(run, megatron_arguments, monkeypatch):
    # As on a machine that lacks nothing.
    monkeypatch.setattr(arguments, "set_defaults", lambda parser: None)
    monkeypatch.setattr(arguments, "note_on_defaults", lambda parser, argv: [])
    flags = f"{MODEL} --rotary-base 10000 --moe-router-load-balancing-type none"
    args, said = run(flags)
    parser = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    own = vars(parser.parse_args(flags.split()))
    assert {name: value for name, value in vars(args).items() if name in own} == own
    assert said == []
    assert not {"use_fused_rmsnorm", "moe_intermediate_size"} & {*vars(args)}


@pytest.mark.parametrize(("rank", "lines"), [("0", 2), ("1", 0)])
def test_mindspeed_s_flags_reach_megatron_and_the_first_rank_says_so(run, monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    args, said = run(f"{MODEL} {FUSED} --moe-intermediate-size 96")
    assert args.moe_ffn_hidden_size == 96
    assert len(said) == lines


def test_a_script_s_own_flags_are_known(run):
    def add_own(parser):
        parser.add_argument("--of-my-own", type=int, required=True)
        return parser

    args, _ = run(f"{MODEL} --of-my-own 3", extra_args_provider=add_own)
    assert args.of_my_own == 3


def test_what_is_missing_is_said_once(run, capsys):
    def add_own(parser):
        parser.add_argument("--of-my-own", required=True)
        return parser

    with pytest.raises(SystemExit):
        run(f"{MODEL} --fix-router", extra_args_provider=add_own)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  " + FIXED_ROUTER,
        "  the following arguments are required: --of-my-own.",
    ]


def test_unknown_flags_pass_where_megatron_is_told_to_ignore_them(run):
    args, _ = run(f"{MODEL} --nobody-knows 3 --moe-intermediate-size 96", ignore_unknown_args=True)
    assert args.moe_ffn_hidden_size == 96


def test_help_is_megatron_s(run, capsys):
    # The help of 0.19 trips over a percent sign of its own under some Pythons.
    with pytest.raises((SystemExit, ValueError)):
        run("--fix-router --help")
    assert "--fix-router" not in capsys.readouterr().err


def test_another_plugin_s_flags_of_the_same_name_are_an_error_in_one_line():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cp-window-size")
    parser.add_argument("--context-parallel-algo")
    with pytest.raises(ConfigurationError) as refusal:
        add_context_parallel_arguments(parser)
    assert str(refusal.value) == (
        "--context-parallel-algo, --cp-window-size: another plugin has added them to Megatron's parser already; "
        "import either mindspeed_cp or that one (MindSpeed?), not both."
    )


def test_building_the_parser_beside_another_plugin_ends_with_status_2(megatron_arguments, monkeypatch, capsys):
    def with_a_flag_of_theirs(parser, original=megatron_arguments.add_megatron_arguments):
        parser.add_argument("--context-parallel-algo")
        return original(parser)

    monkeypatch.setattr(megatron_arguments, "add_megatron_arguments", with_a_flag_of_theirs)
    patch = next(each for each in argument_patches(Plugin(), print) if "add_megatron_arguments" in each.target)
    with PatchRegistry([patch]).applied(), pytest.raises(SystemExit) as stop:
        megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert stop.value.code == 2
    assert "--context-parallel-algo: another plugin has added them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "ranks", "ways_out"),
    [
        ("", 6, "a --context-parallel-size of 1, 2, 3 or 6, or a multiple of 4 ranks."),
        ("--tensor-model-parallel-size 2", 4, "a --context-parallel-size of 1 or 2, or a multiple of 8 ranks."),
        ("--tensor-model-parallel-size 2", 3, "a multiple of 8 ranks."),
    ],
)
def test_sizes_that_do_not_divide_the_ranks_are_refused(parser, flags, ranks, ways_out):
    argv = f"{MODEL} {RING} {flags}".split()
    (blocker,) = examine_command_line(argv, parser, num_ranks=ranks).blockers
    assert blocker.sentence.endswith(f" does not divide the {ranks} ranks; use {ways_out}")
    assert examine_command_line(argv, parser, num_ranks=8).blockers == ()
    assert examine_command_line(argv, parser).blockers == (), "ranks that nobody knows"
