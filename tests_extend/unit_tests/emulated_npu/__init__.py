"""A strict stand-in for Ascend's fused attention: what the NPU backend calls, computed on a CPU.

It exists so that mistakes in calling these ops show without an NPU. What the real ops reject, and what their documents
leave undefined, raises one clear RuntimeError; what they define is computed in fp32, in their memory layouts and with
their odd values in rows that see nothing. Nothing here has been compared with an NPU.

- `ops.py`: `fake_torch_npu`, the schemas, and the record of calls
- `attention.py`: npu_fusion_attention and its gradient
- `layouts.py`: where a sequence's numbers lie in each input layout, and in the two layouts of the softmax statistics
- `masking.py`: the sparse modes and rows that see nothing
- `ring_update.py`: npu_ring_attention_update, the merge of two results

Sources: the schemas of the torch_npu 2.13.0 wheel, the documents of Ascend/op-plugin and of CANN's aclnn operators, and
where those are silent the CANN kernels themselves and what Ascend/MindSpeed does; such places say "inferred".
"""

from unit_tests.emulated_npu.ops import Call, fake_torch_npu

__all__ = ["Call", "fake_torch_npu"]
