"""Rows of packed data, windows, sinks and dropout: the losses of CP = 1, and none passes over a planted mistake.

Each with one algorithm and one mistake, for a sample. The whole table is a command of its own:
python tests_extend/data_table.py.
"""

from importlib.util import find_spec

import pytest

from system_tests.data_cases import DATA_ROWS, SEEN, STREAM_ROWS, runs_of
from system_tests.model_cases import MOST
from system_tests.planted_cases import PLANTED
from system_tests.training_cases import HAS_TRAINING, READS_CONVERSATIONS

pytestmark = [
    pytest.mark.skipif(not HAS_TRAINING, reason="megatron.training is not installed"),
    pytest.mark.slow,
]
ROWS = DATA_ROWS | STREAM_ROWS


def test_sample_plants_every_mistake():
    assert {row.sample[1] for row in ROWS.values()} == PLANTED.keys()
    assert all(row.sample[1] in row.notices for row in ROWS.values())


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS)
def test_row_has_the_losses_of_cp_1_and_notices_a_mistake(training, name, row):
    if "conversations" in name and not READS_CONVERSATIONS:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout, whose script reads conversations")
    if "reinforcement" in name and find_spec("megatron.rl") is None:
        pytest.skip("MEGATRON_LM names no Megatron-LM checkout, whose packer makes them")
    runs = runs_of(training, name)
    algorithm, mistake = row.sample
    right, wrong = runs.difference(algorithm), runs.difference(algorithm, mistake)
    assert right.within(MOST), right
    assert wrong.losses > SEEN, "nobody would notice"
