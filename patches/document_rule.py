"""How documents are found in a batch of whole samples: by what its data set has reset, marked or been told.

Shapes: B samples, S tokens of each, n the most ends of a sample's documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentRule:
    """What --reset-attention-mask keeps apart, as Megatron's data sets have it.

    positions_restart: whether position ids begin anew with each document (--reset-position-ids). length: tokens of each
    document, whatever the data says (--fix-sub-seq-length).
    """

    positions_restart: bool = False
    length: int | None = None

    def find(self, tokens: Tensor, position_ids: Tensor, end_of_document: int | None) -> Tensor:
        """Where each sample's documents begin and end: [1 or B, n] int32 on the CPU, see packing.

        tokens, position_ids: [B, S]. end_of_document: the token that is the last of its document, where the tokenizer
        has one. Raises ValueError where nothing says where documents end.
        """
        samples, num_tokens = tokens.shape
        if self.length is not None:
            return torch.tensor([[*range(0, num_tokens, self.length), num_tokens]], dtype=torch.int32)
        if self.positions_restart:
            begins = position_ids == 0
        elif end_of_document is not None:
            begins = (tokens == end_of_document).roll(1, dims=1)
        else:
            raise ValueError(
                "--reset-attention-mask with a tokenizer that has no token for the end of a document: nothing says "
                "where documents end; add --reset-position-ids, or leave it out."
            )
        begins = begins.cpu()
        begins[:, 0] = True
        ends = [[*begins[sample].nonzero().flatten().tolist(), num_tokens] for sample in range(samples)]
        longest = max(map(len, ends))
        return torch.tensor([each + [num_tokens] * (longest - len(each)) for each in ends], dtype=torch.int32)
