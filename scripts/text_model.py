"""A small language model that writes Python, trained here in minutes from the text of Python's own library.

A Qwen3 as transformers has it, with a tokenizer of byte pairs, in a Hugging Face folder. The first and the last layer
see a window no longer than the short stretches that it is mostly trained on: there the thousandth token is computed as
the hundredth is. The one between sees everything: for it positions of the stretches jump at one place (PoSE,
arXiv:2309.10400), so that it knows long distances too, and some stretches are long.
"""

import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

HELD_OUT = "queue.py"
"""What the model has not seen; a prompt of some 4,000 tokens."""

GO_ON = "\n\n    def "
"""Behind it: the file is over, and the model would say so."""

VOCABULARY, END = 768, "<|endoftext|>"
LONGEST = 16384
STRETCHES = ((12, 192), (12, 192), (1, 2304))
"""Numbers and lengths of the stretches that are trained on, in turn: the long ones teach to find a word among many."""
WINDOW = 192

CORPUS_BYTES = 3_000_000


def library() -> Path:
    """The folder of Python's own library."""
    return Path(sysconfig.get_path("stdlib"))


def corpus() -> list[str]:
    """The text of its modules, up to so many bytes."""
    texts, room = [], CORPUS_BYTES
    for path in sorted(library().glob("*.py")):
        if path.name == HELD_OUT or room <= 0:
            continue
        texts.append(path.read_text(errors="ignore"))
        room -= len(texts[-1])
    return texts


def tokenizer_of(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte pairs, learnt from texts: it can say everything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def train(folder: Path, seconds: float, tell: Callable[[str], None], seed: int = 0) -> None:
    """Put the model into a folder, trained for so long; nothing is done where there is one.

    It is there as a whole or not at all. Raises ValueError for a folder that cannot be made, or has other files.
    """
    if (folder / "config.json").is_file():
        return
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files than a model; give an empty folder, or a new one.")
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error}); give another one.") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # The other ranks wait for this one.
    start = time.monotonic()
    torch.manual_seed(seed)
    texts = corpus()
    tokenizer = tokenizer_of(texts)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    tokens = torch.tensor([token for text in ids for token in text])
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=len(layers),
        layer_types=layers,
        use_sliding_window=True,
        sliding_window=WINDOW,
        head_dim=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95))
    tell(f"training {sum(x.numel() for x in model.parameters()):,} parameters on {len(tokens):,} tokens of {library()}")
    step, told = 0, start
    while (spent := (time.monotonic() - start) / seconds) < 1.0 or step == 0:  # Once, however slow the machine is.
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, 3.0 * max(0.0, 1.0 - spent) + 0.03)
        loss = _loss(model, tokens, *STRETCHES[step % len(STRETCHES)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - told > 10.0:
            told = time.monotonic()
            tell(f"{told - start:4.0f} s of {seconds:.0f}, step {step}: loss {loss.item():.3f}")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.replace(folder)
    tell(f"loss {loss.item():.3f} after {step} steps; kept in {folder}")
    torch.set_num_threads(threads)


def _loss(model: transformers.Qwen3ForCausalLM, tokens: Tensor, batch: int, length: int) -> Tensor:
    """Of stretches drawn at random, whose positions jump at one place."""
    first = torch.randint(len(tokens) - length - 1, (batch, 1))
    drawn = tokens[first + torch.arange(length + 1)]
    jump = torch.randint(LONGEST - length, (batch, 1)) * (torch.rand(batch, 1) < 0.5)
    place = torch.randint(1, length, (batch, 1))
    positions = torch.arange(length) + jump * (torch.arange(length) >= place)
    logits = model(input_ids=drawn[:, :-1], position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())
