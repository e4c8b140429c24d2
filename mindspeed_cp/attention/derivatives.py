"""Which derivatives attention has."""

from mindspeed_cp.derivatives import Once

ONCE = Once("attention", "torch.nn.functional.scaled_dot_product_attention with its math backend")
