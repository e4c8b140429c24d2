"""Each kind of data and of attention that flags ask for, once with every release of Megatron that has it.

Before Megatron 0.19 --sft needs Megatron-LM's own training script: MEGATRON_LM names a checkout.
"""

import shlex
from typing import NamedTuple

import pytest

from system_tests.compare_losses import ITERATION, largest_difference, losses_in
from system_tests.model_cases import ALGORITHMS
from system_tests.training_cases import HAS_TRAINING, ITERATIONS, MODEL_FLAGS, READS_CONVERSATIONS

pytestmark = [
    pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed"),
    pytest.mark.slow,
    pytest.mark.every_release,
]


class Kind(NamedTuple):
    """What flags ask for, and the algorithm that it is tried on; all others are tried with one release."""

    flags: str
    algorithm: str


KINDS = {
    "documents": Kind("--reset-position-ids --reset-attention-mask --eod-mask-loss", "hybrid"),
    "windows": Kind("--window-size 8,0 --window-attn-skip-freq 2", "double ring"),
    "learnable sinks": Kind("--softmax-type learnable --window-size 8,0", "Ulysses"),
    "conversations": Kind("--sft --data-path made_up --no-create-attention-mask-in-dataloader", "ring"),
    "inter-document masking": Kind("--dataloader-inter-document-masking", "ring"),
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items(), ids=KINDS)
def test_kind_has_the_losses_of_cp_1(training, record_property, name, kind):
    first, *rest = shlex.split(kind.flags)
    if first == "--sft" and not READS_CONVERSATIONS:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout")
    if first not in flags_of_this_release():
        pytest.skip(f"this release of Megatron has no {first}")
    data = [] if "--data-path" in rest else ["--mock-data"]
    flags = [*(flag for flag in MODEL_FLAGS if flag != "--mock-data"), *data, first, *rest]
    alone, shared = (
        losses_in(training.log(*run), ITERATION) for run in ((1, flags), (4, [*flags, *ALGORITHMS[kind.algorithm]]))
    )
    difference = largest_difference(alone, shared)
    record_property("check", f"{name}, CP 4")
    record_property("algorithm", kind.algorithm.lower())
    record_property("result", f"{shared[ITERATIONS]:.5f} {difference:.0e}")
    assert len(alone) == ITERATIONS
    assert difference <= 1e-5


def flags_of_this_release() -> set[str]:
    """Those of Megatron's parser."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    return {*add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions}
