"""One training run through Megatron, as a function that a rank's process can run again and again."""

import contextlib
import gc
import io
import os
import re
import runpy
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from mindspeed_cp.attention.exchange import Gradients
from mindspeed_cp.attention.group_order import GroupOrder
from mindspeed_cp.attention.ring import RingAttention
from mindspeed_cp.comm import ProcessGroupCommunicator
from mindspeed_cp.patching import PatchError
from mindspeed_cp.testing.toy_flags import TOY_FLAGS
from system_tests.compare_losses import ITERATION, losses_in
from system_tests.conversations import made_up_conversations
from system_tests.planted_cases import PLANTED, planted

REPOSITORY = Path(__file__).resolve().parents[2]
MEGATRON_LM = os.environ.get("MEGATRON_LM")
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py" if MEGATRON_LM is None else Path(MEGATRON_LM) / "pretrain_gpt.py"
"""Megatron-LM's own, unmodified, where a checkout is named."""
if MEGATRON_LM is not None:
    # Behind all others: what lies beside the script, and of its megatron what the wheel has not.
    sys.path.append(MEGATRON_LM)

HAS_TRAINING = find_spec("megatron") is not None and find_spec("megatron.training") is not None
"""The wheels of Megatron 0.16 hold megatron.core alone, and a checkout the rest."""

READS_CONVERSATIONS = MEGATRON_LM is not None or (
    HAS_TRAINING and Version(metadata.version("megatron-core")) >= Version("0.19")
)
"""Whether SCRIPT takes --sft."""

MODEL_FLAGS = (
    *TOY_FLAGS,
    *shlex.split("""
    --num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64 --mock-data
    --global-batch-size 2 --distributed-backend gloo --distributed-timeout-minutes 4
    """),
)
ITERATIONS = 4
"""Enough for a fault to show: a gradient that is wrong in the first changes the losses of all others."""


def prepare_rank(rank: int, folder: str) -> None:
    """What each process needs before its first run."""
    os.environ["RANK"] = str(rank)
    # Megatron compiles one there, and a process that is killed meanwhile leaves a lock that others wait for, for ever.
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    warnings.simplefilter("ignore")
    import megatron.core.models.gpt
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    # So that a sequence holds several of the mock data's documents.
    MockGPTLowLevelDataset.max_sequence_length = 40
    if HAS_TRAINING:
        import megatron.training  # noqa: F401
    # forget_run collects what a run has left, and need not go through all modules for it.
    gc.collect()
    gc.freeze()


def train(
    world_size: int, port: int, flags: str, sabotage: str | None, line: re.Pattern[str] = ITERATION
) -> dict[int, float]:
    """Train with MODEL_FLAGS and `flags` as one rank of `world_size`; the losses by iteration, on the last rank.

    line: the lines of the log to read them from. sabotage: see log_of_training.
    """
    return losses_in(log_of_training(world_size, port, [*MODEL_FLAGS, *shlex.split(flags)], sabotage), line)


def log_of_training(world_size: int, port: int, flags: Sequence[str], sabotage: str | None = None) -> str:
    """Train ITERATIONS with `flags` as one rank of `world_size`; what it prints, the losses on the last rank.

    sabotage: breaks the library, to see that somebody notices. "chunk order" leaves the zigzag's chunks as they were
    received, "lost gradients" forgets what other ranks have found for the gradients of K/V, "nan key" puts a NaN among
    the last rank's keys in a ring, and "killed rank" kills the last rank within a ring, some iterations on. Those of
    planted_cases are mistakes about data.
    """
    output = io.StringIO()
    with (
        launched(world_size, port),
        mock.patch.object(sys, "argv", [str(SCRIPT), "--train-iters", str(ITERATIONS), *flags]),
        made_up_conversations() if "--sft" in flags else contextlib.nullcontext(),
        sabotaged(sabotage, world_size),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            import mindspeed_cp.megatron_adaptor  # noqa: F401

            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"training ended with status {end.code}:\n{output.getvalue()[-2000:]}") from end
        finally:
            forget_run()
    return output.getvalue()


def num_threads() -> int:
    """How many threads this process has; each group has three of gloo's."""
    return len(list(Path("/proc/self/task").iterdir()))


def run_program(world_size: int, port: int, source: str) -> str:
    """Run a program, given as its text, as one rank of `world_size`; what it prints."""
    output = io.StringIO()
    with launched(world_size, port), contextlib.redirect_stdout(output):
        try:
            exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        finally:
            forget_run()
    return output.getvalue()


class CoreLayerResult(NamedTuple):
    """Largest difference of a layer's output from that of CP = 1, and process groups of ours while it ran and after."""

    difference: float
    groups_made: int
    groups_left: int


def attend_in_a_core_layer(world_size: int, port: int, order: str, flags: dict[str, object]) -> CoreLayerResult:
    """A layer of megatron.core as a program without an argument parser uses it, over ranks in this order of axes."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from mindspeed_cp import megatron_adaptor

    with launched(world_size, port):
        try:
            dist.init_process_group("gloo")
            config = megatron_adaptor.configure(distributed_backend="gloo", **flags)
            size = config.context_parallel_size
            parallel_state.initialize_model_parallel(context_parallel_size=size, order=order)
            # The layer of CP = 1 draws from it, and no training may have run in this process.
            model_parallel_cuda_manual_seed(1)
            groups = megatron_adaptor.plugin.groups
            made = {each.group for each in groups.parents}
            whole = torch.randn(3, 16, 2, 4, 8, generator=torch.Generator().manual_seed(1))
            rank = parallel_state.get_context_parallel_rank()
            shards = (config.layout.shard(x, rank, dim=0) for x in whole)
            out = _core_layer(size)(*shards, None)
            difference = (out - config.layout.shard(_core_layer(1)(*whole, None), rank, dim=0)).abs().max().item()
            parallel_state.destroy_model_parallel()
            left = made & set(dist.distributed_c10d._world.pg_map) - {groups.context_parallel}
            return CoreLayerResult(difference, len(made), len(left))
        finally:
            forget_run()


class RestoreDrill(NamedTuple):
    """What happened when the patches were to be undone in mid-training.

    refusal: what restore said. kept: whether the layer then gave the same bits. left: states of the patches after
    Megatron's groups were destroyed and restore was called again.
    """

    refusal: str
    kept: bool
    left: set[str]


def restore_in_mid_training(world_size: int, port: int) -> RestoreDrill:
    """Try to undo the patches while a layer of megatron.core is at work on a ring of these ranks."""
    from megatron.core import parallel_state

    from mindspeed_cp import megatron_adaptor

    with launched(world_size, port):
        try:
            dist.init_process_group("gloo")
            flags = {"context_parallel_size": world_size, "context_parallel_algo": "megatron_cp_algo"}
            config = megatron_adaptor.configure(distributed_backend="gloo", **flags)
            parallel_state.initialize_model_parallel(context_parallel_size=world_size)
            rank = parallel_state.get_context_parallel_rank()
            whole = torch.randn(3, 16, 2, 4, 8, generator=torch.Generator().manual_seed(1))
            shards = [config.layout.shard(x, rank, dim=0) for x in whole]
            layer = _core_layer(world_size)
            before = layer(*shards, None)
            try:
                megatron_adaptor.registry.restore()
                refusal = "none"
            except PatchError as error:
                refusal = str(error)
            kept = torch.equal(layer(*shards, None), before)
            parallel_state.destroy_model_parallel()
            megatron_adaptor.registry.restore()
            left = {state for _, state in megatron_adaptor.registry.status() if not state.startswith("skipped")}
            megatron_adaptor.registry.apply()
            return RestoreDrill(refusal, kept, left)
        finally:
            forget_run()


def _core_layer(context_parallel_size: int) -> Any:
    """The attention of one layer of megatron.core's."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        context_parallel_size=context_parallel_size,
    )
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def launched(world_size: int, port: int) -> contextlib.AbstractContextManager[object]:
    """The environment that torchrun gives a rank."""
    environment = {
        "LOCAL_RANK": os.environ["RANK"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MEGATRON_LOGGING_LEVEL": "40",
    }
    return mock.patch.dict(os.environ, environment)


def sabotaged(what: str | None, world_size: int) -> contextlib.AbstractContextManager[object]:
    """The library broken as `train` says; whole where `what` is None."""
    is_culprit = int(os.environ["RANK"]) == world_size - 1
    if what == "chunk order":
        # Sorted by nobody: the members' tokens one after another.
        # As a property, since earlier runs of this process have left the answer in orders that are used again.
        return mock.patch.object(GroupOrder, "is_sorted", property(lambda order: True))
    if what == "lost gradients":
        return mock.patch.object(Gradients, "_add_message", lambda self, message, received: None)
    if what == "nan key" and is_culprit:
        return mock.patch.object(RingAttention, "attend", _attend_with_nan)
    if what == "killed rank" and is_culprit:
        return mock.patch.object(ProcessGroupCommunicator, "exchange_all", _DyingExchange(after=20))
    if what in PLANTED:
        return planted(what)
    assert what in (None, "nan key", "killed rank"), what
    return contextlib.nullcontext()


def _attend_with_nan(
    ring: RingAttention, wanted: str, q: Tensor, source: Any, *rest: Any, attend: Any = RingAttention.attend
) -> tuple[Tensor, ...]:
    k, v = source
    k = k.clone()
    k[:, :, 0, 0] = torch.nan
    results: tuple[Tensor, ...] = attend(ring, wanted, q, (k, v), *rest)
    return results


class _DyingExchange:
    """An exchange after some of which the process is killed, as the machine does that runs out of memory."""

    def __init__(self, after: int) -> None:
        self._left, self._exchange = after, ProcessGroupCommunicator.exchange_all

    def __get__(self, communicator: ProcessGroupCommunicator, owner: type) -> Any:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._exchange.__get__(communicator, owner)


def forget_run() -> None:
    """What Megatron keeps of a run in globals, so that the next one starts as in a fresh process."""
    # What the losses of experts are logged with keeps groups of this run; before 0.18 it went with the others.
    if (moe_logging := sys.modules.get("megatron.core.transformer.moe.moe_logging")) is not None:
        moe_logging.destroy_moe_metrics_tracker()
    # Where the next run has more layers of multi-token prediction, it has no place for their losses.
    if (predictions := sys.modules.get("megatron.core.transformer.multi_token_prediction")) is not None:
        predictions.MTPLossLoggingHelper.tracker.clear()
    if HAS_TRAINING:
        from megatron.training import training

        training.destroy_global_state()
        # Where these are set, ranks exchange them: a rank that has run before would wait for one that has not.
        training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    else:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _let_go_of_groups()


def _let_go_of_groups() -> None:
    """Free the groups of a run: threads of gloo's wake a hundred times a second for each that is held.

    Two of Megatron's keep them for good. What an embedding has computed is cached with the embedding. And a gradient's
    accumulator has a hook that holds the data-parallel wrapper, which holds the accumulator; the collector does not
    see all of that circle.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding

    rotary_pos_embedding.RotaryEmbedding.forward.cache_clear()
    yarn_rotary_pos_embedding.YarnRotaryEmbedding.forward.cache_clear()
    for held in gc.get_objects():
        if isinstance(held, DistributedDataParallel):
            vars(held).clear()
    gc.collect()
