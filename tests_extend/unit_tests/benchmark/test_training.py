"""The training benchmark: what it reads out of a log, what fits, and a run of it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mindspeed_cp.benchmark.training import Measurement, configurations, longest_that_fit, seconds_in, table
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.topology import CPTopology

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_training.py"
LOG = " iteration {i}/ 4 | consumed samples: 1 | elapsed time per iteration (ms): {ms} | lm loss: 7.0 |\n"
MEASURED = [
    Measurement("CP 1", 64, 0.5, 110.0),
    Measurement("CP 1", 128, 2.0, 150.0),
    Measurement("ring", 64, 0.25, 101.0),
    Measurement("ring", 128, 0.5, 110.0),
]
START = {"CP 1": 100.0, "ring": 100.0}


def test_time_of_an_iteration_is_the_median_after_the_first():
    log = "".join(LOG.format(i=i, ms=ms) for i, ms in enumerate([9000.0, 300.0, 100.0, 200.0], start=1))
    assert seconds_in(log) == 0.2


def test_a_log_of_one_iteration_has_no_time():
    with pytest.raises(ValueError, match="no second iteration"):
        seconds_in(LOG.format(i=1, ms=9000.0))


@pytest.mark.parametrize(("mib", "longest"), [(5, (0, 64)), (10, (64, 128)), (49.9, (64, 128)), (50, (128, 128))])
def test_the_longest_sequence_that_fits_is_that_of_memory_above_the_start(mib, longest):
    assert longest_that_fit(MEASURED, START, mib) == dict(zip(START, longest, strict=True))


def test_table_has_a_row_for_each_configuration_and_a_dash_where_nothing_was_tried():
    assert table([*MEASURED[:1], *MEASURED[2:]], START, 10).splitlines() == [
        "|  | 64 tokens | 128 tokens | longest in 10 MiB |",
        "| --- | --- | --- | --- |",
        "| CP 1 | 128 tokens/s, 10 MiB | - | 64 |",
        "| ring | 256 tokens/s, 1 MiB | 256 tokens/s, 10 MiB | 128 |",
    ]


def test_every_algorithm_is_measured_and_each_has_the_topology_of_its_name():
    parallel = [one for one in configurations(4) if one.ranks == 4]
    assert [(one.name, _config(one.flags).topology) for one in parallel] == [
        ("Ulysses, CP 4", CPTopology(ulysses=4)),
        ("ring, CP 4", CPTopology(inner=4)),
        ("ring, overlap, CP 4", CPTopology(inner=4)),
        ("double ring, CP 4", CPTopology(outer=2, inner=2)),
        ("hybrid, CP 4", CPTopology(inner=2, ulysses=2)),
    ]
    assert [_config(one.flags).use_cp_send_recv_overlap for one in parallel] == [False, False, True, False, False]


def _config(flags: tuple[str, ...]) -> ContextParallelConfig:
    values: dict[str, object] = {}
    for name, value in zip(flags, (*flags[1:], "--"), strict=True):
        if name.startswith("--"):
            parsed = True if value.startswith("--") else int(value) if value.isdigit() else value
            values[name.removeprefix("--").replace("-", "_")] = parsed
    return ContextParallelConfig(**values)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_benchmark_trains_prints_and_draws(tmp_path):
    lines, image = tmp_path / "lines.jsonl", tmp_path / "picture.png"
    names = ["CP 1"]  # What the others add is in the flags that are checked above.
    options = ["--tokens", "64", "--iterations", "2", "--layers", "1", "--hidden-size", "32", "--only", *names]
    command = [sys.executable, str(SCRIPT), *options, "--json", str(lines), "--plot", str(image)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["configuration"] for one in measured] == names
    assert all(one["seconds_per_iteration"] > 0 and one["peak_mib"] > 100 for one in measured)
    assert len(run.stdout.splitlines()) == 2 + len(measured)
    assert image.read_bytes().startswith(b"\x89PNG")
