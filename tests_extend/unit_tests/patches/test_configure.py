"""The way in for programs on megatron.core without an argument parser."""

from importlib.util import find_spec

import pytest

from mindspeed_cp.config import ConfigurationError, ContextParallelConfig
from mindspeed_cp.patches.document_rule import DocumentRule

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture
def plugin(adaptor, monkeypatch):
    """The adaptor's state, empty, on a machine with a GPU as far as anybody can tell."""
    monkeypatch.setattr("mindspeed_cp.patches.rules.accelerator", lambda: "cuda")
    monkeypatch.setattr(adaptor.plugin, "config", None)
    return adaptor.plugin


def test_configure_sets_what_the_flags_set(adaptor, plugin):
    config = adaptor.configure(context_parallel_size=4, context_parallel_algo="megatron_cp_algo", cp_window_size=2)
    assert plugin.config is config
    assert config == ContextParallelConfig(
        context_parallel_size=4, context_parallel_algo="megatron_cp_algo", cp_window_size=2
    )


def test_configure_forgets_the_documents_of_earlier_arguments(adaptor, plugin, monkeypatch):
    monkeypatch.setattr(plugin, "document_rule", DocumentRule())
    monkeypatch.setattr(plugin, "apart_by", "--reset-attention-mask")
    adaptor.configure(context_parallel_size=4)
    assert (plugin.document_rule, plugin.apart_by) == (None, None)


def test_configure_says_how_streams_are_dealt_and_refuses_what_it_does_not_know(adaptor, plugin):
    adaptor.configure(context_parallel_size=4, packed_sequence_layout="balanced")
    assert plugin.packing.layout == "balanced"
    with pytest.raises(ConfigurationError, match="knows no fix_sub_seq_length; of the flags it takes context_parallel"):
        adaptor.configure(context_parallel_size=4, fix_sub_seq_length=8)


def test_configure_refuses_a_layout_that_is_none_before_there_is_a_stream(adaptor, plugin):
    with pytest.raises(ConfigurationError, match="packed_sequence_layout='zigzg' is unknown; give contiguous, zigzag"):
        adaptor.configure(context_parallel_size=4, packed_sequence_layout="zigzg")
    assert plugin.config is None


def test_configure_checks_the_rules(adaptor, plugin):
    with pytest.raises(ConfigurationError, match="--cp-window-size 3 does not divide the ring of 4 ranks"):
        adaptor.configure(context_parallel_size=4, context_parallel_algo="megatron_cp_algo", cp_window_size=3)
    assert plugin.config is None


def test_configure_says_what_has_no_effect(adaptor, plugin):
    with pytest.warns(UserWarning, match="--cp-window-size has no effect"):
        adaptor.configure(context_parallel_size=4, cp_window_size=2)


def test_configure_without_an_accelerator_needs_gloo(adaptor, plugin, monkeypatch):
    monkeypatch.setattr("mindspeed_cp.patches.rules.accelerator", lambda: None)
    with pytest.raises(ConfigurationError, match="use --distributed-backend gloo to train on the CPU"):
        adaptor.configure(context_parallel_size=4)


def test_groups_without_a_configuration_are_refused(adaptor, plugin):
    from megatron.core import parallel_state

    with adaptor.registry.applied(), pytest.raises(ConfigurationError, match="before mindspeed_cp was configured"):
        parallel_state.initialize_model_parallel(context_parallel_size=2)


def test_groups_of_another_size_are_refused(adaptor, plugin):
    from megatron.core import parallel_state

    adaptor.configure(context_parallel_size=4)
    with adaptor.registry.applied(), pytest.raises(ConfigurationError, match="with context_parallel_size=4; give both"):
        parallel_state.initialize_model_parallel(context_parallel_size=2)
