"""The benchmark's own attention and kernels, and a run of all of it on two ranks."""

import json
import time

import pytest
import torch

from mindspeed_cp.benchmark.all_gather import AllGatherAttention
from mindspeed_cp.benchmark.kernels import EmulatedKernel, TimedKernel, block_flops
from mindspeed_cp.comm import Traffic, VirtualCommunicator, VirtualWorld
from mindspeed_cp.kernels import TileCase, TileTerms, Window
from mindspeed_cp.kernels.cpu_flash import CpuFlashKernel
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.kernels.reference import ReferenceKernel
from mindspeed_cp.sharding import SequenceLayout
from unit_tests.dense import Result, assert_equal_to, causal_mask, dense_attention

FIELDS = {
    *("algorithm", "kind", "pass", "num_ranks", "ranks_per_node", "fast_mbit", "slow_mbit", "slow_link"),
    *("emulated_network", "num_tokens", "num_heads", "num_kv_heads", "head_size", "element_size", "kernel"),
    *("flops_per_s", "iterations", "seconds", "all_seconds", "ratio_to_best", "kernel_seconds", "exposed_seconds"),
    *("waiting_seconds", "link_seconds"),
    *("predicted_seconds", "measured_over_predicted", "bytes_sent", "bytes_by_formula", "bytes_inside"),
    *("bytes_between", "bytes_as_predicted", "card_bytes_inside", "card_bytes_between"),
    *("most_bytes_between_of_a_rank", "held_bytes", "peak_bytes", "errors"),
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_gather_baseline_is_dense_attention_and_sends_its_formulas_bytes(size, kv_heads):
    torch.manual_seed(0)
    q, k, v, dout = (random(2, heads, 4 * size, 8) for heads in (4, kv_heads, kv_heads, 4))
    exact = dense_attention(q, k, v, dout, visible=causal_mask(4 * size))
    world, layout = VirtualWorld(size, 30.0), SequenceLayout(size=size)
    traffic = [Traffic() for _ in range(size)]

    def attend(rank):
        communicator = VirtualCommunicator(world, range(size), rank, "all", traffic[rank])
        own_q, own_k, own_v, own_dout = (layout.shard(x, rank, dim=2) for x in (q, k, v, dout))
        own = [x.requires_grad_() for x in (own_q, own_k, own_v)]
        out = AllGatherAttention(communicator, ReferenceKernel())(*own)
        return [out.detach(), *torch.autograd.grad(out, own, own_dout)]

    shards = zip(*world.run(attend), strict=True)
    out, dq, dk, dv = (layout.restore(torch.cat(each, dim=2), dim=2) for each in shards)
    assert_equal_to(exact, Result(out, exact.lse, dq, dk, dv))
    block = 2 * 2 * kv_heads * 4 * 8 * 8
    for each in traffic:
        assert each.bytes_sent == {"all_gather": (size - 1) * block, "all_to_all": (size - 1) * block}


def block_case(window: Window, head_size: int = 8) -> TileCase:
    return TileCase("cpu", torch.float32, window, 4, 2, 10, 20, head_size, 8)


def test_flops_are_two_products_forward_and_five_backward_of_what_is_seen():
    product = 2 * 3 * 4 * 10 * 20 * 8
    assert block_flops(block_case(EVERYTHING), batch=3) == 2 * product
    assert block_flops(block_case(EVERYTHING), batch=3, backward=True) == 5 * product
    assert block_flops(block_case(Window(None, 0)), batch=3) * 200 == 2 * product * (200 - 45)
    assert block_flops(block_case(EVERYTHING, head_size=16), batch=3, backward=True) == 8 * product


def test_emulated_kernel_takes_at_least_its_time_and_gives_zeros_of_the_right_shapes():
    q, k, v = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    kernel, terms = EmulatedKernel(block_flops(block_case(EVERYTHING), 1) / 0.02), TileTerms(1.0)
    timed = TimedKernel(kernel)
    start = time.perf_counter()
    output = timed.forward(q, k, v, terms)
    grads = timed.backward(torch.randn(1, 4, 10, 8), q, k, v, output, terms)
    assert time.perf_counter() - start >= timed.seconds >= 0.02 + 0.05
    assert timed.flops == pytest.approx(0.07 * kernel.flops_per_s)
    assert [x.shape for x in (output.out, output.lse, *grads)] == [q.shape, q.shape[:3], q.shape, k.shape, v.shape]
    assert not any(x.any() for x in (output.out, output.lse, *grads))


def test_emulated_kernel_refuses_masks_whose_work_it_does_not_know():
    assert EmulatedKernel(1.0).unsupported_reasons(block_case(EVERYTHING)._replace(masked=True))
    assert not EmulatedKernel(1.0).unsupported_reasons(block_case(EVERYTHING))


def test_timed_kernel_gives_what_the_kernel_gives():
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    terms = TileTerms(0.5, TRIANGLE)
    output, expected = (kernel.forward(q, k, v, terms) for kernel in (TimedKernel(CpuFlashKernel()), CpuFlashKernel()))
    assert torch.equal(output.out, expected.out)


def test_benchmark_on_two_loopback_ranks_writes_every_field_and_sends_the_formulas_bytes(tmp_path, run_script):
    arguments = "--loopback --ranks 2 --ranks-per-node 1 --kernel cpu --dtype-bytes 4 --seq-lengths 64 128 --heads 4"
    arguments += f" --kv-heads 2 --head-size 16 --iterations 1 --output {tmp_path}"
    ended = run_script("bench_attention.py", *arguments.split())
    assert ended.status == 0
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    algorithms = ["single device", "all-gather K/V", "ring", "ring, overlap", "Ulysses"]
    one_length = [(pass_, algorithm) for pass_ in ("forward", "backward") for algorithm in algorithms]
    assert [(line["pass"], line["algorithm"]) for line in lines] == one_length * 2
    for line in lines:
        assert set(line) == FIELDS
        assert line["bytes_sent"] == line["bytes_by_formula"] == line["bytes_inside"] + line["bytes_between"]
        assert line["bytes_as_predicted"]
        assert set(line["errors"]) == {"out", "dq", "dk", "dv"}
        assert max(line["errors"].values()) < 1e-5
        assert line["seconds"] >= line["kernel_seconds"] + line["waiting_seconds"]
        assert line["kernel_seconds"] > 0 and line["predicted_seconds"] > 0
    assert "plain loopback, rates without effect" in ended.out
    assert {path.name for path in tmp_path.glob("*.png")} <= {
        "time_tokens_2_ranks_2_kv_heads.png",
        "bytes_2_ranks_2_kv_heads.png",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seq-lengths 4100 --ranks 4", "--seq-lengths 4100 is not a multiple of 2 * --ranks 4"),
        ("--ranks 3", "--ranks 3 do not fill nodes of --ranks-per-node 2"),
        ("--heads 8 --kv-heads 3", "--kv-heads 3 does not divide --heads 8"),
    ],
)
def test_benchmark_refuses_sizes_that_do_not_fit(arguments, message, run_script):
    ended = run_script("bench_attention.py", "--seq-lengths", "4080", *arguments.split())
    assert ended.status == 2
    assert message in ended.err.splitlines()[-1]


def test_picture_says_who_is_fastest_where_and_shows_all_but_what_overlap_replaces(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from mindspeed_cp.benchmark import plots

    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    seconds = {
        "single device": {1: 0.5, 2: 9.0, 4: 9.0},
        "ring": {1: 5.0, 2: 5.0, 4: 5.0},
        "ring, overlap": {1: 4.0, 2: 3.0, 4: 1.0},
        "Ulysses": {1: 1.0, 2: 1.5, 4: 2.0},
    }
    plots.plot_times(seconds, "tokens", "a title", tmp_path / "times.png")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "Fastest: Ulysses at 1 to 2; ring, overlap at 4\na title"
    assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
        "single device": [0.5, 6.0, 9.0],
        "ring, overlap": [4.0, 2.0, 1.0],
        "Ulysses": [1.0, 1.0, 2.0],
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]
