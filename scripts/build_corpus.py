"""Turn text files into an indexed data set for Megatron, one token a byte.

    python scripts/build_corpus.py --output runs/corpus docs src/*.py

writes runs/corpus.bin and runs/corpus.idx, to be trained on with
`--data-path runs/corpus --tokenizer-type NullTokenizer --vocab-size 257`: tokens 0 to 255 are bytes, 256 ends a text.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

END_OF_DOCUMENT = 256


def text_files(paths: Iterable[Path], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The files among `paths`, and those with one of `suffixes` in folders among them, sorted within each."""
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        else:
            yield path


def encode(text: bytes) -> np.ndarray:
    """Tokens of one document, [bytes + 1] uint16."""
    return np.append(np.frombuffer(text, dtype=np.uint8).astype(np.uint16), np.uint16(END_OF_DOCUMENT))


def decode(tokens: np.ndarray) -> bytes:
    """The bytes of a document from its tokens: the inverse of `encode`."""
    return tokens[tokens != END_OF_DOCUMENT].astype(np.uint8).tobytes()


def build_corpus(files: Iterable[Path], output: Path, max_bytes: int | None = None) -> tuple[int, int]:
    """Write `files`, each a document, to `output`.bin and `output`.idx until `max_bytes` are reached.

    Empty files are left out. Returns the numbers of documents and of tokens.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=np.uint16)
    documents = tokens = 0
    for file in files:
        if max_bytes is not None and tokens >= max_bytes:
            break
        text = file.read_bytes()
        if text:
            document = encode(text)
            builder.add_document(torch.from_numpy(document.astype(np.int32)), [len(document)])
            documents, tokens = documents + 1, tokens + len(document)
    builder.finalize(f"{output}.idx")
    return documents, tokens


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="text files, and folders to search for them")
    parser.add_argument("--output", required=True, type=Path, help="path of the data set, without .bin")
    parser.add_argument("--suffix", nargs="+", default=[".py", ".md", ".txt"], help="files to take from folders")
    parser.add_argument("--max-megabytes", type=float, help="stop after the document that reaches this size")
    args = parser.parse_args()
    if missing := [path for path in args.paths if not path.exists()]:
        parser.error(f"there is no {missing[0]}")

    max_bytes = None if args.max_megabytes is None else int(args.max_megabytes * 1e6)
    documents, tokens = build_corpus(text_files(args.paths, tuple(args.suffix)), args.output, max_bytes)
    if not documents:
        parser.error(f"no text found: no file ending in {' or '.join(args.suffix)} that is not empty")
    print(f"{args.output}.bin: {documents} documents, {tokens} tokens, {tokens // documents} each on average")


if __name__ == "__main__":
    main()
