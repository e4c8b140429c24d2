"""Generate text with prompts that are spread over ranks, with a language model of transformers as it is.

    torchrun --nproc-per-node 4 scripts/generate.py --model FOLDER --prompt-file book.txt
    torchrun --nproc-per-node 4 scripts/generate.py --model FOLDER --prompt-file book.txt --question "Who?" "Why?"
    torchrun --nproc-per-node 4 scripts/generate.py --demo --compare

FOLDER is one of Hugging Face: config.json, safetensors, tokenizer. --demo trains a small model from the text of
Python's own library first, in two minutes, and keeps it in --demo-folder. Questions are asked one after another, and
what is there before them stays in the cache. Several prompts are a batch. --compare generates on one rank too, and
exits with 1 where the tokens differ at a step at which the best logits are apart.
"""

import argparse
import io
import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar, get_args

import torch
import torch.distributed as dist

from mindspeed_cp.comm import Agreement, LostRank, ProcessGroupCommunicator, Subject
from mindspeed_cp.device import accelerator
from mindspeed_cp.inference import Coefficients, Progress, Rates, Sampling, Session, Step, measure_rates
from mindspeed_cp.inference.decode import Method
from mindspeed_cp.inference.transformers_model import Loaded, load

try:
    import transformers
except ModuleNotFoundError as error:
    print(f"generate.py: error: {error}; pip install '.[inference]' in a clone brings it along.", file=sys.stderr)
    raise SystemExit(2) from None

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_SECONDS = 1e6
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


_Prepared = TypeVar("_Prepared")


class Turn(NamedTuple):
    """Prompts of a turn as text, and as tokens, of each sequence."""

    texts: list[str]
    tokens: list[list[int]]


class Screen:
    """What rank 0 shows: how far the prompts are, then the text of a single sequence as it comes."""

    def __init__(self, loaded: Loaded, batch: int, shown: bool) -> None:
        self._tokenizer, self._shown = loaded.tokenizer, shown
        self._written: list[list[int]] = [[] for _ in range(batch)]
        self._told = ""
        self.start = time.monotonic()
        self.prefill_s = 0.0

    def progress(self, progress: Progress) -> None:
        """A chunk of the prompts is done."""
        self.prefill_s = time.monotonic() - self.start
        if self._shown:
            rate = progress.done / max(self.prefill_s, 1e-9)
            end = "\n" if progress.done == progress.of else ""
            print(
                f"\rprompt: {progress.done:,} of {progress.of:,} tokens, {rate:,.0f} a second{end}", end="", flush=True
            )

    def step(self, step: Step) -> None:
        """A token of each sequence is chosen."""
        for written, choice in zip(self._written, step.choices, strict=True):
            if choice is not None:
                written.append(choice.token)
        if self._shown and len(self._written) == 1:
            self._tell(self._tokenizer.decode(self._written[0]))

    def _tell(self, text: str, *, all_of_it: bool = False) -> None:
        """What of a text is not on the screen yet."""
        if all_of_it or not text.endswith("\ufffd"):  # The rest of a character is yet to come.
            print(text[len(self._told) :], end="", flush=True)
            self._told = text

    def finish(self) -> None:
        """The turn is over."""
        if not self._shown:
            return
        if len(self._written) == 1:
            self._tell(self._tokenizer.decode(self._written[0]), all_of_it=True)
        for number, written in enumerate(self._written):
            if len(self._written) > 1:
                print(f"--- {number}\n{self._tokenizer.decode(written)}")
        steps, tokens = max(map(len, self._written)), sum(map(len, self._written))
        spent = max(time.monotonic() - self.start - self.prefill_s, 1e-9)
        print(f"\n[{steps} tokens a sequence in {spent:.1f} s, {tokens / spent:.1f} a second]")


def generate(
    session: Session, turns: list[Turn], loaded: Loaded, sampling: Sampling, num_tokens: int, shown: bool
) -> list[list[Step]]:
    """All turns; the steps of each."""
    result = []
    for turn in turns:
        screen = Screen(loaded, len(turn.tokens), shown)
        steps = []
        for step in session.generate(
            turn.tokens, num_tokens, sampling=sampling, ends=loaded.ends, progress=screen.progress
        ):
            steps.append(step)
            screen.step(step)
        screen.finish()
        result.append(steps)
    return result


def turns_of(loaded: Loaded, options: argparse.Namespace) -> list[Turn]:
    """What is asked in each turn. Raises ValueError for what cannot be read, or is longer than the model."""
    if options.prompt is not None:
        prompts = options.prompt
    else:
        for path in options.prompt_file:
            if not path.is_file():
                raise ValueError(f"--prompt-file {path} is no file; give a text file for each sequence.")
        prompts = [path.read_text(errors="replace") for path in options.prompt_file]
    questions = options.question or [""]
    texts = [[prompt + questions[0] for prompt in prompts], *([each] * len(prompts) for each in questions[1:])]
    turns = [
        Turn(each, [loaded.tokenizer(text, add_special_tokens=not number)["input_ids"] for text in each])
        for number, each in enumerate(texts)
    ]
    highest = max((token for turn in turns for each in turn.tokens for token in each), default=0)
    if highest >= loaded.model.vocabulary:
        raise ValueError(
            f"the tokenizer gives token {highest}, and the model knows {loaded.model.vocabulary}; get both from one "
            f"place."
        )
    needed = positions(turns, options)
    if loaded.longest is not None and needed > loaded.longest:
        raise ValueError(
            f"prompts and --max-new-tokens {options.max_new_tokens} make {needed} positions, and the model has "
            f"{loaded.longest} (max_position_embeddings); shorten them, or use a model for longer texts."
        )
    return turns


def positions(turns: list[Turn], options: argparse.Namespace) -> int:
    """Of the longest sequence, with all that is written."""
    tokens = zip(*(turn.tokens for turn in turns), strict=True)
    return max(sum(map(len, each)) for each in tokens) + len(turns) * options.max_new_tokens


def compared(found: list[list[Step]], expected: list[list[Step]], dtype: torch.dtype) -> int:
    """Say how far both agree; 1 where they part at a step whose best logits are apart."""
    status, parted = 0, set()
    for turn, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for sample in sorted(set(range(len(theirs[0].choices))) - parted):
            # A sequence that has ended has no choices in steps that others still take.
            mine, one = ([each for step in steps if (each := step.choices[sample])] for steps in (ours, theirs))
            said = f"turn {turn}, sequence {sample}: "
            tokens = [[choice.token for choice in each] for each in (mine, one)]
            if tokens[0] == tokens[1]:
                print(f"{said}all {len(one)} tokens are those of one rank")
                continue
            pairs = enumerate(zip(*tokens, strict=False))
            first = next((number for number, (my, its) in pairs if my != its), min(map(len, tokens)))
            choice = one[first] if first < len(one) else None
            margin = 0.0 if choice is None else choice.margin
            print(f"{said}those of one rank up to step {first}, where the best two logits differ by {margin:.1e}")
            parted.add(sample)  # What follows answers to another text.
            status |= choice is None or not choice.is_close(dtype)
    return int(status)


def arguments() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="folder of a model: config.json, safetensors, tokenizer")
    model.add_argument("--demo", action="store_true", help="train a small model first, where --demo-folder has none")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt-file", type=Path, nargs="+", help="a text file for each sequence of a batch")
    prompts.add_argument("--prompt", nargs="+", help="likewise, the text itself")
    parser.add_argument("--question", nargs="+", help="put behind the prompt, and then behind what was answered")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of each turn")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the best token always")
    parser.add_argument("--top-k", type=int, help="draw among the k best tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the best tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same tokens, on any number of ranks")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of weights and cache; that of the folder by default")
    parser.add_argument("--device", choices=list(BACKENDS), default="cpu")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt at once, over all ranks")
    parser.add_argument("--interleave", type=int, default=64, help="tokens of a stripe of the cache")
    parser.add_argument("--prefill", choices=("auto", "pass_kv", "pass_q"), default="auto", help="what travels")
    parser.add_argument("--pieces", type=int, default=1, help="of the K/V heads, which travel one after another")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--rates", type=float, nargs=2, metavar=("FLOPS", "BYTES"), help="a second, for --prefill auto")
    rule.add_argument("--measure-rates", action="store_true", help="likewise, measured first")
    rule.add_argument("--coefficients", type=float, nargs=3, metavar=("NEW", "MISSING", "CONSTANT"), help="likewise")
    parser.add_argument("--decode", choices=("auto", *get_args(Method)), default="auto", help="how tokens meet keys")
    parser.add_argument(
        "--attention-dtype",
        choices=list(DTYPES),
        help="of scores and states; on CPUs float64 for a model in bfloat16 or float16, else that of the model",
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a rank waits for another")
    parser.add_argument("--compare", action="store_true", help="generate on one rank too")
    parser.add_argument("--demo-folder", type=Path, default=Path("runs/text_model"))
    parser.add_argument("--demo-seconds", type=float, default=120.0, help="how long it is trained")
    return parser


def main() -> int:
    """Read the command line, generate, say what it took; the exit status."""
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # What a model writes is not always in the terminal's alphabet.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    parser = arguments()
    options = parser.parse_args()
    if options.device not in ("cpu", accelerator()):
        parser.error(f"--device {options.device}: torch finds none here; use --device {accelerator() or 'cpu'}.")
    for name, seconds in ("--timeout", options.timeout), ("--demo-seconds", options.demo_seconds):
        if not 0.0 < seconds <= MOST_SECONDS:
            parser.error(f"{name} {seconds:g}: give seconds above 0, up to {MOST_SECONDS:g}.")
    device = torch.device(options.device)
    if "WORLD_SIZE" in os.environ:
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
            getattr(torch, device.type).set_device(device)
        # Training the demo's model takes longer than ranks are to wait for each other later.
        timeout = timedelta(seconds=options.timeout + (options.demo_seconds + 60.0) * options.demo)
        dist.init_process_group(BACKENDS[device.type], timeout=timeout)
    communicator = ProcessGroupCommunicator() if dist.is_initialized() else None
    rank = 0 if communicator is None else communicator.rank
    try:
        return run(options, device, communicator, rank)
    except ValueError as error:
        if rank == 0:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except LostRank as error:
        said = " ".join(str(error).split())
        print(f"\n{parser.prog}: error: rank {rank} stops: {said}; see what that rank said last.", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_all_ranks(communicator: ProcessGroupCommunicator | None, prepare: Callable[[], _Prepared]) -> _Prepared:
    """What it gives, where it does so on all ranks; what any of them refuses is raised on all."""
    refusal = prepared = None
    try:
        prepared = prepare()
    except ValueError as error:
        refusal = str(error)
        if communicator is None:
            raise
    if communicator is not None:
        subject = Subject("generate.py", "give all ranks the same folder, prompts and options")
        Agreement(communicator.apart, on_host=communicator.on_host, subject=subject).reach("ready", refusal=refusal)
    assert prepared is not None, "a refusal has raised"
    return prepared


def rates_of(
    loaded: Loaded, options: argparse.Namespace, communicator: ProcessGroupCommunicator | None
) -> Rates | None:
    """What kernel and link achieve, as told, or measured for a chunk of the prompt; None where neither is wanted."""
    if options.rates:
        return Rates(*options.rates)
    if not options.measure_rates:
        return None
    sizes = loaded.model.heads
    num_tokens = max(1, options.chunk // (1 if communicator is None else communicator.size))
    q, k, v = (
        torch.zeros(1, number, num_tokens, size, dtype=loaded.dtype, device=loaded.model.device)
        for number, size in ((sizes.query, sizes.size), (sizes.kv, sizes.size), (sizes.kv, sizes.size))
    )
    return measure_rates(q, k, v, communicator)


def attention_dtype(loaded: Loaded, options: argparse.Namespace) -> torch.dtype | None:
    """On CPUs that in which any number of ranks writes the same, see --attention-dtype."""
    if options.attention_dtype:
        return DTYPES[options.attention_dtype]
    return torch.float64 if loaded.model.device.type == "cpu" and loaded.dtype.itemsize == 2 else None


def run(
    options: argparse.Namespace, device: torch.device, communicator: ProcessGroupCommunicator | None, rank: int
) -> int:
    folder = options.demo_folder if options.demo else options.model
    if options.demo:
        import text_model

        def train() -> Path:
            if rank == 0:
                text_model.train(folder, options.demo_seconds, lambda said: print(said, flush=True))
            return folder

        on_all_ranks(communicator, train)
        if options.prompt is None and options.prompt_file is None:
            options.prompt_file = [text_model.library() / text_model.HELD_OUT]
            options.question = options.question or [text_model.GO_ON]

    def prepare() -> tuple[Loaded, list[Turn], Sampling]:
        if options.prompt is None and options.prompt_file is None:
            raise ValueError("there is no prompt; give --prompt-file, or --prompt.")
        if options.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {options.max_new_tokens} of each turn: give 1 or more.")
        sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
        )
        loaded = load(folder, dtype=DTYPES.get(options.dtype), device=device)
        turns = turns_of(loaded, options)
        return loaded._replace(model=loaded.model.for_length(positions(turns, options))), turns, sampling

    loaded, turns, sampling = on_all_ranks(communicator, prepare)
    settings = {
        "chunk": options.chunk,
        "interleave": options.interleave,
        "strategy": options.prefill,
        "pieces": options.pieces,
        "rates": rates_of(loaded, options, communicator),
        "coefficients": options.coefficients and Coefficients(*options.coefficients),
        "attention_dtype": attention_dtype(loaded, options),
    }
    batch = len(turns[0].tokens)
    session = on_all_ranks(
        communicator, lambda: Session(loaded.model, batch, communicator, decode=options.decode, **settings)
    )
    found = generate(session, turns, loaded, sampling, options.max_new_tokens, shown=rank == 0)
    memory = torch.tensor([session.cache.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
    rows = memory[None] if communicator is None else communicator.all_gather(memory.to(device)).cpu()
    if rank == 0:
        for number, (cache, peak) in enumerate(rows.tolist()):
            print(f"rank {number}: {cache / 2**20:.2f} MiB of K/V, {peak / 2**20:.0f} MiB at most in all")
    if not options.compare or rank:
        return 0
    alone = Session(loaded.model, batch, **settings)
    expected = generate(alone, turns, loaded, sampling, options.max_new_tokens, shown=False)
    print(f"one rank: {alone.cache.nbytes / 2**20:.2f} MiB of K/V")
    return compared(found, expected, loaded.dtype)


if __name__ == "__main__":
    sys.exit(main())
