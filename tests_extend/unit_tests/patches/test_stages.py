"""The documents of each micro-batch in every pipeline stage, virtual ones too."""

from unit_tests import stage_cases


def test_every_part_of_every_stage_has_the_documents_of_its_micro_batch(gloo):
    found = [None if each is None else each.tolist() for each in stage_cases.DOCUMENTS]
    for met in gloo.run(3, stage_cases.pass_on):
        assert met == [found] * stage_cases.PARTS
