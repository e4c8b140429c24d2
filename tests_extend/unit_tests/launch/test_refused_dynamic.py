"""The page of Megatron's options says what is refused beside documents with ranks of their own, as the refusal does."""

import pytest

from mindspeed_cp.patches.dynamic_rules import _RULES
from unit_tests.launch.refusal_cases import rows, said_of, table

NAME = "refused beside dynamic ranks"
DYNAMIC = "--hybrid-context-parallel"
WHAT_IT_NEEDS = f"{DYNAMIC} --sft --calculate-per-token-loss --max-seqlen-per-dp-cp-rank 8"


def test_with_what_it_needs_it_is_accepted_and_says_the_grid_on_each_number_of_ranks(parser):
    said = said_of(parser, f"{WHAT_IT_NEEDS} --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2")
    assert said[1:] == ([], set())
    start_lines = [line for line in said.everything if "documents on 1 to 8 ranks each" in line]
    assert len(start_lines) == 1
    assert (
        "hybrid_cp_algo (named): on 2 Ulysses 2; on 4 Ulysses 2 x ring 2; on 8 Ulysses 2 x ring 4, overlap"
        in start_lines[0]
    )


def test_algorithm_that_nobody_names_is_what_the_heads_allow_on_all_ranks(parser):
    said = said_of(parser, f"{WHAT_IT_NEEDS} --group-query-attention --num-query-groups 2")
    assert any("on 2 Ulysses 2; on 4 Ulysses 2 x ring 2; on 8 Ulysses 2 x ring 4" in line for line in said.everything)


@pytest.mark.parametrize(("flags", "reason"), rows(NAME))
def test_options_are_refused_beside_it_for_the_reason_on_the_page(parser, flags, reason):
    said = said_of(parser, f"{DYNAMIC} {flags}")
    if said.unknown:
        pytest.skip(f"this release has no {', '.join(sorted(said.unknown))}")
    assert [sentence for sentence in said.blocked if sentence.endswith(f"{reason}.")] != [], said.blocked


def test_every_rule_is_on_the_page():
    page = table(NAME)
    assert [rule.options for rule in _RULES if f"{rule.reason}; {rule.way_out}" not in page] == []


def test_number_of_ranks_that_megatron_has_no_groups_for_is_refused(parser):
    said = said_of(parser, WHAT_IT_NEEDS, num_ranks=12)
    assert [sentence.rpartition("; ")[2] for sentence in said.blocked] == ["use 8 or 16 ranks."]


def test_share_of_probabilities_that_nothing_can_drop_is_refused(parser):
    (sentence,) = said_of(parser, f"{WHAT_IT_NEEDS} --attention-dropout -0.1").blocked
    assert sentence.startswith("--attention-dropout -0.1 is not from 0 on and below 1")


def test_what_attention_over_several_ranks_cannot_honour_is_refused_too(parser):
    assert said_of(parser, f"{WHAT_IT_NEEDS} --batch-invariant-mode").blocked == [
        "--batch-invariant-mode with --hybrid-context-parallel: no kernel here makes that promise; leave it out."
    ]
