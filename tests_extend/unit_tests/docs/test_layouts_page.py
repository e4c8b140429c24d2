"""The page of layouts: its table is the code's, and its example runs."""

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "layouts.md"


@pytest.mark.slow
def test_the_table_is_as_the_code_has_it(run_script):
    assert re.findall(r"<!-- drawing: (\w+) -->", PAGE.read_text()) == ["layouts"]
    assert run_script("draw_plan.py", "--check")[:2] == (0, "up to date\n")


def test_the_example_cuts_a_batch():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    asked = []
    known = {
        "tokens": torch.arange(2 * 4096).view(2, 4096),
        "rank": 3,
        "attention": lambda q, k, v, plan: asked.append(plan),
        "q": None,
        "k": None,
        "v": None,
    }
    exec(example, known)
    assert known["x"].shape == known["labels"].shape == (2, 1024)
    assert known["positions"].shape == known["loss_mask"].shape == (1, 1024)
    assert asked == [known["batch"].plan]
