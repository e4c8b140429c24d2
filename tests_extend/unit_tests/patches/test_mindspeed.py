"""MindSpeed's flags: each record is understood, each translation is Megatron's own spelling, the rest is refused."""

import argparse
import itertools
from importlib.util import find_spec

import pytest

from mindspeed_cp.patches.command_line import examine
from mindspeed_cp.patches.mindspeed.older import OLDER
from mindspeed_cp.patches.mindspeed.record import Disposition
from mindspeed_cp.patches.mindspeed.table import FLAGS, SECTIONS, VALUES
from mindspeed_cp.patches.mindspeed.translate import Given, notes, split_flags, translate

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

MODEL = ["--num-layers", "6", "--seq-length", "64"]
SAMPLES = {"": [], "N": ["2"], "X": ["2.5"], "S": ["a"], "N...": ["2", "3"], "S...": ["a", "b"]}

# Flags of MindSpeed's, and Megatron's or the plugin's spelling of the same.
TRANSLATED = [
    ("--multi-head-latent-attention", "--multi-latent-attention"),
    ("--qk-nope-head-dim 24", "--qk-head-dim 24"),
    ("--qk-rope-head-dim 8", "--qk-pos-emb-head-dim 8"),
    ("--moe-intermediate-size 96", "--moe-ffn-hidden-size 96"),
    ("--n-group 4", "--moe-router-num-groups 4"),
    (
        "--n-group 8 --topk-group 4 --moe-router-topk 8",
        "--moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-topk 8",
    ),
    (
        "--n-group 8 --topk-group 8 --moe-router-topk 8",
        "--moe-router-num-groups 8 --moe-router-group-topk 8 --moe-router-topk 8",
    ),
    ("--topk-softmax-in-fp32", ""),
    (
        "--topk-softmax-in-fp32 --moe-router-num-groups 4 --moe-router-group-topk 3 --moe-router-topk 6",
        "--moe-router-num-groups 4 --moe-router-group-topk 3 --moe-router-topk 6",
    ),
    ("--routed-scaling-factor 2.5", "--moe-router-topk-scaling-factor 2.5"),
    ("--first-k-dense-replace 2", "--moe-layer-freq [0,0,1,1,1,1]"),
    ("--first-k-dense-replace 0", "--moe-layer-freq 1"),
    ("--first-k-dense-replace -1 --moe-layer-freq -1", "--moe-layer-freq 1"),
    ("--moe-layer-freq 2 --first-k-dense-replace 1", "--moe-layer-freq [0,0,1,0,1,0]"),
    ("--first-k-dense-replace 5", "--moe-layer-freq [0]*5+[1]"),
    (
        "--n-shared-experts 2 --moe-ffn-hidden-size 96",
        "--moe-shared-expert-intermediate-size 192 --moe-ffn-hidden-size 96",
    ),
    (
        "--n-shared-experts 2 --moe-intermediate-size 96 --ffn-hidden-size 128",
        "--moe-shared-expert-intermediate-size 192 --moe-ffn-hidden-size 96 --ffn-hidden-size 128",
    ),
    ("--n-shared-experts 1 --ffn-hidden-size 128", "--moe-shared-expert-intermediate-size 128 --ffn-hidden-size 128"),
    ("--n-shared-experts 0", ""),
    ("--shared-expert-gate --shared-expert-gate-output-dimension 1", "--moe-shared-expert-gate"),
    ("--router-gating-in-fp32", "--moe-router-dtype fp32"),
    (
        "--moe-router-load-balancing-type softmax_topk",
        "--moe-router-load-balancing-type none --moe-router-pre-softmax",
    ),
    ("--moe-router-load-balancing-type noaux_tc --seq-aux", "--moe-router-load-balancing-type none"),
    ("--moe-token-dispatcher-type alltoall_seq", "--moe-token-dispatcher-type alltoall"),
    ("--norm-topk-prob", ""),
    ("--norm-topk-prob --moe-router-pre-softmax", ""),
    (
        "--norm-topk-prob --moe-router-topk 1 --moe-router-load-balancing-type sinkhorn",
        "--moe-router-topk 1 --moe-router-load-balancing-type sinkhorn",
    ),
    ("--input-jitter", ""),
    ("--input-jitter --moe-input-jitter-eps 0", "--moe-input-jitter-eps 0"),
    ("--compress-optimizer", ""),
    ("--mtp-loss-scale 0.3", ""),
    ("--beta-fast 16", ""),
    ("--multi-latent-attention --rope-type yarn --beta-slow 1", "--multi-latent-attention --rope-type yarn"),
    ("--shape-order BNSD", "--megatron-cp-in-bnsd"),
    ("--shape-order SBH", ""),
    ("--cp-attention-mask-type general", "--attention-mask-type general"),
    ("--use-glm-rope --rotary-percent 0.5", "--rotary-interleaved --rotary-percent 0.5"),
    ("--partial-rotary-factor 0.25", "--rotary-percent 0.25"),
    ("--partial-rotary-factor 0.25 --rotary-percent 1.0", "--rotary-percent 0.25"),
    ("--partial-rotary-factor 0 --rotary-percent 0.5", "--rotary-percent 0.5"),
    ("--rotary-base 1e6", "--rotary-base 1000000"),
    ("--rotary-base=10000.0", "--rotary-base 10000"),
    (
        "--rope-scaling-type llama3 --rope-scaling-factor 8.0 --low-freq-factor 1.0 --high-freq-factor 4.0 "
        "--original-max-position-embeddings 8192",
        "--use-rope-scaling --rope-scaling-factor 8.0",
    ),
    (
        "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor 40 --beta-fast 32 --beta-slow 1 "
        "--rope-scaling-beta-fast 32 --rope-scaling-mscale 0.707 --rope-scaling-mscale-all-dim 0.707 "
        "--rope-scaling-original-max-position-embeddings 4096",
        "--multi-latent-attention --rope-type yarn --rotary-scaling-factor 40 --mscale 0.707 --mscale-all-dim 0.707",
    ),
    (
        "--multi-head-latent-attention --rope-scaling-type yarn --yarn-scaling-factor 4 "
        "--rope-scaling-original-max-position-embeddings 4096",
        "--multi-latent-attention --rope-type yarn --rotary-scaling-factor 4 --mscale 1.0 --mscale-all-dim 0.0",
    ),
    (
        "--tokenizer-type PretrainedFromHF --tokenizer-name-or-path /models/some",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /models/some --trust-remote-code",
    ),
    ("--num-layer-list 2,2,2 --pipeline-model-parallel-size 3", "--pipeline-model-parallel-size 3"),
    (
        "--num-layer-list 1,3,2 --pipeline-model-parallel-size 3",
        "--pipeline-model-parallel-layout Et*1|t*3|t*2L --pipeline-model-parallel-size 3",
    ),
    ("--optimizer-selection fused_torch_adamw", ""),
    ("--pre-tockens 64 --next-tockens 0 --sparse-mode 2", ""),
    ("--sparse-mode 5", "--attention-mask-type general"),
    ("--sparse-mode 4 --pre-tockens 16 --next-tockens 3", "--window-size 16,3"),
    ("--pre-tockens 16", "--window-size 16,0"),
    ("--next-tockens 3", "--window-size 1048576,3"),
    ("--sliding-window 16", "--window-size 16,0"),
    ("--interleave-sliding-window 16", "--window-size 15,0 --window-attn-skip-freq 2"),
    ("--position-embedding-type alibi", "--position-embedding-type none --use-alibi"),
    ("--context-parallel-algo adaptive_cp_algo", "--context-parallel-algo megatron_cp_algo"),
    ("--context-parallel-algo hybrid_adaptive_cp_algo", "--context-parallel-algo hybrid_cp_algo"),
]

# What is not the same there and here, and the end of the answer.
DIFFERENT = [
    ("--first-k-dense-replace 0 --moe-layer-freq 2", "use 1."),
    ("--first-k-dense-replace 1 --moe-layer-freq ([0,1]*2)", "use 1, or leave this out."),
    ("--first-k-dense-replace 6", "--num-layers 6 has no such layer; use 0 to 5, or -1."),
    ("--first-k-dense-replace -2", "--num-layers 6 has no such layer; use 0 to 5, or -1."),
    ("--n-shared-experts 2", "it needs --moe-ffn-hidden-size; give it."),
    ("--n-shared-experts 2 --moe-ffn-hidden-size 0", "it needs --moe-ffn-hidden-size; give it."),
    ("--n-shared-experts -1 --ffn-hidden-size 8", "there are no fewer than 0; use 0 or more."),
    ("--moe-intermediate-size 0", "it has to be 1 or more; give it such a number, or leave it out."),
    ("--routed-scaling-factor -2", "it has to be 0 or more; give it such a number, or leave it out."),
    ("--multi-latent-attention --rope-type yarn --beta-fast 16", "Megatron has no flag for it; use 32."),
    ("--routed-scaling-factor nan", "it takes a number; give it one."),
    ("--n-group 0", "it has to be 1 or more; give it such a number, or leave it out."),
    (
        "--topk-group 2 --moe-router-topk 8",
        "MindSpeed scores groups by 2 experts, Megatron by --moe-router-topk over --topk-group, 4; use a "
        "--moe-router-topk of twice the groups chosen, or Megatron's --moe-router-num-groups and "
        "--moe-router-group-topk.",
    ),
    (
        "--n-group 8 --moe-router-group-topk 6 --moe-router-topk 6",
        "--moe-router-num-groups and --moe-router-group-topk.",
    ),
    (
        "--topk-softmax-in-fp32 --moe-router-num-groups 8 --moe-router-group-topk 4",
        "leave it out, or use a --moe-router-topk of twice the groups chosen.",
    ),
    ("--input-jitter --moe-input-jitter-eps 0.01", "with --moe-input-jitter-eps; leave out that or this."),
    ("--mtp-num-layers 1 --mtp-loss-scale 0.3", "use --mtp-loss-scaling-factor."),
    ("--spec mindspeed_llm.tasks.models.spec.longcat_spec layer_spec", "or name a spec of your own."),
    ("--shared-expert-gate --shared-expert-gate-output-dimension 64", "use --shared-expert-gate-output-dimension 1."),
    (
        "--norm-topk-prob --moe-router-topk-scaling-factor 2.5",
        "with aux_loss it undoes --moe-router-topk-scaling-factor; leave out that or this.",
    ),
    ("--norm-topk-prob --moe-router-pre-softmax --n-group 4", "leave this out."),
    ("--norm-topk-prob --moe-router-topk 1 --moe-router-pre-softmax", "which Megatron does not; leave it out."),
    ("--norm-topk-prob --moe-router-topk 1 --moe-router-score-function sigmoid", "Megatron does not; leave it out."),
    ("--norm-topk-prob --moe-expert-capacity-factor 1.5", "which Megatron does not; leave it out."),
    (
        "--moe-router-load-balancing-type softmax_topk --norm-topk-prob",
        "use --moe-router-load-balancing-type none without it for weights that sum to 1.",
    ),
    ("--moe-router-load-balancing-type softmax_topk --moe-router-topk-scaling-factor 2", "leave that out."),
    (
        "--moe-router-load-balancing-type softmax_topk --moe-router-enable-expert-bias",
        "with --moe-router-enable-expert-bias Megatron's router differs; leave that out.",
    ),
    ("--moe-router-load-balancing-type softmax_topk --n-group 4", "leave out --moe-router-num-groups."),
    ("--moe-router-load-balancing-type softmax_topk --moe-router-score-function sigmoid", "use softmax."),
    (
        "--moe-router-load-balancing-type none --seq-aux --moe-aux-loss-coeff 0.001",
        "use --moe-router-load-balancing-type seq_aux_loss.",
    ),
    ("--moe-token-dispatcher-type alltoall_seq --moe-expert-capacity-factor 1.5", "use alltoall."),
    ("--moe-model-type deepspeed_moe", "use megatron_moe."),
    ("--cp-attention-mask-type full", "use --attention-mask-type general, which takes the mask that is there."),
    ("--sparse-mode 9", "MindSpeed has no such mode; use 0 to 8."),
    (
        "--sparse-mode 6 --attention-mask-type causal",
        "--attention-mask-type causal says otherwise; leave out one of them.",
    ),
    ("--sparse-mode 4 --pre-tockens 16 --window-size 8,0", "--window-size 8,0 says otherwise; leave out one of them."),
    ("--sparse-mode 4 --pre-tockens -1", "it hides each token from itself; use 0 or more."),
    ("--sparse-mode 4 --next-tockens -1", "it hides each token from itself; use 0 or more."),
    ("--sliding-window -1", "it is a number of tokens before a query's own; use 0 or more."),
    ("--interleave-sliding-window 0", "a query sees its own token at least; use 1 or more."),
    ("--alibi-fusion-attn-type 1", "MindSpeed has 0 and 2; use one of them."),
    ("--rotary-base 10000.5", "Megatron takes whole numbers alone; use one."),
    ("--rotary-base=-1e6", "a rotary base is 1 or more; use a whole number."),
    ("--partial-rotary-factor nan", "it takes a number; give it one."),
    ("--partial-rotary-factor 1.5", "use a number above 0 and up to 1."),
    ("--partial-rotary-factor 0.5 --rotary-percent 0.5", "use --rotary-percent with both in one."),
    ("--partial-rotary-factor 0.5 --multi-latent-attention", "leave it out."),
    ("--rope-scaling-type longrope", "Megatron has no longrope scaling; use llama3 or yarn, or leave it out."),
    ("--rope-scaling-type yarn --rope-scaling-factor 4", "--yarn-original-max-position-embeddings."),
    (
        "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor 4 --beta-fast 16 "
        "--rope-scaling-original-max-position-embeddings 8192",
        "it needs --rope-scaling-original-max-position-embeddings 4096 --beta-fast 32.",
    ),
    ("--multi-latent-attention --rope-scaling-type yarn", "give --rope-scaling-factor."),
    (
        "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor -4 ",
        "--rope-scaling-factor has to be a number above 0; give it such a one.",
    ),
    (
        "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor 4 --beta-fast 32 "
        "--rope-scaling-beta-fast 16",
        "--beta-fast 32 and --rope-scaling-beta-fast 16 are two values of one thing; leave out one of them.",
    ),
    (
        "--multi-latent-attention --rope-scaling-type yarn --rope-scaling-factor 4 --yarn-scaling-factor 8",
        "leave out one of them.",
    ),
    (
        "--rope-scaling-type llama3 --rope-scaling-factor 32 --low-freq-factor 1 --high-freq-factor 4 "
        "--original-max-position-embeddings 8192",
        "it needs --rope-scaling-factor 8.",
    ),
    ("--tokenizer-type PretrainedFromHF", "it needs --tokenizer-name-or-path; give it."),
    ("--num-layer-list 1,2,3", "a number of layers for each of --pipeline-model-parallel-size 1; give them all."),
    (
        "--num-layer-list 2,2,2 --pipeline-model-parallel-size 2",
        "a number of layers for each of --pipeline-model-parallel-size 2; give them all.",
    ),
    ("--num-layer-list 1,1 --pipeline-model-parallel-size 2", "its sum is not --num-layers 6; give them all."),
    ("--num-layer-list ,", "it is a list of numbers of layers; give it as 4,4,3."),
    ("--num-layer-list 0,6 --pipeline-model-parallel-size 2", "give it as 4,4,3."),
    (
        "--num-layer-list 3,3 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "stages hold more; use --pipeline-model-parallel-layout.",
    ),
    (
        "--num-layer-list 1,2,3 --pipeline-model-parallel-size 3 --mtp-num-layers 1",
        "with --mtp-num-layers stages hold more; use --pipeline-model-parallel-layout.",
    ),
    ("--optimizer-selection fused_ema_adamw", "use --optimizer adam."),
    (
        "--moe-intermediate-size 96 --moe-ffn-hidden-size 64",
        "--moe-ffn-hidden-size 64 says otherwise; leave out one of them.",
    ),
    ("--shape-order NBSD", "MindSpeed has no such value; use SBH, BSH, BSND, BNSD."),
    ("--moe-intermediate-size many", "it takes a whole number; give it one."),
    ("--ema-decay", "it needs a value; give it one."),
    ("--data-path a b --use-fused-rmsnorm yes", "it takes no value; leave out yes."),
    ("--moe-intermediate-size 96 64", "it takes one value; leave out 64."),
]


def sample(record):
    """Words that give the flag, with a value that it takes."""
    return [record.name, *(record.choices[:1] or SAMPLES[record.values])]


def ends_well(blocker):
    """Whether a refusal names the flag first, and ends with a way out."""
    flag, _, reason = blocker.sentence.partition(": ")
    return flag.startswith(blocker.flag) and "; " in reason and reason.endswith(".")


def test_every_record_is_understood_by_this_release_s_parser(parser):
    misunderstood = []
    for record in FLAGS.values():
        found = examine([*MODEL, *sample(record)], parser)
        understood = found.args is not None and not any(" has this flag" in each.sentence for each in found.blockers)
        if record.name in parser._option_string_actions:
            assert (found.argv, found.findings) == ((*MODEL, *sample(record)), ()), "it is Megatron's"
            continue
        if record.rule is None:
            understood &= [each.disposition for each in found.findings] == [record.disposition]
        refused = [each for each in found.findings if each.disposition is Disposition.REFUSED]
        understood &= len(found.blockers) == len(refused) and all(map(ends_well, found.blockers))
        if not understood:
            misunderstood.append((record.name, found.findings, found.blockers))
    assert misunderstood == []


def test_every_value_is_refused_or_translated(parser):
    for record in VALUES:
        if record.values == "X" or record.values in (parser._option_string_actions[record.name].choices or ()):
            continue
        found = examine([*MODEL, record.name, record.values, "--tokenizer-name-or-path", "a"], parser)
        finding = found.findings[0]
        assert (finding.disposition, finding.flag) == (record.disposition, f"{record.name} {record.values}")
        assert all(map(ends_well, found.blockers))


@pytest.mark.parametrize(("theirs", "own"), TRANSLATED)
def test_translation_gives_the_arguments_of_megatron_s_spelling(parser, theirs, own):
    found = examine([*MODEL, *theirs.split()], parser)
    assert found.blockers == ()
    assert vars(found.args) == vars(parser.parse_args([*MODEL, *own.split()]))


def test_every_translation_is_tested_here():
    tested = {word.partition("=")[0] for theirs, _ in TRANSLATED for word in theirs.split() if word.startswith("--")}
    translated = {name for name, record in FLAGS.items() if record.disposition is Disposition.TRANSLATED}
    assert translated - tested == {"--use-partial-rope"}, "an older name of --use-glm-rope"
    tested_values = {(name, value) for theirs, _ in TRANSLATED for name, value in _pairs(theirs)}
    values = {(record.name, record.values) for record in VALUES if record.disposition is Disposition.TRANSLATED}
    assert values - tested_values == {("--rotary-base", "X")}


def _pairs(text):
    return list(itertools.pairwise(text.split()))


@pytest.mark.parametrize(("flags", "end"), DIFFERENT)
def test_what_is_not_the_same_is_refused(parser, flags, end):
    (blocker,) = examine([*MODEL, *flags.split()], parser).blockers
    assert blocker.sentence.endswith(end)
    assert ends_well(blocker) or "needs" in end


def test_a_flag_or_value_that_megatron_has_is_megatron_s():
    argv = ["--fix-router", "--moe-router-score-function", "sqrtsoftplus", "--seq-aux"]
    known = {"--fix-router": None, "--moe-router-score-function": ["softmax", "sqrtsoftplus"], "--seq-aux": None}
    assert translate(argv, known) == ((), tuple(argv))


def test_flags_that_change_nothing_share_one_line_and_translations_another(parser):
    flags = "--use-mc2 --reuse-fp32-param --use-mc2 --moe-intermediate-size 96 --jit-compile"
    assert notes(examine(flags.split(), parser).findings) == [
        "flags of MindSpeed's that change no result have no effect: --use-mc2, --reuse-fp32-param, --jit-compile.",
        "flags of MindSpeed's are taken as Megatron's: --moe-intermediate-size 96 as --moe-ffn-hidden-size 96.",
    ]


def test_flags_are_split_as_argparse_splits_them():
    argv = ["a", "--n", "-1", "-.5", "--list", "x", "y", "--n=3", "--new", "--text", "-a b", "--", "--n"]
    assert split_flags(argv, {"--n", "--list", "--text"}) == [
        Given("", ("a",), ("a",)),
        Given("--n", ("-1", "-.5"), ("--n", "-1", "-.5")),
        Given("--list", ("x", "y"), ("--list", "x", "y")),
        Given("--n", ("3",), ("--n=3",)),
        Given("--new", (), ("--new",)),
        Given("--text", ("-a b", "--", "--n"), ("--text", "-a b", "--", "--n")),
    ]


def test_no_flag_has_two_records():
    names = [record.name for section in SECTIONS.values() for record in section]
    assert len(names) == len(set(names))


def test_megatron_itself_has_none_of_these_flags_but_those_of_some_releases(megatron_arguments):
    unpatched = megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    of_some_releases = {"--use-flash-attn", *(record.name for record in OLDER)}
    assert {*FLAGS} & {*unpatched._option_string_actions} <= of_some_releases
