"""The attention of a layer whose micro-batches are documents that each have ranks of their own."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mindspeed_cp.attention import ContextParallelAttention
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks, Members
from mindspeed_cp.patches.layer_attention import LayerAttention


@dataclass(frozen=True)
class DynamicAttention:
    """The attention of one layer where each document has ranks of its own.

    ranks: see DynamicRanks. layer: of a document that has one rank, but for its length. build: makes what computes one
    over several. config: of a document that has all ranks, as this layer has it.
    """

    ranks: DynamicRanks
    layer: LayerAttention
    build: Callable[[ContextParallelConfig, ContextParallelGroups], ContextParallelAttention]
    config: ContextParallelConfig
    _made: dict[Members, LayerAttention] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def watches_scores(self) -> bool:
        """Whether the largest score of each head is asked for."""
        return self.layer.watches_scores

    def of_document(self, packed: Any) -> LayerAttention:
        """What computes one document, whose tokens then are those of a sample without documents.

        packed: Megatron's PackedSeqParams of it. Raises ValueError where they do not say who shares it.
        """
        if packed is None or packed.local_cp_size is None or packed.qkv_format != "sbhd":
            given = "none" if packed is None else f"{packed.qkv_format!r} with local_cp_size={packed.local_cp_size}"
            raise ValueError(
                f"--hybrid-context-parallel and PackedSeqParams {given}: nothing says which ranks share the document; "
                f"train by Megatron's schedule with a GPTModel, or leave the flag out."
            )
        members = self.ranks.members(packed)
        if members not in self._made:
            self._made[members] = self.layer if len(members) == 1 else self._over(members)
        return replace(self._made[members], length=document_length(packed))

    def _over(self, members: Members) -> LayerAttention:
        config = self.config.over(len(members))
        return replace(self.layer, by_plan=self.build(config, self.ranks.part(members)))


def document_length(packed: Any) -> int:
    """Tokens of the document. packed: Megatron's PackedSeqParams of a micro-batch that is one."""
    return int(packed.max_seqlen_q)
