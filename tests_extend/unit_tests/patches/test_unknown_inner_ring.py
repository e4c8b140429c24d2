"""An inner ring of a size that is not known: rules that do not read it are checked, and nothing is said of the ring."""

from importlib.util import find_spec

import pytest

from mindspeed_cp.patches.arguments import examine_command_line, notes_on_command_line

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --max-position-embeddings 64 --attention-dropout 0"
RING = "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --micro-batch-size 1"


@pytest.fixture
def examined(parser, monkeypatch):
    """The blockers of a command line whose --cp-window-size is not known, and what would be said at its start."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def examine_text(text):
        found = examine_command_line(text.split(), parser, unknown={"cp_window_size"})
        notes = notes_on_command_line(found, text.split(), parser)
        return [blocker.flag for blocker in found.blockers], notes

    return examine_text


def test_rules_that_do_not_read_it_are_checked(examined):
    blockers, _ = examined(f"{MODEL} {RING} --seq-length 3")
    assert blockers == ["--seq-length"]


def test_nothing_is_said_of_a_ring_that_is_not_known(examined):
    blockers, notes = examined(f"{MODEL} {RING} --seq-length 64 --cp-comm-type p2p --fix-sub-seq-length 8")
    assert blockers == []
    assert not any(note.startswith("mindspeed_cp: context parallel size") for note in notes)
    assert any("--fix-sub-seq-length 8 has no effect" in note for note in notes)
