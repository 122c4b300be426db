"""Parquet and Hugging Face datasets as corpora: the same documents as from a JSONL, and one line a mistake."""

import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridges.corpus import load_corpus
from tests.test_corpus import one_line, write_jsonl

ROWS = [{"corpus_id": f"{kind}/{n}", "text": f"{kind} {n}\r\nend",
         "questions": [{"id": f"{kind}{n}", "question": "q?", "answers": [str(n)]},
                       {"id": f"{kind}{n}o", "question": "which?", "options": ["x", "y"], "gold": 1}]}
        for kind in ("x", "y") for n in range(3)]


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


@pytest.fixture(params=["file", "folder", "dataset"])
def stored(request, tmp_path):
    """`ROWS` in each of the three forms."""
    where = tmp_path / "rows"
    if request.param == "file":
        return write_parquet(tmp_path / "rows.parquet", ROWS, row_group_size=2)
    if request.param == "dataset":
        datasets.Dataset.from_list(ROWS).save_to_disk(where)
        return str(where)
    where.mkdir()
    write_parquet(where / "part-1.parquet", ROWS[4:])
    write_parquet(where / "part-0.parquet", ROWS[:4])
    return str(where)


@pytest.mark.parametrize("corpus_id", ["x/1", "y/*", "*"])
def test_a_table_is_the_jsonl_of_its_rows(stored, tmp_path, corpus_id):
    table, lines = load_corpus(stored, corpus_id), load_corpus(write_jsonl(tmp_path / "r.jsonl", ROWS), corpus_id)
    assert (table.corpus_id, table.text, table.fingerprint) == (lines.corpus_id, lines.text, lines.fingerprint)
    assert table.questions == lines.questions and len(table.questions) == 2 * len(table.documents)


def test_ids_are_asked_for_as_in_a_jsonl(stored):
    one_line(lambda: load_corpus(stored), "6 corpora", "--corpus-id", "x/0")
    one_line(lambda: load_corpus(stored, "z"), "no corpus id 'z'", "x/0")


def test_without_ids_the_rows_are_documents_of_one_corpus(tmp_path, caplog):
    rows = [{"text": text, "n": 1} for text in ("one", "", "two", "one", "  ")] + [{"text": None, "n": 2}]
    path = write_parquet(tmp_path / "wiki.parquet", rows)
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(path)
    assert corpus.text == "one\n\ntwo" and corpus.corpus_id == "wiki"
    assert [document.source for document in corpus.documents] == ["wiki.parquet:1", "wiki.parquet:3"]
    assert "skipped 4 rows (1 duplicate, 3 without text)" in caplog.text
    assert load_corpus(path, "mine").corpus_id == "mine"


def test_one_id_in_every_row_needs_no_choice(tmp_path):
    path = write_parquet(tmp_path / "r.parquet", [{"corpus_id": "a", "text": t} for t in ("one", "two")])
    assert load_corpus(path).corpus_id == "a" and load_corpus(path).text == "one\n\ntwo"


def test_the_only_column_of_strings_is_the_text(tmp_path):
    assert load_corpus(write_parquet(tmp_path / "c.parquet", [{"content": "body", "stars": 3}])).text == "body"
    several = write_parquet(tmp_path / "d.parquet", [{"title": "t", "body": "b"}])
    one_line(lambda: load_corpus(several), "no column", "title, body", "rename")
    numbers = write_parquet(tmp_path / "e.parquet", [{"text": 3}])
    one_line(lambda: load_corpus(numbers), "row 1", "not a string")
    blank = write_parquet(tmp_path / "f.parquet", [{"text": " "}])
    one_line(lambda: load_corpus(blank), "is empty")


def test_each_table_mistake_has_its_line(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 nothing")
    one_line(lambda: load_corpus(str(broken)), "broken.parquet", "cannot be read as a table")
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS[:1]) for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "splits")
    one_line(lambda: load_corpus(str(tmp_path / "splits")), "several splits", "splits/test", "splits/train")
    assert load_corpus(str(tmp_path / "splits" / "train")).corpus_id == "x/0"
    for file in (tmp_path / "splits" / "test").glob("*.arrow"):
        file.unlink()
    one_line(lambda: load_corpus(str(tmp_path / "splits" / "test")), "splits/test", "cannot be read as a table")


def test_a_folder_of_other_files_too_is_walked(tmp_path):
    write_parquet(tmp_path / "data.parquet", ROWS)
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "state.json").write_text("")  # as a dataset on disk has, but this is none
    assert load_corpus(str(tmp_path)).text == "notes"
