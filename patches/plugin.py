"""What the patches of one plugin share: the configuration in force and the groups built for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from mindspeed_cp.attention import Recomputation
from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.comm.communicator import carries_cpu_tensors
from mindspeed_cp.config import ContextParallelConfig
from mindspeed_cp.patches.document_rule import DocumentRule
from mindspeed_cp.patches.dynamic_ranks import DynamicRanks, configured_groups
from mindspeed_cp.patches.packing import Packing, PaddingCount
from mindspeed_cp.patches.stages import Pipeline, StageDocuments

BatchKind = Literal["streams", "samples"]


@dataclass
class Plugin:
    """State handed to every patch when it is made, so that none of them has to look anything up.

    Set by `configure`, None (seed 0) before:

    config: what the context-parallel flags say. seed: of the job, for what is drawn at random.
    length: tokens of a whole sample where the ranks have unequal shards; None where they have equal ones.
    packing: how packed streams are dealt to ranks. padding: what pads them, where there are some.
    dynamic: where each document has ranks of its own.
    document_rule: how documents are found in the data, where --reset-attention-mask keeps them apart.
    apart_by: the flag that keeps documents apart, with which no layer may go without them.

    Set while a job runs:

    groups: while Megatron's model-parallel groups exist; None else.
    end_of_document: the token that is the last of its document; set when the tokenizer is made.
    stages: the documents of the micro-batch at hand.
    recomputation: of Megatron's checkpoints, where they keep what attention gives.
    kinds_cut: of the batches that were cut since Megatron's groups were made: "streams" where packed, "samples".
    last_cut: of the batch that was cut last in this micro-batch; None where none was.
    """

    config: ContextParallelConfig | None = None
    seed: int = 0
    groups: ContextParallelGroups | None = None
    dynamic: DynamicRanks | None = None
    document_rule: DocumentRule | None = None
    end_of_document: int | None = None
    apart_by: str | None = None
    length: int | None = None
    stages: StageDocuments = field(default_factory=StageDocuments)
    packing: Packing = field(default_factory=Packing)
    padding: PaddingCount | None = None
    kinds_cut: set[BatchKind] = field(default_factory=set)
    last_cut: BatchKind | None = None
    recomputation: Recomputation = field(default_factory=Recomputation)
    _over_others: dict[dist.ProcessGroup, ContextParallelGroups] = field(default_factory=dict)
    _of_stages: dist.ProcessGroup | None = None

    def configure(
        self,
        config: ContextParallelConfig,
        *,
        seed: int,
        packing: Packing,
        length: int | None,
        dynamic: DynamicRanks | None = None,
        document_rule: DocumentRule | None = None,
        apart_by: str | None = None,
        padding: PaddingCount | None = None,
    ) -> None:
        """Take all that flags, or a program's `configure`, say: nothing is left of an earlier configuration."""
        self.config, self.seed, self.packing, self.length = config, seed, packing, length
        self.dynamic, self.document_rule, self.apart_by, self.padding = dynamic, document_rule, apart_by, padding

    def build_groups(self, context_parallel: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        """Build the groups of the configured topology over Megatron's context-parallel group."""
        if self.config is not None and self.config.context_parallel_size > 1:
            self.groups = configured_groups(self.config, context_parallel, timeout)

    def drop_groups(self) -> None:
        """Destroy the groups; Megatron is about to forget the ranks that they were built over."""
        for groups in (self.groups, *self._over_others.values()):
            if groups is not None:
                groups.destroy()
        self.groups = None
        if self.dynamic is not None:
            self.dynamic.drop()
        self._over_others.clear()
        self.stages = StageDocuments()
        if self._of_stages is not None:
            # torch raises for a group that is gone with all others already.
            with suppress(ValueError):
                dist.destroy_process_group(self._of_stages)
        self._of_stages = None
        self.kinds_cut.clear()
        self.last_cut = None

    def note_cut(self, kind: BatchKind) -> None:
        """A batch of this kind has been cut for the ranks."""
        self.kinds_cut.add(kind)
        self.last_cut = kind

    def was_cut_as_samples(self) -> bool:
        """Whether the batch at hand was cut as samples, whatever documents it has."""
        return self.last_cut == "samples"

    def cuts_streams_alone(self) -> bool:
        """Whether each batch that was cut is a packed stream, which no layer may take for one document."""
        return self.kinds_cut == {"streams"}

    @property
    def layer_document_rule(self) -> DocumentRule | None:
        """How documents are found for layers; None where Megatron's own attention reads a mask of them."""
        return self.document_rule if self.config is not None and self.config.computes_attention else None

    @property
    def is_unequal(self) -> bool:
        """Whether the ranks hold unequal numbers of tokens of what is at hand."""
        return self.length is not None or self.packing.is_unequal

    @property
    def packs_streams(self) -> bool:
        """Whether the samples of a micro-batch are one packed stream, by the flags."""
        return self.padding is not None

    @property
    def place(self) -> tuple[int, int]:
        """This rank among those that share its sequences, and how many these are."""
        if self.groups is None:
            return 0, 1
        return dist.get_rank(self.groups.context_parallel), dist.get_world_size(self.groups.context_parallel)

    def join_pipeline(self, stages: dist.ProcessGroup) -> None:
        """Let the documents that are found in the first of these stages reach the others. All ranks call it."""
        if self.layer_document_rule is None or dist.get_world_size(stages) == 1:
            return
        # Tensors of the CPU: which documents there are is read there, and no message of Megatron's is in the way.
        world = dist.group.WORLD
        assert world is not None, "Megatron has made groups"
        if not carries_cpu_tensors(world):
            self._of_stages = dist.new_group(backend="gloo")
        self.stages.pipeline = Pipeline(dist.get_process_group_ranks(stages), self._of_stages or world)

    def reason_to_stay(self) -> str | None:
        """Why the patches must not be undone now: an unpatched layer would attend to this rank's tokens alone."""
        has_dynamic = self.dynamic is not None and self.dynamic.groups is not None
        if self.groups is None and not self._over_others and not has_dynamic:
            return None
        return "training is under way on context-parallel groups; call parallel_state.destroy_model_parallel() first."

    def groups_over(self, context_parallel: dist.ProcessGroup) -> ContextParallelGroups:
        """The groups over this context-parallel group: Megatron's own, or one of the caller's.

        Over a group of the caller's they are built once, as ContextParallelGroups.build says, for its first layer: from
        then on ranks may differ in how many layers they have.
        """
        if self.groups is not None and self.groups.context_parallel is context_parallel:
            return self.groups
        if self.config is None:
            raise RuntimeError(
                "mindspeed_cp is not configured: its flags were not parsed; call "
                "mindspeed_cp.megatron_adaptor.configure(...) before initialize_model_parallel."
            )
        if context_parallel not in self._over_others:
            self._over_others[context_parallel] = configured_groups(self.config, context_parallel)
        return self._over_others[context_parallel]

    @contextmanager
    def one_micro_batch(self) -> Iterator[None]:
        """Within it, ranks agree once on what all layers of one micro-batch are given; see Note [Agreement]."""
        agreements = [groups.agreement for groups in (self.groups, *self._over_others.values()) if groups is not None]
        agreements += () if self.dynamic is None else self.dynamic.agreements
        self.last_cut = None
        with ExitStack() as stack:
            for agreement in agreements:
                stack.enter_context(agreement.remembering())
            yield
