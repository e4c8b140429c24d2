"""The benchmark of one GPU, run on a CPU: what it counts, what it drives, what it writes."""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from mindspeed_cp import device, kernels
from mindspeed_cp.attention import RingCommunicators, compose_attention
from mindspeed_cp.benchmark import one_gpu
from mindspeed_cp.benchmark.kernels import block_flops
from mindspeed_cp.benchmark.one_gpu import (
    Comparison,
    ImmediateCommunicator,
    Kernels,
    Measured,
    RingCase,
    measure,
    ring_attention,
)
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.kernels import (
    KERNELS,
    KernelRegistry,
    TileCase,
    TileGradients,
    TileOutput,
    TileTerms,
)
from mindspeed_cp.kernels.protocol import EVERYTHING, TRIANGLE
from mindspeed_cp.sharding import SequenceLayout

CASE = RingCase(num_ranks=4, tokens=8, num_heads=4, num_kv_heads=2, head_size=8, dtype=torch.float32, device="cpu")


@dataclass
class CountingKernel:
    """The kernel that is chosen for a CPU, which notes each call; out of memory above `most` tokens."""

    name = "counting"
    most: int = 10**9
    forward_cases: list[TileCase] = field(default_factory=list)
    backward_cases: list[TileCase] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def unsupported_reasons(self, case: TileCase) -> list[str]:
        return []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, terms: TileTerms) -> TileOutput:
        if q.size(2) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.forward_cases.append(TileCase.of(q, k, v, terms))
        self.keys.append(k)
        return KERNELS.choose(self.forward_cases[-1]).forward(q, k, v, terms)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: TileOutput, terms: TileTerms
    ) -> TileGradients:
        self.backward_cases.append(TileCase.of(q, k, v, terms))
        return KERNELS.choose(self.backward_cases[-1]).backward(dout, q, k, v, output, terms)


def attend(attention, case: RingCase) -> tuple[Tensor, ...]:
    q, k, v, dout = case.inputs(case.tokens)
    return torch.autograd.grad(attention(q, k, v), (q, k, v), dout)


@pytest.mark.parametrize("window", [EVERYTHING, TRIANGLE])
def test_flops_are_those_of_two_products_over_what_the_window_shows(window):
    block = CASE.dense(6)._replace(window=window, num_keys=6 if window == TRIANGLE else 10, value_head_size=5)
    seen = torch.ones(6, block.num_keys)
    seen = seen.tril() if window == TRIANGLE else seen
    multiply_and_add = 2
    products = sum(multiply_and_add * size * block.num_heads * seen.sum() for size in (8, 5))
    assert block_flops(block, batch=1) == products


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_each_rank_has_its_share_of_the_dense_flops(num_ranks):
    case = replace(CASE, num_ranks=num_ranks)
    whole = block_flops(case.dense(case.tokens * num_ranks), batch=1)
    assert [sum(block_flops(x, batch=1) for x in case.blocks(rank)) * num_ranks for rank in range(num_ranks)] == [
        whole
    ] * num_ranks


@pytest.mark.parametrize("rank", range(CASE.num_ranks))
def test_a_single_rank_computes_all_its_blocks_forward_and_backward(rank):
    kernel = CountingKernel()
    grads = attend(ring_attention(CASE, rank, Kernels(KernelRegistry((kernel,)), "torch"), torch.randn(10**4)), CASE)
    by_size = sorted(CASE.blocks(rank), key=str)
    assert sorted(kernel.forward_cases, key=str) == by_size
    assert len(by_size) == CASE.num_ranks
    (own,) = (block for block in by_size if block.window == TRIANGLE)
    half = own._replace(num_queries=own.num_queries // 2, num_keys=own.num_keys // 2)
    others = [block for block in by_size if block != own]
    in_parts = [half._replace(window=EVERYTHING), half, half, *others]
    assert sorted(kernel.backward_cases, key=str) == sorted(in_parts, key=str)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("inner", [1, 2])
@pytest.mark.parametrize("rank", range(CASE.num_ranks))
def test_steps_without_work_and_double_rings_are_driven_to_their_end(inner, rank):
    layout, kernel = SequenceLayout(size=CASE.num_ranks, kind="contiguous"), CountingKernel()
    config = ContextParallelConfig(
        context_parallel_size=CASE.num_ranks, context_parallel_algo="megatron_cp_algo", cp_window_size=inner
    )
    communicator = ImmediateCommunicator(rank, CASE.num_ranks, torch.randn(10**4))
    ring = RingCommunicators(communicator, communicator, communicator)
    kernels = KernelRegistry((kernel,))
    attend(compose_attention(config, rank=rank, ulysses=None, ring=ring, layout=layout, kernels=kernels), CASE)
    assert len(kernel.forward_cases) == rank + 1
    assert len(kernel.backward_cases) == rank + 3, "the own block in three parts"


def test_received_keys_are_the_stand_in_itself():
    stand_in, kernel = torch.randn(10**4), CountingKernel()
    attend(ring_attention(CASE, 0, Kernels(KernelRegistry((kernel,)), "torch"), stand_in), CASE)
    storages = [keys.untyped_storage().data_ptr() for keys in kernel.keys]
    assert storages[0] != stand_in.data_ptr()
    assert storages[1:] == [stand_in.data_ptr()] * (CASE.num_ranks - 1)


def test_slowest_rank_is_held_against_the_dense_call():
    phase = Comparison(flops=6e12, ring_s={0: 2.0, 7: 3.0}, dense_s=1.5)
    assert (phase.ring_tflops, phase.dense_tflops, phase.percent_of_dense) == (2.0, 4.0, 50.0)


def test_dense_call_of_the_same_flops_where_the_whole_sequence_does_not_fit():
    case = replace(CASE, tokens=128)
    kernel = CountingKernel(most=300)
    row = measure(case, Kernels(KernelRegistry((kernel,)), "torch"), least_s=0.001)
    assert (row.dense_tokens, row.dense_is_whole_sequence) == (256, False)
    assert block_flops(case.dense(256), batch=1) == pytest.approx(row.forward.flops, rel=0.01)
    assert "*: that did not fit into memory" in one_gpu.table([row])
    with pytest.raises(torch.OutOfMemoryError):
        measure(case, Kernels(KernelRegistry((CountingKernel(most=200),)), "torch"), least_s=0.001)


def test_time_of_another_dense_call_counts_by_its_share_of_flops(monkeypatch):
    times = iter(
        [1.0, 3.0, 2.0, 4.0, 9.0, 18.0]
    )  # Forward and both: of the first rank, of the last, of the dense call.

    def timed(passes, peak_bytes, device, least_s) -> Measured:
        passes[0]()
        return Measured(next(times), next(times), 0.0, peak_bytes)

    monkeypatch.setattr(one_gpu, "_timed", timed)
    case = replace(CASE, num_ranks=2, tokens=256)
    row = measure(case, Kernels(KernelRegistry((CountingKernel(most=511),)), "torch"), least_s=0.001)
    assert row.dense_tokens == 384, "256 * sqrt(2) tokens, rounded up to whole tiles"
    assert (row.forward.ring_s, row.forward_and_backward.ring_s) == ({0: 1.0, 1: 2.0}, {0: 3.0, 1: 4.0})
    share = (256 * 257 / 2 + 256 * 128) / (384 * 385 / 2)
    assert (row.forward.dense_s, row.forward_and_backward.dense_s) == pytest.approx((9.0 * share, 18.0 * share))


def test_peak_memory_is_what_a_pass_holds_above_its_inputs(monkeypatch):
    held = {"now": 2**30, "peak": 5 * 2**30}  # The peak is that of what ran before.

    def run() -> None:
        held["peak"] = max(held["peak"], held["now"] + 3 * 2**29)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    peak = one_gpu._peak_bytes(run, "cuda")
    row = measure(CASE, Kernels(KERNELS, "torch"), least_s=0.001)
    assert row.ring_peak_bytes is None
    printed = one_gpu.table([replace(row, ring_peak_bytes=peak)])
    assert "| 1.50 GiB |" in printed and "not measured" not in printed


def test_picture_shows_every_point_of_both_phases(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    row = measure(CASE, Kernels(KERNELS, "torch"), least_s=0.001)
    slow, fast = Comparison(1.0, {0: 1.0}, 0.5), Comparison(1.0, {0: 1.0}, 3.0)
    rows = [replace(row, forward=slow, forward_and_backward=fast)]
    rows.append(replace(rows[0], case=replace(CASE, tokens=16), forward_and_backward=slow))
    one_gpu.draw(rows, "title", tmp_path / "bench.png")
    for panel, percents in zip(drawn[0].axes, ([50, 50], [300, 50]), strict=True):
        assert [list(each) for each in panel.lines[0].get_data()] == [[8, 16], percents]
        assert panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 300


def test_smallest_case_gives_a_table_json_and_a_picture(tmp_path, run_script):
    pytest.importorskip("matplotlib")
    command = ["bench_one_gpu.py", "--device", "cpu", "--seconds", "0.001", "--tokens", "8", "16"]
    command += ["--ranks", "2", "--heads", "2:1", "--head-size", "8", "--dtype", "float32", "--kernels", "all"]
    command += ["--json", str(tmp_path / "sub" / "bench.jsonl"), "--plot", str(tmp_path / "sub" / "bench.png")]
    done = run_script(*command)
    assert done.status == 0, done.err

    records = [json.loads(line) for line in (tmp_path / "sub" / "bench.jsonl").read_text().splitlines()]
    able = [name for name in KERNELS.names if not KERNELS.only([name]).kernels[0].unsupported_reasons(CASE.dense(8))]
    assert [(each["tokens"], each["kernels"]) for each in records] == [
        (size, [name]) for size in (8, 16) for name in able
    ]
    first = records[0]
    assert (first["dtype"], first["dense_tokens"], first["dense_is_whole_sequence"]) == ("float32", 16, True)
    assert first["ring_peak_bytes"] is None and first["torch"] == torch.__version__
    for name, passes in (("forward", 1), ("forward_and_backward", 3.5)):
        phase = first[name]
        assert phase["flops"] == passes * 4 * 2 * 8 * (8 * 9 // 2 + 8 * 4)
        assert set(phase["ring_s"]) == {"0", "1"} and min(phase["ring_s"].values()) > 0
        assert phase["percent_of_dense"] == pytest.approx(100 * phase["dense_s"] / max(phase["ring_s"].values()))

    lines = [line for line in done.out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(records)
    assert len({line.count("|") for line in lines}) == 1
    percent = records[-1]["forward_and_backward"]["percent_of_dense"]
    assert lines[-1].endswith(f"| {percent:.1f} | - |")
    assert first["merge"] == "torch" and "Blocks are merged by torch." in done.out
    assert "CPU: a smoke test" in done.out and "Peak memory is not measured on a CPU." in done.out
    assert "reference computes causal attention of 8 queries over 8 keys" in done.out
    assert f"1/{2 * len(KERNELS.names)}  2 ranks, 8 tokens a rank" in done.err
    assert (tmp_path / "sub" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_kernel_that_cannot_compute_a_case_is_left_out_with_its_reason(monkeypatch, run_script):
    class Refusing(CountingKernel):
        name = "refusing"

        def unsupported_reasons(self, case: TileCase) -> list[str]:
            return ["computes nothing"]

    monkeypatch.setattr(kernels, "KERNELS", KernelRegistry((Refusing(), *KERNELS.kernels)))
    small = ["--device", "cpu", "--tokens", "8", "--ranks", "2", "--heads", "2:1", "--seconds", "0.001"]
    alone = run_script("bench_one_gpu.py", *small, "--kernels", "refusing")
    assert alone.status == 1
    assert "not refusing: computes nothing" in alone.out
    beside = run_script("bench_one_gpu.py", *small)
    assert beside.status == 0
    assert "cpu_flash computes" in beside.out and "not refusing: computes nothing" in beside.out


def test_device_that_is_not_here_is_one_line(monkeypatch, run_script):
    monkeypatch.setattr(device, "accelerator", lambda: None)
    assert "--device cuda is not on this machine; use cpu." in run_script("bench_one_gpu.py", "--device", "cuda").err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "9"], "--tokens 9 is not a multiple of the 2 chunks that a rank holds; use 10."),
        (["--ranks", "1"], "--ranks 1: a ring has 2 ranks or more."),
        (["--heads", "8:3"], "--heads 8:3: query heads, a multiple of the key/value heads, like 32:8."),
        (["--heads", "8"], "--heads 8: query heads, a multiple of the key/value heads, like 32:8."),
        (["--kernels", "cpu_flsh"], "--kernels: there is no attention kernel 'cpu_flsh'; there are "),
        (["--merge", "triton"], "  not triton: runs on CUDA, not on cpu"),
    ],
)
def test_wrong_input_is_one_line(flags, message, run_script):
    ended = run_script("bench_one_gpu.py", "--device", "cpu", *flags)
    assert ended.status == 2
    assert message in "\n".join(ended.err.splitlines()[-2:])
