"""Of every field of Megatron's layers it is said what becomes of it: a release that has a new one is looked at."""

import ast
import inspect
from importlib.util import find_spec

import pytest

from mindspeed_cp.patches.unsupported import _DIFFERENCES, _REFUSALS
from unit_tests.patches import transformer_fields as fields

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def fields_of_this_release():
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return {*MLATransformerConfig.__dataclass_fields__}


def test_every_field_is_known():
    beside = (fields.REFUSED, fields.NOTED, fields.OUTRANKED, fields.HANDED_DOWN, fields.ELSEWHERE)
    known = set().union(fields.COMPUTED, fields.WITHOUT_EFFECT, fields.BY_MEGATRON, *beside)
    assert fields_of_this_release() - known == set(), "what becomes of it beside context parallelism?"


def test_all_that_the_core_attention_reads_is_computed_or_needs_no_computing():
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    tree = ast.parse(inspect.getsource(DotProductAttention))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ends_in_config(node.value)}
    read = names & fields_of_this_release()
    assert "softmax_type" in read
    assert read - fields.COMPUTED - fields.WITHOUT_EFFECT.keys() - fields.BY_MEGATRON == set()


def ends_in_config(node):
    return "config" in (getattr(node, "id", None), getattr(node, "attr", None))


def test_what_is_refused_or_noted_is_in_the_tables_of_these():
    own = fields_of_this_release()
    assert {refusal.option for refusal in _REFUSALS} & own == fields.REFUSED & own
    assert {difference.option for difference in _DIFFERENCES} & own == fields.NOTED & own
