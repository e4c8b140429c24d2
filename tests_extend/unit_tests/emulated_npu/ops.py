"""The ops in PyTorch's registry, the module torch_npu, and a record of the calls."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch

from unit_tests.emulated_npu.attention import fusion_attention, fusion_attention_grad
from unit_tests.emulated_npu.ring_update import ring_attention_update

LATER_FORWARD = ', str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0'
LATER_GRAD = ', str softmax_layout="", Tensor? sink=None'

FORWARD = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    f"bool sync=False{LATER_FORWARD}) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)
GRAD = (
    "npu_fusion_attention_grad(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, Tensor? softmax_max=None, "
    "Tensor? softmax_sum=None, Tensor? softmax_in=None, Tensor? attention_in=None, float scale_value=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int seed=0, "
    "int offset=0, int numels=0, int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, "
    f"int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False{LATER_GRAD}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
RING_UPDATE = (
    "npu_ring_attention_update(Tensor prev_attn_out, Tensor prev_softmax_max, Tensor prev_softmax_sum, "
    "Tensor cur_attn_out, Tensor cur_softmax_max, Tensor cur_softmax_sum, *, Tensor? actual_seq_qlen=None, "
    'str input_layout="SBH", str input_softmax_layout="") -> (Tensor, Tensor, Tensor)'
)
"""As torch_npu 2.13.0 declares them."""

OLD_FORWARD = FORWARD.replace(LATER_FORWARD, "")
OLD_GRAD = GRAD.replace(LATER_GRAD, "").replace("Tensor, Tensor)", "Tensor)")
"""As builds before TorchNPU 7.2 had them: the gradient gives four tensors, not five."""


class Call(NamedTuple):
    """A call that reached an op: every argument of its schema by name, those left out with their default."""

    op: str
    arguments: dict[str, object]


@contextmanager
def fake_torch_npu(
    *, old_schemas: bool = False, ring_update: bool = True, default_precision: int = 0, cann: str | None = "8.3.RC1"
) -> Iterator[list[Call]]:
    """Within the context, `import torch_npu` and `torch.ops.npu` give the emulated ops; yields the calls so far.

    old_schemas: as before TorchNPU 7.2, without softmax_layout and sink. ring_update: whether there is a
    npu_ring_attention_update, which came last. default_precision: the default of inner_precise, 1 with CANN 7.0. cann:
    what get_cann_version answers, None where the build has no such function; an older one than 8.2.RC1, and one that is
    not known, takes no values of another head size than keys. Whoever asks what a build can do should ask the schema:
    `torch.ops.npu.npu_fusion_attention.default._schema.arguments`. Afterwards all is as it was.
    """
    calls: list[Call] = []
    implementations = {
        OLD_FORWARD if old_schemas else FORWARD: fusion_attention,
        OLD_GRAD if old_schemas else GRAD: fusion_attention_grad,
    } | ({RING_UPDATE: ring_attention_update} if ring_update else {})
    precision, default = (f"int inner_precise={number}" for number in (0, default_precision))
    narrower_values = cann is not None and cann >= "8.2.RC1"
    module = ModuleType("torch_npu", doc="The emulated ops of a CPU.")
    module.__spec__ = ModuleSpec("torch_npu", loader=None)  # importlib.util.find_spec asks for it
    if cann is not None:
        module.npu = SimpleNamespace(utils=SimpleNamespace(get_cann_version=lambda module="CANN": cann))
    before = sys.modules.get("torch_npu")
    with torch.library._scoped_library("npu", "FRAGMENT") as library:
        for schema, implementation in implementations.items():
            name = library.define(schema.replace(precision, default))
            op = getattr(torch.ops.npu, name)
            library.impl(name, _kernel(op.default._schema, implementation, calls, narrower_values), "CPU")
            setattr(module, name, op)
        sys.modules["torch_npu"] = module
        try:
            yield calls
        finally:
            del sys.modules["torch_npu"]
            if before is not None:
                sys.modules["torch_npu"] = before


def _kernel(
    schema: torch.FunctionSchema,
    implementation: Callable[[SimpleNamespace], tuple],
    calls: list[Call],
    narrower_values: bool,
) -> Callable[..., tuple]:
    """What the dispatcher calls: binds the arguments by the schema's names, records them, computes."""

    def kernel(*args: object, **kwargs: object) -> tuple:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        arguments = {each.name: given.get(each.name, each.default_value) for each in schema.arguments}
        calls.append(Call(schema.name.removeprefix("npu::"), arguments))
        results = implementation(
            SimpleNamespace(**{"softmax_layout": "", "narrower_values": narrower_values, **arguments})
        )
        return results[: len(schema.returns)]

    return kernel
