"""--fix-sub-seq-length: documents of one length in the masks of Megatron's data sets."""

from importlib.util import find_spec

import pytest
import torch

from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.documents import document_patches, note_documents
from mindspeed_cp.patches.plugin import Plugin
from mindspeed_cp.patching import PatchRegistry

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

END = 9
TOKENS = torch.tensor([1, 2, END, 3, 4, 5, 6])


def visible(documents):
    """Who sees whom, causally, among tokens of these documents."""
    document = torch.tensor(documents)
    return torch.ones(len(document), len(document)).tril().bool() & (document[:, None] == document)


@pytest.fixture
def make(adaptor):
    """Megatron's masks, loss mask and positions of TOKENS with documents of this length."""
    from megatron.core.datasets import gpt_dataset

    def make(length, *, reset=True, create=True):
        with PatchRegistry(document_patches(Plugin(document_rule=DocumentRule(length=length)))).applied():
            return gpt_dataset._get_ltor_masks_and_position_ids(TOKENS, END, True, reset, False, create)

    return make


@pytest.mark.parametrize(
    ("length", "documents"),
    [(None, [0, 0, 0, 1, 1, 1, 1]), (2, [0, 0, 1, 1, 2, 2, 3]), (5, [0, 0, 0, 0, 0, 1, 1])],
)
def test_documents_of_one_length_take_the_place_of_the_data_s(make, length, documents):
    mask, _, positions = make(length)
    assert (~mask[0]).equal(visible(documents))
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3], "positions follow the tokens that end a document"


def test_masks_that_are_not_asked_for_are_not_made(make):
    assert make(2, create=False)[0] is None
    assert (~make(2, reset=False)[0][0]).equal(visible([0] * 7))


@pytest.mark.parametrize(("size", "noted"), [(1, None), (4, [[0, 3, 7]])])
def test_documents_are_noted_for_context_parallel_layers_alone(size, noted):
    plugin = Plugin(
        ContextParallelConfig(context_parallel_size=size), document_rule=DocumentRule(), end_of_document=END
    )
    note_documents(plugin, {"tokens": TOKENS[None], "position_ids": None})
    found = plugin.stages.at_hand
    assert (None if found is None else found.tolist()) == noted
