"""Training through Megatron on documents that each have ranks of their own, with what each of them sends."""

from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

from system_tests.block_cases import sent
from system_tests.training_cases import log_of_training


class Document(NamedTuple):
    """One that this rank has had a part of: the ranks that shared it, its tokens, and the bytes that this one sent."""

    num_ranks: int
    tokens: int
    sent_bytes: int


class Run(NamedTuple):
    """What this rank has printed, and the documents of its steps, one after another."""

    log: str
    documents: list[Document]


def train_dynamically(world_size: int, port: int, flags: list[str]) -> Run:
    """Train as log_of_training does, with --hybrid-context-parallel among the flags."""
    from megatron.core.pipeline_parallel import schedules

    import mindspeed_cp.megatron_adaptor  # noqa: F401  (its patches go beneath what is counted here)
    from mindspeed_cp.patches.dynamic_attention import DynamicAttention

    of_document, documents, step = DynamicAttention.of_document, list[Document](), list[tuple[int, int]]()

    def noting(attention: DynamicAttention, packed: Any) -> Any:
        step.append((packed.local_cp_size, packed.max_seqlen_q))
        return of_document(attention, packed)

    def counted(name: str) -> Any:
        run = getattr(schedules, name)

        def pass_of_document(*args: Any, **kwargs: Any) -> Any:
            step[:] = step if name == "backward_step" else []
            with sent() as messages:
                result = run(*args, **kwargs)
            assert len({*step}) == 1, "all layers have the same document"
            documents.append(Document(*step[0], sum(messages)))
            return result

        return pass_of_document

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(DynamicAttention, "of_document", noting))
        for name in ("forward_step", "backward_step"):
            stack.enter_context(mock.patch.object(schedules, name, counted(name)))
        log = log_of_training(world_size, port, flags)
    return Run(log, documents)
