"""What kernels are asked when the arguments are parsed: all that the flags ask of attention."""

import shlex

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.kernels import KERNELS, Term, Window
from mindspeed_cp.patches import kernel_forecast
from mindspeed_cp.patches.kernel_forecast import check_kernels, kernel_notes
from unit_tests.argument_cases import CP4, config_from_arguments, refusal_of
from unit_tests.argument_cases import MODEL as ON_ONE_RANK

MODEL = shlex.split("--num-attention-heads 8 --hidden-size 512 --seq-length 64 --context-parallel-size 4 --bf16")
LAYER = [*CP4, "--hidden-size", "512", "--bf16"]
RING = ContextParallelConfig(context_parallel_size=4, context_parallel_algo="megatron_cp_algo")


class Asked:
    """A kernel that computes everything but one kind of case, and remembers what it was asked."""

    name = "asked"

    def __init__(self, refuses=lambda case: False):
        self.cases, self._refuses = [], refuses

    def unsupported_reasons(self, case):
        self.cases.append(case)
        return ["takes no such case"] if self._refuses(case) else []


@pytest.fixture
def asking(parser, monkeypatch):
    """Asks a kernel what flags make of attention."""

    def ask(kernel, *flags, config=RING):
        monkeypatch.setattr(kernel_forecast, "KERNELS", type(KERNELS)((kernel,)))
        check_kernels(parser.parse_args([*MODEL, *flags]), config, "cpu")
        return kernel.cases

    return ask


@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        ([], {Window(None, 0), Window()}),
        (["--window-size", "3,0"], {Window(3, 0), Window(0, None)}),
        (["--window-size", "3,0", "--window-attn-skip-freq", "2"], {Window(3, 0), Window(None, 0), Window()}),
    ],
)
def test_windows_of_all_kinds_of_layers_are_asked_about(asking, flags, windows):
    assert windows <= {case.window for case in asking(Asked(), "--attention-dropout", "0", *flags)}


def test_a_kernel_that_cannot_compute_a_window_s_tiles_is_refused_when_the_flags_are_parsed(asking):
    # Others cut a window into rectangles and triangles, which are small.
    large = Asked(lambda case: case.window.left is not None or case.num_queries < 8)
    asking(large, "--attention-dropout", "0")
    with pytest.raises(ConfigurationError, match=r"not asked: takes no such case\nName another kernel as well"):
        asking(large, "--attention-dropout", "0", "--window-size", "3,0")


def test_kernels_are_asked_whichever_of_its_two_names_the_length_has(parser, monkeypatch):
    kernel = Asked()
    monkeypatch.setattr(kernel_forecast, "KERNELS", type(KERNELS)((kernel,)))
    named = ["--encoder-seq-length" if word == "--seq-length" else word for word in MODEL]
    check_kernels(parser.parse_args(named), RING, "cpu")
    assert kernel.cases != []


def test_dropout_is_asked_about_and_the_way_out_is_a_flag(asking):
    dry = Asked(lambda case: Term.DROPOUT in case.terms)
    with pytest.raises(ConfigurationError, match=r"the reference kernel drops alike.*or use --attention-dropout 0"):
        asking(dry, "--attention-dropout", "0.1")


def test_a_band_that_looks_ahead_is_asked_about_with_alibi(asking):
    config = ContextParallelConfig(context_parallel_size=4, context_parallel_algo="megatron_cp_algo", use_alibi=True)
    ahead = [case.terms for case in asking(Asked(), "--window-size", "3,2", config=config)]
    assert all({Term.ALIBI, Term.ALIBI_AHEAD} <= terms for terms in ahead)
    causal = [case.terms for case in asking(Asked(), config=config)]
    assert all(Term.ALIBI in terms and Term.ALIBI_AHEAD not in terms for terms in causal)


@pytest.mark.usefixtures("ampere_machine")
def test_an_accelerator_without_a_kernel_of_its_own_is_said(parser, monkeypatch):
    monkeypatch.setattr("mindspeed_cp.patches.kernel_forecast.KERNELS", KERNELS.only(["cpu_flash", "reference"]))
    args = parser.parse_args([*LAYER, "--context-parallel-algo", "megatron_cp_algo"])
    for note in (notes := kernel_notes(args, config_from_arguments(args), "cuda")):
        assert note.startswith(
            "attention runs the reference kernel, which is exact, but slow, and holds all scores of a block"
        )
        assert "not cpu_flash: runs on the CPU, not on cuda" in note
    assert len(notes) == 2, "a causal block and a full one"
    assert kernel_notes(args, config_from_arguments(args), "cpu") == []


@pytest.mark.usefixtures("ampere_machine")
def test_latent_attention_is_asked_about_with_its_own_head_sizes(parser):
    latent = ["--multi-latent-attention", "--qk-head-dim", "16", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "12"]
    args = parser.parse_args([*LAYER, *latent, "--context-parallel-kernels", "cpu_flash"])
    assert " heads of 24 (values 12), bfloat16, cuda 8.0" in refusal_of(config_from_arguments, args)


@pytest.mark.usefixtures("ampere_machine")
def test_no_note_about_a_kernel_that_the_user_named_or_on_one_rank(parser):
    args = parser.parse_args([*LAYER, "--context-parallel-kernels", "reference"])
    assert kernel_notes(args, config_from_arguments(args), "cuda") == []
    args = parser.parse_args([*ON_ONE_RANK, "--hidden-size", "512"])
    assert kernel_notes(args, config_from_arguments(args), "cuda") == []


@pytest.mark.usefixtures("ampere_machine")
def test_named_kernels_that_cannot_compute_the_model_are_refused_with_their_reasons(parser):
    args = parser.parse_args([*LAYER, "--context-parallel-kernels", "cpu_flash"])
    refusal = refusal_of(config_from_arguments, args)
    assert refusal.startswith(
        "--context-parallel-kernels cpu_flash: no attention kernel can compute causal attention of "
    )
    assert "\n  not cpu_flash: runs on the CPU, not on cuda\n" in refusal
    assert refusal.endswith("Name another kernel as well, or leave the flag out.")
