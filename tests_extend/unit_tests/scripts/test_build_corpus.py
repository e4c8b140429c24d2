"""The corpus tool: what goes in comes out of Megatron's own reader."""

import pytest

pytest.importorskip("megatron.core", reason="the corpus tool writes Megatron's format")

from megatron.core.datasets.indexed_dataset import IndexedDataset

END_OF_DOCUMENT = 256


def test_megatron_reads_back_every_file_as_a_document_of_its_bytes(tmp_path, run_script):
    texts = [bytes(range(256)), "zweite Zeile: ä\n".encode(), b"x" * 1000]
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text)
    (tmp_path / "empty.txt").touch()
    corpus = tmp_path / "sub" / "corpus"
    ended = run_script("build_corpus.py", "--output", corpus, *files, tmp_path / "empty.txt")
    assert f"3 documents, {sum(len(text) + 1 for text in texts)} tokens" in ended.out
    dataset = IndexedDataset(str(corpus))
    assert [list(dataset[number]) for number in range(3)] == [[*text, END_OF_DOCUMENT] for text in texts]
    assert len(dataset.document_indices) == 4


def test_size_limit_ends_after_the_document_that_reaches_it(tmp_path, run_script):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x" * 9)
    ended = run_script("build_corpus.py", "--output", tmp_path / "corpus", "--max-megabytes", 15e-6, tmp_path)
    assert "2 documents, 20 tokens" in ended.out


def test_folders_are_searched_for_the_given_endings_in_order(tmp_path, run_script):
    for name in ("b.py", "a.py", "c.txt", "sub/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    run_script("build_corpus.py", "--output", tmp_path / "corpus", "--suffix", ".py", "--", tmp_path)
    dataset = IndexedDataset(str(tmp_path / "corpus"))
    assert ["".join(map(chr, dataset[number][:-1])) for number in range(len(dataset))] == ["a.py", "b.py", "sub/d.py"]


@pytest.mark.parametrize(
    ("paths", "message"), [(["missing"], "there is no missing"), (["."], "no text found: no file ending in .py")]
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, run_script, paths, message):
    monkeypatch.chdir(tmp_path)
    ended = run_script("build_corpus.py", "--output", "corpus", "--suffix", ".py", "--", *paths)
    assert ended.status == 2
    assert message in ended.err.splitlines()[-1]
