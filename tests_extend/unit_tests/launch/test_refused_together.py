"""The page of Megatron's options says what is refused beside what, in the words of the refusal."""

import pytest

from unit_tests.launch.refusal_cases import rows, said_of

BESIDE = "--context-parallel-size 2"
ROWS = rows("refused together")


def test_model_of_the_table_is_accepted_alone(parser):
    assert len(ROWS) > 10
    assert said_of(parser, BESIDE)[1:] == ([], set())


@pytest.mark.parametrize(("flags", "reason"), ROWS)
def test_options_are_refused_together_for_the_reason_on_the_page(parser, flags, reason):
    said = said_of(parser, f"{BESIDE} {flags}")
    if said.unknown:
        pytest.skip(f"this release has no {', '.join(sorted(said.unknown))}")
    assert [sentence for sentence in said.blocked if sentence.endswith(f"{reason}.")] != []
