"""Shares of probabilities that attention cannot drop, which otherwise end a job at its first batch."""

import pytest

from mindspeed_cp.config import ConfigurationError
from unit_tests.argument_cases import config_from_arguments

SIZES = ["--num-attention-heads", "8", "--seq-length", "64", "--hidden-dropout", "0"]


@pytest.mark.parametrize("rate", ["1.0", "-0.1", "nan"])
@pytest.mark.parametrize("ours", [["--context-parallel-size", "4"], ["--attention-on-one-rank"]], ids=["ranks", "one"])
def test_share_that_cannot_be_dropped_is_refused(parser, ours, rate):
    args = parser.parse_args([*SIZES, *ours, f"--attention-dropout={rate}"])
    with pytest.raises(ConfigurationError, match=f"--attention-dropout {rate} is not from 0 on and below 1.*; use 0.1"):
        config_from_arguments(args)


def test_one_rank_that_is_megatron_s_drops_what_megatron_drops(parser):
    config_from_arguments(parser.parse_args([*SIZES, "--attention-dropout=1.0"]))
