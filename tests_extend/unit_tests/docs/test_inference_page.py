"""The page on inference gives the bytes that the code computes, and its links lead somewhere."""

import re
from pathlib import Path

from mindspeed_cp.benchmark.inference import Heads
from mindspeed_cp.inference import DecodeCase, decode_sent

PAGE = Path(__file__).resolve().parents[3] / "docs" / "inference.md"


def test_measured_decode_table_has_the_bytes_and_operations_of_the_formula():
    rows = re.findall(r"^\| (\w+), (\w+), (\w+) \| (\d+) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 5
    heads = Heads()
    case = DecodeCase(4, 4, heads.query, heads.size, dtype=heads.dtype)
    for method, _, backend, sent, operations in rows:
        assert (int(sent), int(operations)) == decode_sent(case, method, backend)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE.read_text())
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
