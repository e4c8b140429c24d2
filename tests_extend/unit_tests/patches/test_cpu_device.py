"""The CPU as Megatron's device: the answers are right, not only there."""

import mmap
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture
def cpu_device(adaptor):
    with adaptor.cpu_registry.applied():
        yield


def test_random_states_of_megatron_are_forked_and_put_back(cpu_device):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.reset()
    torch.manual_seed(1)
    outside = [torch.rand(1).item() for _ in range(2)]
    tracker.add("rank", 7)
    torch.manual_seed(1)
    first = torch.rand(1).item()
    with tracker.fork("rank"):
        inside = torch.rand(1).item()
    assert [first, torch.rand(1).item()] == outside
    assert inside == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)])
def test_tensors_asked_for_on_cuda_are_on_the_cpu(cpu_device, device):
    tensors = [torch.zeros(2, device=device), torch.tensor([1.0], device=device), torch.ones(2).to(device)]
    tensors += [torch.empty_like(tensors[0], device=device, pin_memory=True), tensors[0].cuda(), torch.empty(1).cuda(0)]
    assert {x.device.type for x in tensors} == {"cpu"}
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_torch_itself_is_not_told_that_there_is_cuda(cpu_device):
    assert not torch.cuda.is_available()
    assert len(list(torch.utils.data.DataLoader([1, 2], pin_memory=True))) == 2


def test_memory_reported_is_that_of_the_process(cpu_device):
    before, size = torch.cuda.memory_allocated(), 64 << 20
    # Mapped anew, and not what a tensor of an earlier test has left in the process.
    with mmap.mmap(-1, size) as held:
        held.write(bytes(size))
        now = torch.cuda.memory_allocated()
    assert now - before > size * 0.9
    assert torch.cuda.max_memory_allocated() - before > size * 0.9


def test_types_are_named_as_megatrons_optimizers_compare_them(cpu_device):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


def test_streams_and_events_of_one_device_need_no_waiting(cpu_device):
    stream, event = torch.cuda.Stream(priority=-1), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        event.record()
    stream.wait_stream(torch.cuda.current_stream())
    assert event.query()


def test_sizes_of_an_all_to_all_between_experts_are_numbers(cpu_device):
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([3, 5]), as_numpy=True)
    assert sizes.tolist() == [3, 5] and not isinstance(sizes, torch.Tensor)
    tensor = torch.tensor(3)
    assert token_dispatcher.maybe_move_tensor_to_cpu(tensor) is tensor
    assert token_dispatcher.maybe_move_tensor_to_cpu([1, 2], as_numpy=True) == [1, 2]
