"""The table of scripts/test_megatron_matrix.sh, from reports as pytest writes them."""

from system_tests.release_table import table

REPORT = """<testsuites><testsuite>
<testcase classname="m" name="a"><properties><property name="check" value="layer"/>
<property name="algorithm" value="ring"/><property name="result" value="1e-15"/></properties></testcase>
<testcase classname="m" name="b"><properties><property name="check" value="layer"/>
<property name="algorithm" value="hybrid"/><property name="result" value="0.5"/></properties><failure/></testcase>
<testcase classname="m" name="c"><skipped/></testcase>
<testcase classname="m" name="d"><error/></testcase>
</testsuite></testsuites>"""


def test_each_check_is_a_row_with_a_cell_for_each_algorithm(tmp_path):
    (tmp_path / "0.1").mkdir()
    (tmp_path / "0.1" / "system.xml").write_text(REPORT)
    rows = [line.split() for line in table([tmp_path / "0.1"]).splitlines()]
    assert rows[-1] == ["0.1", "layer", "-", "1e-15", "-", "FAILED"]


def test_tests_that_failed_are_counted_and_named(tmp_path):
    (tmp_path / "system.xml").write_text(REPORT)
    text = table([tmp_path])
    assert "system: 1 passed, 1 skipped, 2 failed" in text
    assert "FAILED m::b" in text
    assert "FAILED m::d" in text


def test_release_that_left_no_report_is_not_left_out(tmp_path):
    assert "FAILED: no report" in table([tmp_path])
