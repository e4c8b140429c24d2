"""The benchmark of training on packed documents and under windows runs every way that it compares."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_packed_training.py"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "ways"), [("documents", 5), ("windows", 2)])
def test_every_way_has_a_speed(training, what, ways):
    words = [str(SCRIPT), what, "--tokens", "256", "--iterations", "1", "--gflops", "1000"]
    source = f"import runpy, sys\nsys.argv = {words}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    first, *others = training.run_program(4, source)
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == ways
    assert all(float(speed) > 0 for _, speed, *_ in rows)
    # Of the way that others are compared with first, and how much of a step is attention.
    assert rows[0][2] == "1.00 (1.00)"
    assert all(0 < int(share.rstrip("% |")) <= 100 for *_, share in rows)
    assert not any(line.startswith("| ") for other in others for line in other.splitlines())
