"""A corpus that is more than memory should hold: long texts in stretches, documents read again, what is planned the
same."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridges import documents, readers
from cartridges.chunking import Chunks, chunk_corpus
from cartridges.config import ChunkSettings
from cartridges.corpus import load_corpus
from cartridges.documents import Reread, stretches
from cartridges.errors import UserError
from cartridges.readers import decode, read_file
from cartridges.records import PASSAGES, Corpus, Document
from tests.test_synthesize import tiny_settings
from workflows.synthesis.dataset import plan_dataset

PARAGRAPHS = [f"Keeper {n} kept light {n * 7}. It burned {n} years.\nThe sea took it." for n in range(200)]
TEXT = "\n\n".join(PARAGRAPHS)


def write(kind, folder):
    """A corpus of the kind in `folder`: its path and the id that picks it."""
    if kind == "folder":
        (folder / "log").mkdir()
        (folder / "log" / "long.txt").write_text(TEXT)
        (folder / "log" / "short.md").write_text("# Short\n\nOne lamp.")
        (folder / "log" / "twice.txt").write_text(TEXT)
        return str(folder / "log"), None
    if kind == "file":
        (folder / "long.txt").write_text(TEXT)
        return str(folder / "long.txt"), None
    rows = [{"corpus_id": f"sea/{n}", "text": TEXT.replace("light", f"lamp {n}")} for n in range(3)]
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / "rows.jsonl"), "sea/[12]"
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet"), "sea/[12]"


@pytest.fixture
def little_memory(monkeypatch):
    """Call it, and corpora of a few thousand characters are too long to be held."""
    def lower():
        monkeypatch.setattr(documents, "HELD_CHARACTERS", 1000)
    return lower


@pytest.fixture
def short(monkeypatch):
    """Documents of more than 900 characters are long."""
    for module in ("cartridges.documents", "cartridges.readers", "cartridges.corpus"):
        monkeypatch.setattr(f"{module}.LONGEST_CHARACTERS", 900)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 501)


@pytest.mark.parametrize("kind", ["folder", "file", "jsonl", "parquet"])
def test_a_corpus_is_the_same_held_or_read_again(kind, short, little_memory, tmp_path, tiny_base_model, tiny_model_dir):
    where = write(kind, tmp_path)
    held = load_corpus(*where)
    little_memory()
    again = load_corpus(*where)
    assert isinstance(held.documents, tuple) and isinstance(again.documents, Reread)
    assert len(again.documents) == len(held.documents) > 5
    assert max(len(document.text) for document in again.documents) <= 900
    assert again.fingerprint == held.fingerprint and list(again.documents) == list(held.documents)
    assert again.text == held.text and again.spread(2000) == held.spread(2000)
    plans = []
    for name, corpus in (("held", held), ("again", again)):
        (tmp_path / name).mkdir()
        planned = plan_dataset(corpus, tmp_path / name, tiny_settings(tiny_model_dir, num_conversations=12), "f", None)
        plans.append([planned, *(pq.read_table(tmp_path / name / file).to_pylist()
                                 for file in ("chunks.parquet", "work/tasks.parquet"))])
    assert plans[0] == plans[1]
    planned, chunks, tasks = plans[0]
    assert {chunk["chunk_id"] for chunk in chunks} == {task["chunk_id"] for task in tasks}
    assert planned["chunks"] > len(chunks) and all(chunk["text"] in held.text for chunk in chunks)


def test_text_is_cut_behind_paragraphs_wherever_its_blocks_end(short):
    whole = list(stretches([TEXT]))
    assert "".join(whole) == TEXT and len(whole) > 5
    assert all(part.endswith("\n\n") and 225 < len(part) <= 900 for part in whole[:-1]) and len(whole[-1]) > 225
    for size in (1, 7, 899, 900, 901, 5000):
        assert list(stretches(TEXT[at:at + size] for at in range(0, len(TEXT), size))) == whole
    for text, longest in (("x" * 2000, 900), ("word " * 400, 900), ("a whole line\n" * 300, 897)):
        parts = list(stretches([text]))
        assert "".join(parts) == text and max(map(len, parts)) == longest


def test_a_long_file_is_read_block_by_block_as_a_short_one(short, tmp_path, monkeypatch):
    file = tmp_path / "long.txt"
    text = "\ufeff" + "Łódź 灯台\r\nkeeps\rits 🔥\n\n" * 150
    for size in (1, 2, 3, 500):
        monkeypatch.setattr(readers, "BLOCK_BYTES", size)
        file.write_bytes(text.encode())
        assert "".join(one.text for one in read_file(file)) == decode(file.read_bytes(), file)
        file.write_bytes(text.encode() + b"\xe9 and more")
        with pytest.raises(UserError, match=f"byte {len(text.encode())} cannot"):
            list(read_file(file))
        file.write_bytes("\ufeffab".encode() + b"\xe9 " + text.encode())
        with pytest.raises(UserError, match="byte 5 cannot"):
            list(read_file(file))
        file.write_bytes(text.encode() + "🔥".encode()[:2])
        with pytest.raises(UserError, match=f"byte {len(text.encode())} cannot"):
            list(read_file(file))


def test_what_changes_between_two_passes_is_one_line(short, little_memory, tmp_path):
    little_memory()
    path, _ = write("folder", tmp_path)
    corpus = load_corpus(path)
    long = tmp_path / "log" / "long.txt"
    long.write_text(TEXT.replace("Keeper 150", "Nobody"))
    with pytest.raises(UserError, match=r"changed while it was read \(at long.txt\)"):
        list(corpus.documents)
    (tmp_path / "log" / "twice.txt").unlink()
    long.unlink()
    with pytest.raises(UserError, match=r"changed while it was read \(at short.md\)"):
        list(corpus.documents)
    (tmp_path / "log" / "short.md").unlink()
    with pytest.raises(UserError, match="at its end"):
        list(corpus.documents)


def test_long_files_are_skipped_once_and_may_repeat_themselves(short, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("the same line\n" * 500)
    (tmp_path / "b.txt").write_text("the same line\n" * 500)
    (tmp_path / "blank.txt").write_text("\n" * 5000)
    (tmp_path / "c.txt").write_text("One lamp.")
    corpus = load_corpus(str(tmp_path))
    assert "skipped 2 files (1 duplicate, 1 empty)" in caplog.text
    assert "".join(one.text for one in corpus.documents if one.source == "a.txt") == "the same line\n" * 500
    assert {one.source for one in corpus.documents} == {"a.txt", "c.txt"}


def test_half_of_a_surrogate_pair_in_a_notebook_is_one_line(tmp_path):
    for length in (1, 2**21):
        file = tmp_path / "n.ipynb"
        file.write_text(json.dumps({"cells": [{"source": ["a\ud83d " + "x" * length]}]}))
        with pytest.raises(UserError, match="half of a surrogate pair at character 1"):
            load_corpus(str(file))


def test_a_table_is_read_a_few_rows_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "HELD_CHARACTERS", 2**16)
    rows = [{"corpus_id": "c", "text": f"{n} " + "x" * 20_000} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tracemalloc.start()
    assert len(load_corpus(str(tmp_path / "rows.parquet"), "c").documents) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_pass_holds_a_document_and_no_more(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "HELD_CHARACTERS", 2**20)
    file, size = tmp_path / "long.txt", 24 * 2**20
    with file.open("w") as out:
        for n in range(size // 64):
            out.write(f"{n:>62}\n\n")
    tracemalloc.start()
    corpus = load_corpus(str(file))
    assert sum(len(document.text) for document in corpus.documents) == size
    assert len(corpus.beginning(5000)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


def test_the_beginning_is_that_of_the_text():
    corpus = Corpus("c", tuple(Document(str(n), "s", paragraph) for n, paragraph in enumerate(PARAGRAPHS)), "f")
    assert corpus.beginning(10**6) == corpus.text == TEXT
    assert all(corpus.beginning(n) == TEXT[:n] for n in (1, *range(60, 140), 1000, len(TEXT)))


def test_passages_of_a_long_corpus_are_spread_over_it():
    numbers = [f"{n:05}" for n in range(20_000)]
    told = tuple(Document(str(at), "s", " ".join(numbers[at:at + 100])) for at in range(0, len(numbers), 100))
    corpus = Corpus("c", told, "f")
    assert corpus.spread(10**6) == corpus.text
    spread = corpus.spread(PASSAGES * 300)
    found = [int(word) for word in spread.split() if len(word) == 5]
    assert found[0] == 0 and found == sorted(set(found)) and PASSAGES * 45 < len(found) < PASSAGES * 50
    steps = {after - before for before, after in zip(found, found[1:], strict=False) if after - before > 3}
    assert len(found) > PASSAGES and max(steps) < len(numbers) / PASSAGES < min(steps) + 60


def test_chunks_are_given_again_by_their_ids(tiny_base_model, tmp_path):
    corpus = load_corpus(*write("jsonl", tmp_path))
    settings = ChunkSettings(max_tokens=64)
    chunks, all_of_them = Chunks(corpus, tiny_base_model.tokenizer, settings), None
    assert not list(chunks.with_ids({"no such"}))
    for _ in range(2):
        all_of_them = list(chunks)
        assert all_of_them == chunk_corpus(corpus, tiny_base_model.tokenizer, settings)
        assert len(chunks) == len(all_of_them) > 50
        assert list(chunks.with_ids({one.chunk_id for one in all_of_them[::3]})) == all_of_them[::3]
