"""TransformerEngine's core attention, whose constructor compares the configuration with environment variables."""

import os
import sys
from types import SimpleNamespace

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches import attention
from mindspeed_cp.patches.defaults import TRANSFORMER_ENGINE, is_here
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks
from mindspeed_cp.patches.plugin import Plugin

CAUSAL = SimpleNamespace(name="causal")


class TEDotProductAttention:
    """A stand-in with the checks of Megatron's class of this name, the same in all supported releases."""

    def __init__(
        self,
        config,
        attn_mask_type=CAUSAL,
        attention_type="self",
        attention_dropout=0.0,
        softmax_scale=None,
        pg_collection=None,
    ):
        if config.apply_query_key_layer_scaling != bool(int(os.getenv("NVTE_APPLY_QK_LAYER_SCALING", "0"))):
            raise ValueError("apply_query_key_layer_scaling and NVTE_APPLY_QK_LAYER_SCALING must match")
        if config.deterministic_mode and int(os.getenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")) != 0:
            raise RuntimeError("deterministic_mode is on, but NVTE_ALLOW_NONDETERMINISTIC_ALGO is not 0")
        self.config = config


def build(context_parallel_size, **options):
    """A layer, constructed through the function of the patch; the configuration stays as the caller gave it."""
    plugin = Plugin(ContextParallelConfig(context_parallel_size=context_parallel_size))
    plugin.groups_over = lambda group: "groups"
    patches = {patch.target: patch for patch in attention.attention_patches(plugin)}
    values = {
        "context_parallel_size": context_parallel_size,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "tensor_model_parallel_size": 1,
        "kv_channels": 8,
        "apply_query_key_layer_scaling": False,
        "deterministic_mode": False,
        **options,
    }
    layer, config = TEDotProductAttention.__new__(TEDotProductAttention), SimpleNamespace(**values)
    wrapped = patches[f"{attention.TE_ATTENTION}.__init__"].in_place_of(TEDotProductAttention.__init__)
    wrapped(layer, config, pg_collection=SimpleNamespace(cp="ranks"))
    assert layer.config is config and vars(config) == values
    return layer


@pytest.mark.parametrize(
    ("number", "is_dynamic", "said"),
    [
        (4, True, "with --hybrid-context-parallel on 4 ranks: .*; leave out --hybrid-context-parallel."),
        (4, False, "with --context-parallel-size 4: .*; use --context-parallel-size 1."),
    ],
)
def test_cross_attention_is_refused_beside_the_flag_that_was_given_with_its_own_way_out(number, is_dynamic, said):
    config = ContextParallelConfig(context_parallel_size=number)
    plugin = Plugin(dynamic=DynamicRanks(config)) if is_dynamic else Plugin(config)
    plugin.groups_over = lambda group: "groups"
    init = attention.attention_patches(plugin)[-2]
    assert init.target == f"{attention.TE_ATTENTION}.__init__"
    sizes = {"num_attention_heads": 4, "num_query_groups": 4, "tensor_model_parallel_size": 1}
    layer_config = SimpleNamespace(context_parallel_size=1 if is_dynamic else number, **sizes)
    with pytest.raises(ConfigurationError, match=f"^a layer of attention type 'cross' {said}$"):
        init.in_place_of(TEDotProductAttention.__init__)(
            None, layer_config, attention_type="cross", pg_collection=SimpleNamespace(cp="ranks")
        )


def test_an_engine_whose_part_for_torch_does_not_load_is_none_for_patches_and_defaults(monkeypatch, tmp_path):
    for name, source in (("__init__", ""), ("pytorch", "raise ImportError('a library of CUDA is missing')")):
        (package := tmp_path / "transformer_engine").mkdir(exist_ok=True)
        (package / f"{name}.py").write_text(source)
    for name in [each for each in sys.modules if each.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # Whatever is imported now is gone after the test.
    del sys.modules["transformer_engine"]
    monkeypatch.syspath_prepend(tmp_path)
    skipped = {patch.target: patch.skip_reason() for patch in attention.attention_patches(Plugin())}
    assert skipped[f"{attention.TE_ATTENTION}.forward"] == "transformer_engine.pytorch cannot be imported"
    assert skipped[f"{attention.LOCAL_ATTENTION}.forward"] is None
    assert not is_here(TRANSFORMER_ENGINE)


CASES = [
    ({"deterministic_mode": True}, None),
    ({"apply_query_key_layer_scaling": True}, None),
    ({"apply_query_key_layer_scaling": False}, "1"),
]


@pytest.mark.parametrize(("options", "variable"), CASES)
def test_variables_of_kernels_that_do_not_run_refuse_no_layer(monkeypatch, options, variable):
    monkeypatch.setattr(attention, "build_attention", lambda config, groups, **options: groups)
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    monkeypatch.delenv("NVTE_APPLY_QK_LAYER_SCALING", raising=False)
    if variable is not None:
        monkeypatch.setenv("NVTE_APPLY_QK_LAYER_SCALING", variable)
    assert build(2, **options).context_parallel_attention.scale == pytest.approx(8**-0.5)
    with pytest.raises((ValueError, RuntimeError), match="NVTE_"):
        build(1, **options)
