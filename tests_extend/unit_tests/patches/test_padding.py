"""Padding of packed streams as a number in Megatron's log."""

import pytest
import torch
import torch.distributed as dist

from mindspeed_cp.patches.batches import shard_batch
from mindspeed_cp.patches.packing import PaddingCount
from mindspeed_cp.patches.padding import padding_patches
from mindspeed_cp.patches.plugin import Plugin


@pytest.fixture
def plugin():
    return Plugin(padding=PaddingCount(log_interval=2))


@pytest.fixture
def log(plugin, monkeypatch):
    """Megatron's function, patched, on the last of two ranks."""
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    (patch,) = padding_patches(plugin)
    return patch.in_place_of(lambda loss_dict, iteration: loss_dict)


def stream(*ends, padded=None):
    return {
        "tokens": torch.zeros(1, (padded or ends)[-1], dtype=torch.int64),
        "cu_seqlens": torch.tensor([ends]),
        "cu_seqlens_padded": None if padded is None else torch.tensor([padded]),
    }


def test_what_pads_the_streams_since_the_last_line_is_said_at_each_line_of_the_log(plugin, log, capsys):
    for batch in (stream(0, 5, 9), stream(0, 3, 10, padded=(0, 4, 12))):
        shard_batch(plugin, batch)
    with torch.no_grad():
        shard_batch(plugin, stream(0, 100))
    assert log({"lm loss": 1}, 1) == {"lm loss": 1}
    assert capsys.readouterr().out == ""
    log({}, 2)
    log({}, iteration=4)
    assert capsys.readouterr().out.splitlines() == [
        " padding tokens: 2 of 21 in the packed streams of this data-parallel rank",
        " padding tokens: 0 of 0 in the packed streams of this data-parallel rank",
    ]


def test_other_ranks_and_jobs_without_packed_streams_say_nothing(plugin, log, monkeypatch, capsys):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    log({}, 2)
    plugin.padding = None
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    log({}, 2)
    assert capsys.readouterr().out == ""
