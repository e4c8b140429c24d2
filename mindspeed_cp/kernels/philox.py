"""Random numbers that depend on nothing but where they are used: Philox 4x32-10.

Note [Dropout]
    Whether the probability of query i and key j is dropped is decided by one 32-bit word of

        philox(counter = (j // 4, i, head, sample), key)[j % 4]  <  rate * 2**32

    with i and j the places of the tokens in their sample's stream, so that the mask is the same however the tokens are
    dealt to ranks, whatever computes them and in whatever order; the backward pass draws it anew, and nothing is kept.
    The key is made of what tells attentions of one job apart: its seed, the layer, the micro-batch and the
    data-parallel rank.

    A row's log-sum-exp is that without dropout. With keep_ij = 0 or 1 / (1 - rate),

        out_i = sum_j keep_ij p_ij v_j,   dp_ij = keep_ij (dout_i . v_j),   ds_ij = p_ij (dp_ij - dout_i . out_i).

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), whose known answers the tests hold it to.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout of attention probabilities, the same on any number of ranks, see Note [Dropout].

    rate: in [0, 1). seed: of the job. layer, micro_batch, data_parallel_rank: what tells its attentions apart; a
    recomputation gives the same ones. first_head: the number of the first head, where tensor-parallel ranks before this
    one have others.
    by_kernel: kernels may draw by coordinates and a generator of their own. That is valid, and not the same as at
        CP = 1. Such a kernel reads the rate alone: seed the generator of the device differently on each rank.

    Raises ValueError for a rate outside of [0, 1), or a number below 0.
    """

    rate: float
    seed: int
    layer: int = 0
    micro_batch: int = 0
    data_parallel_rank: int = 0
    first_head: int = 0
    by_kernel: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"dropout rate={self.rate} is not in [0, 1); give the share of what is dropped, as 0.1.")
        for name in ("seed", "layer", "micro_batch", "data_parallel_rank", "first_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"dropout {name}={value!r} is no integer from 0 on; give one.")

    @property
    def key(self) -> tuple[int, int]:
        """The generator's key: two words."""
        of = repr((self.seed, self.layer, self.micro_batch, self.data_parallel_rank))
        digest = hashlib.blake2b(of.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Four random words for each counter; all are int64 tensors that hold 32 bits, and broadcast."""
    a, b, c, d = counter
    for number in range(_ROUNDS):
        keys = ((word + number * step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True))
        (high_a, low_a), (high_c, low_c) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ next(keys), low_c, high_a ^ d ^ next(keys), low_a
    return a, b, c, d


def survives(
    rate: float, key: tuple[int, int], samples: Tensor, heads: Tensor, queries: Tensor, keys: Tensor
) -> Tensor:
    """[B, N, S, T] bool, False where a probability is dropped; see Note [Dropout].

    samples, queries: [B, S] int64. heads: [N] int64. keys: [B, T] int64.
    """
    threshold = round(rate * 2**32)
    rows = []
    for sample, query, key_places in zip(samples, queries, keys, strict=True):
        # Four keys share a counter: it is drawn once.
        blocks, block_of = torch.unique(key_places // 4, return_inverse=True)
        words = philox((blocks, query[:, None], heads[:, None, None], sample[:, None]), key)
        drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [N, S, blocks, 4]
        rows.append(drawn.flatten(-2)[..., 4 * block_of + key_places % 4] >= threshold)
    return torch.stack(rows)


def _product(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of the product: 64 bits, of which int64 has 63, and so in two parts."""
    high, low = multiplier >> 16, multiplier & 0xFFFF
    return (x * high + (x * low >> 16)) >> 16, (x * multiplier) & _WORD
