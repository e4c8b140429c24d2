"""MindSpeed's flags of who sees whom: what is computed, and what is said where that is not what MindSpeed computes."""

from importlib.util import find_spec

import pytest

from mindspeed_cp.patches.command_line import examine
from mindspeed_cp.patches.mindspeed.translate import notes

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

FLASH = "--use-flash-attn"
RING = "--context-parallel-size 2"

# Flags beside --seq-length 64, the window that layers have, and the flags of which a line says that something else is
# computed than MindSpeed would or than they promise.
WINDOWS = [
    ("--sparse-mode 4", None, []),
    ("--sparse-mode 4 --pre-tockens 63", None, []),
    ("--sparse-mode 4 --pre-tockens 62", (62, 0), ["--sparse-mode"]),
    (f"--sparse-mode 4 --next-tockens 2 {RING}", (1048576, 2), ["--sparse-mode"]),
    (f"--pre-tockens 16 --next-tockens 2 --sparse-mode 4 {FLASH}", (16, 2), ["--sparse-mode"]),
    *((f"--sparse-mode {mode} --pre-tockens 16", None, ["--pre-tockens"]) for mode in (1, 2, 3, 7, 8)),
    ("--sparse-mode 0 --pre-tockens 16 --next-tockens 2", (16, 2), []),
    (f"--pre-tockens 16 {FLASH}", None, ["--pre-tockens"]),
    (f"--pre-tockens 16 {RING}", None, ["--pre-tockens"]),
    (f"--pre-tockens 63 --next-tockens 2 {FLASH}", None, []),
    (f"--next-tockens -1 {FLASH}", None, ["--next-tockens"]),
    ("--sliding-window 64", None, []),
    ("--sliding-window 63", (63, 0), []),
    ("--sliding-window 8 --sparse-mode 4 --pre-tockens 16", (8, 0), []),
    ("--interleave-sliding-window 8", (7, 0), ["--interleave-sliding-window"]),
]

# The same of the bias by distance: whether scores fall with the distance.
ALIBI = "--position-embedding-type alibi"
BIASES = [
    (f"{ALIBI} --alibi-fusion-attn-type 2", True, []),
    (f"{ALIBI} --square-alibi-mask --fill-neg-inf", True, ["--position-embedding-type"]),
    (f"{ALIBI} --alibi-fusion-attn-type 0 --alibi-diagonal-opposite", True, []),
    (
        f"{ALIBI} --alibi-fusion-attn-type 0 --alibi-diagonal-opposite --attention-mask-type general",
        True,
        ["--alibi-diagonal-opposite"],
    ),
    ("--alibi-fusion-attn-type 2", False, ["--alibi-fusion-attn-type"]),
]
OTHERS = [
    ("--sparse-mode 5", ["--sparse-mode"]),
    ("--context-parallel-algo adaptive_cp_algo --attention-mask-on-cpu", []),
    (
        "--context-parallel-algo adaptive_cp_algo --adaptive-cp-manually-set-mask-list",
        ["--adaptive-cp-manually-set-mask-list"],
    ),
]


def differing(found):
    """The flags of which a line of their own says that something else is computed."""
    said = [each.partition(":")[0].split()[0] for each in notes(found.findings) if not each.startswith("flags of ")]
    assert said == [each.flag.split()[0] for each in found.findings if each.differs]
    return said


@pytest.mark.parametrize(("flags", "window", "said"), WINDOWS)
def test_window_is_the_operator_s_band_where_it_is_read_and_said_where_mindspeed_leaves_it_out(
    parser, flags, window, said
):
    found = examine(["--seq-length", "64", *flags.split()], parser)
    assert found.blockers == ()
    assert found.args.window_size == window
    assert differing(found) == said


@pytest.mark.parametrize(("flags", "has_alibi", "said"), BIASES)
def test_alibi_takes_the_place_of_position_embeddings_and_says_what_is_not_mindspeed_s(parser, flags, has_alibi, said):
    found = examine(flags.split(), parser)
    assert found.blockers == ()
    assert (found.args.use_alibi, found.args.position_embedding_type == "none") == (has_alibi, has_alibi)
    assert differing(found) == said


@pytest.mark.parametrize(("flags", "said"), OTHERS)
def test_prefixes_and_masks_set_by_hand_say_whose_mask_it_is(parser, flags, said):
    found = examine(flags.split(), parser)
    assert found.blockers == ()
    assert differing(found) == said
