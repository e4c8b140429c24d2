"""The emulated ops as a kernel finds them: the module, the registry, old and new schemas, the record of calls."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from unit_tests.emulated_npu import fake_torch_npu

OPS = ("npu_fusion_attention", "npu_fusion_attention_grad", "npu_ring_attention_update")


def argument_names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.npu, op).default._schema.arguments]


def attend(**changed: object) -> tuple:
    x = torch.ones(1, 2, 3, 4)
    return torch.ops.npu.npu_fusion_attention(x, x, x, 2, "BNSD", **changed)


def test_ops_are_there_within_the_context_only():
    for _ in range(2):
        with fake_torch_npu():
            module = importlib.import_module("torch_npu")
            assert importlib.util.find_spec("torch_npu") is not None
            assert all(getattr(module, op) is getattr(torch.ops.npu, op) for op in OPS)
            assert len(attend()) == 7
        assert "torch_npu" not in sys.modules
        assert not any(hasattr(torch.ops.npu, op) for op in OPS)


def test_context_that_fails_leaves_nothing_behind():
    with pytest.raises(KeyError), fake_torch_npu():
        raise KeyError
    assert "torch_npu" not in sys.modules
    assert not any(hasattr(torch.ops.npu, op) for op in OPS)


def test_context_puts_back_the_module_that_was_there(monkeypatch):
    real = ModuleType("torch_npu")
    monkeypatch.setitem(sys.modules, "torch_npu", real)
    with fake_torch_npu():
        assert sys.modules["torch_npu"] is not real
    assert sys.modules["torch_npu"] is real


def test_schemas_of_a_new_build_name_everything():
    with fake_torch_npu():
        assert argument_names("npu_fusion_attention") == [
            *("query", "key", "value", "head_num", "input_layout", "pse", "padding_mask", "atten_mask", "scale"),
            *("keep_prob", "pre_tockens", "next_tockens", "inner_precise", "prefix", "actual_seq_qlen"),
            *("actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync", "softmax_layout", "sink"),
            *("dropout_mask", "seed", "offset"),
        ]
        assert argument_names("npu_fusion_attention_grad") == [
            *("query", "key", "value", "dy", "head_num", "input_layout", "pse", "padding_mask", "atten_mask"),
            *("softmax_max", "softmax_sum", "softmax_in", "attention_in", "scale_value", "keep_prob"),
            *("pre_tockens", "next_tockens", "inner_precise", "seed", "offset", "numels", "prefix"),
            *("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync", "softmax_layout"),
            "sink",
        ]


def test_schemas_of_an_old_build_lack_what_came_later():
    with fake_torch_npu():
        new = {op: argument_names(op) for op in OPS[:2]}
    with fake_torch_npu(old_schemas=True):
        later = [name for name in new[OPS[0]] if name not in argument_names(OPS[0])]
        assert later == ["softmax_layout", "sink", "dropout_mask", "seed", "offset"]
        assert argument_names(OPS[1]) == [name for name in new[OPS[1]] if name not in ("softmax_layout", "sink")]
        with pytest.raises(RuntimeError, match="softmax_layout"):
            attend(softmax_layout="")


@pytest.mark.parametrize(("old_schemas", "num_gradients"), [(True, 4), (False, 5)])
def test_gradients_come_with_unused_ones_whose_number_grew(old_schemas, num_gradients):
    with fake_torch_npu(old_schemas=old_schemas):
        out, softmax_max, softmax_sum, softmax_out, *numbers = attend()
        gradients = torch.ops.npu.npu_fusion_attention_grad(
            *[out] * 4, 2, "BNSD", softmax_max=softmax_max, softmax_sum=softmax_sum, attention_in=out
        )
    assert (softmax_out.shape, numbers) == ((0,), [0, 0, 2 * 3 * 3])
    assert [x.shape for x in gradients] == [out.shape] * 3 + [(0,)] * (num_gradients - 3)


def test_ring_update_can_be_missing():
    with fake_torch_npu(ring_update=False):
        assert not hasattr(importlib.import_module("torch_npu"), "npu_ring_attention_update")
        assert not hasattr(torch.ops.npu, "npu_ring_attention_update")
        attend()


@pytest.mark.parametrize("old_schemas", [True, False])
def test_calls_are_recorded_with_every_argument_of_the_schema(old_schemas):
    with fake_torch_npu(old_schemas=old_schemas) as calls:
        attend(scale=0.5)
        attend(inner_precise=2)
        names = argument_names("npu_fusion_attention")
    assert [call.op for call in calls] == ["npu_fusion_attention"] * 2
    assert [list(call.arguments) for call in calls] == [names] * 2
    assert [call.arguments["scale"] for call in calls] == [0.5, 1.0]
    assert [call.arguments["inner_precise"] for call in calls] == [0, 2]
    assert calls[0].arguments["head_num"] == 2
    assert calls[0].arguments["query"].shape == (1, 2, 3, 4)


@pytest.mark.parametrize("misspelt", ["pre_tokens", "next_tokens", "scale_value", "atten_msk"])
def test_arguments_are_known_by_the_names_of_the_schema_only(misspelt):
    with fake_torch_npu(), pytest.raises(RuntimeError, match=misspelt):
        attend(**{misspelt: 1})


def test_settings_of_the_gradient_are_keyword_only():
    with fake_torch_npu(), pytest.raises(RuntimeError, match="positional"):
        torch.ops.npu.npu_fusion_attention_grad(*[torch.ones(1, 2, 3, 4)] * 4, 2, "BNSD", None)


def test_lengths_of_sequences_are_no_tensors():
    with fake_torch_npu(), pytest.raises(RuntimeError, match="actual_seq_qlen"):
        attend(actual_seq_qlen=torch.tensor([1, 2]))
