"""Context-parallel attention for Megatron-LM on any accelerator, and on plain CPUs.

Importing this package does no work: it patches nothing, needs no Megatron and prints nothing. To patch Megatron,
import `mindspeed_cp.megatron_adaptor`; to use the attention alone, import `mindspeed_cp.attention`.
"""

__version__ = "0.1.0"
