"""Rows of packed data, windows, sinks and dropout: the flags of each, and the mistakes that it has to notice."""

from typing import NamedTuple

from mindspeed_cp.testing.toy_flags import TOY_FLAGS
from mindspeed_cp.testing.toy_models import sizes
from system_tests.model_cases import ALGORITHMS, DATA, LENGTH, Difference, Runs, Trains

SEEN = 1e-4
"""A mistake that changes a loss by as much is noticed."""
BOUNDARY, LABEL = "a document boundary off by one", "a label shifted across a boundary"
POSITIONS, PREDICTION = "positions that run on", "a second prediction across a boundary"
WINDOW, SEED = "a window one token short", "another dropout seed"
"""The mistakes, by their names in planted_cases."""


class DataRow(NamedTuple):
    """One kind of data, or of attention.

    flags: of every run. notices: the mistakes that change its losses. sample: the algorithm, and the mistake, that CI
    tries; the table has all. alone: flags of the run with one rank.
    """

    flags: str
    notices: tuple[str, ...]
    sample: tuple[str, str]
    alone: str = ""


_TWO_SAMPLES = "--micro-batch-size 2 --global-batch-size 4"
_DOCUMENTS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"
_EXPERTS = (
    "--disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1 0.1 --moe-z-loss-coeff 0.1"
)

DATA_ROWS = {
    "documents in samples": DataRow(f"{_DOCUMENTS} {_TWO_SAMPLES}", (BOUNDARY, POSITIONS, LABEL), ("hybrid", LABEL)),
    "documents, learned positions": DataRow(
        f"{_DOCUMENTS} --position-embedding-type learned_absolute", (BOUNDARY, POSITIONS, LABEL), ("ring", POSITIONS)
    ),
    "conversations": DataRow(
        "--sft --data-path made_up --no-create-attention-mask-in-dataloader",
        (BOUNDARY, POSITIONS, LABEL),
        ("Ulysses", LABEL),
    ),
    "inter-document masking": DataRow(
        f"--dataloader-inter-document-masking {_TWO_SAMPLES} --mtp-num-layers 1 --mtp-loss-scaling-factor 1",
        (BOUNDARY, POSITIONS, LABEL, PREDICTION),
        ("double ring", PREDICTION),
    ),
    "experts beside documents": DataRow(
        f"--dataloader-inter-document-masking --micro-batch-size 1 --global-batch-size 4 {_EXPERTS}",
        (BOUNDARY, POSITIONS, LABEL),
        ("ring", BOUNDARY),
    ),
    "windows": DataRow("--window-size 8,0 --window-attn-skip-freq 2", (WINDOW, POSITIONS), ("Ulysses", WINDOW)),
    "sinks beside windows": DataRow(
        "--softmax-type learnable --window-size 8,0", (WINDOW, POSITIONS), ("double ring", POSITIONS)
    ),
    "dropout": DataRow(
        f"--attention-dropout 0.1 {_DOCUMENTS}",
        (SEED, BOUNDARY, POSITIONS, LABEL),
        ("hybrid", SEED),
        "--attention-on-one-rank",
    ),
}
"""By name; those of Megatron's flags."""


class StreamRow(NamedTuple):
    """Streams of a program's own. kind: of stream_cases. notices, sample: as of a DataRow."""

    kind: str
    notices: tuple[str, ...]
    sample: tuple[str, str]


STREAM_ROWS = {
    "PackedSeqParams with padding": StreamRow("padded", (BOUNDARY, POSITIONS, LABEL), ("ring", BOUNDARY)),
    "bins of reinforcement learning": StreamRow("bins", (BOUNDARY, POSITIONS, LABEL), ("hybrid", POSITIONS)),
}


class TrainsOnStreams(Trains):
    """Runs a program on streams, too: system_tests.conftest.TrainingPool."""

    def train_on_streams(
        self, ranks: int, kind: str, flags: dict[str, object], sabotage: str | None = None
    ) -> list[tuple[float, float]]:
        """See stream_cases.train."""
        ...


class StreamRuns:
    """As Runs, of a program's own streams."""

    def __init__(self, training: TrainsOnStreams, kind: str) -> None:
        self._training, self._kind = training, kind
        self._alone = training.train_on_streams(1, kind, {})

    def difference(self, algorithm: str, sabotage: str | None = None) -> Difference:
        """Of training on four ranks from training on one."""
        words = ALGORITHMS[algorithm]
        flags: dict[str, object] = {
            name.removeprefix("--").replace("-", "_"): int(value) if value.isdigit() else value
            for name, value in zip(words[::2], words[1::2], strict=True)
            if name != "--context-parallel-size"
        }
        shared = self._training.train_on_streams(4, self._kind, flags, sabotage)
        pairs = [*zip(*self._alone, strict=True)], [*zip(*shared, strict=True)]
        return Difference(
            *(
                max(abs(one - other) / abs(one) for one, other in zip(alone, found, strict=True))
                for alone, found in zip(*pairs, strict=True)
            )
        )


def runs_of(training: TrainsOnStreams, name: str) -> Runs | StreamRuns:
    """The runs of one row, of either kind."""
    if name in STREAM_ROWS:
        return StreamRuns(training, STREAM_ROWS[name].kind)
    row = DATA_ROWS[name]
    data = tuple(word for word in DATA if word != "--mock-data" or "--data-path" not in row.flags)
    flags = (*TOY_FLAGS, *sizes(LENGTH), *data, *row.flags.split())
    return Runs(training, flags, tuple(row.alone.split()))
