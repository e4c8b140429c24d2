"""The corpus tool: what goes in comes out of Megatron's own reader."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the corpus tool writes Megatron's format")

from megatron.core.datasets.indexed_dataset import IndexedDataset

from scripts.build_corpus import END_OF_DOCUMENT, build_corpus, decode, encode, text_files

SCRIPT = Path(__file__).parents[3] / "scripts" / "build_corpus.py"


def test_decode_inverts_encode_and_documents_end():
    text = bytes(range(256))
    assert decode(encode(text)) == text
    assert encode(text)[-1] == END_OF_DOCUMENT == 256


def test_megatron_reads_back_every_file_as_a_document(tmp_path):
    texts = ["first\n", "zweite Zeile: ä\n", "x" * 1000]
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    (tmp_path / "empty.txt").touch()
    documents, tokens = build_corpus([*files, tmp_path / "empty.txt"], tmp_path / "sub" / "corpus")
    dataset = IndexedDataset(str(tmp_path / "sub" / "corpus"))
    assert (documents, tokens) == (3, sum(len(text.encode()) + 1 for text in texts))
    assert [decode(dataset[number]).decode() for number in range(3)] == texts
    assert len(dataset.document_indices) == 4


def test_size_limit_ends_after_the_document_that_reaches_it(tmp_path):
    files = [tmp_path / f"{number}.txt" for number in range(4)]
    for file in files:
        file.write_text("x" * 9)
    assert build_corpus(files, tmp_path / "corpus", max_bytes=15) == (2, 20)


def test_folders_are_searched_for_the_given_endings_in_order(tmp_path):
    for name in ("b.py", "a.py", "c.txt", "sub/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in text_files([tmp_path], (".py",))]
    assert found == ["a.py", "b.py", "sub/d.py"]


@pytest.mark.parametrize(
    ("paths", "message"), [(["missing"], "there is no missing"), (["."], "no text found: no file ending in .py")]
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, paths, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["build_corpus.py", "--output", "corpus", "--suffix", ".py", "--", *paths])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
