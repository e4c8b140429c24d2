"""What the patches of one plugin share: the configuration in force and the groups built for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from mindspeed_cp.comm import ContextParallelGroups
from mindspeed_cp.config import ContextParallelConfig


@dataclass
class Plugin:
    """State handed to every patch when it is made, so that none of them has to look anything up.

    config: set by the arguments patch, or by `megatron_adaptor.configure`; None before.
    groups: set while Megatron's model-parallel groups exist; None else.
    document_length: tokens of each document of a sequence, set by the arguments patch; None where the data says.
    """

    config: ContextParallelConfig | None = None
    groups: ContextParallelGroups | None = None
    document_length: int | None = None
    _over_others: dict[dist.ProcessGroup, ContextParallelGroups] = field(default_factory=dict)

    def build_groups(self, context_parallel: dist.ProcessGroup, timeout: timedelta | None = None) -> None:
        """Build the groups of the configured topology over Megatron's context-parallel group."""
        if self.config is not None and self.config.context_parallel_size > 1:
            self.groups = self._build(self.config, context_parallel, timeout)

    def drop_groups(self) -> None:
        """Destroy the groups; Megatron is about to forget the ranks that they were built over."""
        for groups in (self.groups, *self._over_others.values()):
            if groups is not None:
                groups.destroy()
        self.groups = None
        self._over_others.clear()

    def reason_to_stay(self) -> str | None:
        """Why the patches must not be undone now: an unpatched layer would attend to this rank's tokens alone."""
        if self.groups is None and not self._over_others:
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
            self._over_others[context_parallel] = self._build(self.config, context_parallel)
        return self._over_others[context_parallel]

    @contextmanager
    def one_micro_batch(self) -> Iterator[None]:
        """Within it, ranks agree once on what all layers of one micro-batch are given; see Note [Agreement]."""
        with ExitStack() as stack:
            for groups in (self.groups, *self._over_others.values()):
                if groups is not None:
                    stack.enter_context(groups.agreement.once())
            yield

    def _build(
        self, config: ContextParallelConfig, context_parallel: dist.ProcessGroup, timeout: timedelta | None = None
    ) -> ContextParallelGroups:
        return ContextParallelGroups.build(
            config.topology,
            context_parallel,
            overlap=config.use_cp_send_recv_overlap,
            # So that ranks agree without waiting for the accelerator.
            host_group=True,
            timeout=timeout,
        )
