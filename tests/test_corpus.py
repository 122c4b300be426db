"""Corpora as people have them, the one line each mistake gets, and what a chunk guarantees."""

import json
import logging
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cartridges.chunking import chunk_corpus, chunk_document
from cartridges.config import ChunkSettings
from cartridges.corpus import holds_text, load_corpus, load_questions
from cartridges.errors import UserError
from cartridges.records import Document


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte: no merges, so counts are easy to reason about."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def one_line(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------- folders and files

def test_folder_is_walked_in_order_and_respects_gitignore(tmp_path, caplog):
    (tmp_path / "b.md").write_text("# B\n\nbee")
    (tmp_path / "a.txt").write_text("ay")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("x = 1\n")
    (tmp_path / "sub" / "keep.log").write_text("kept")
    (tmp_path / "sub" / ".gitignore").write_text("!keep.log\n")
    (tmp_path / "drop.log").write_text("dropped")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "out.txt").write_text("ignored")
    (tmp_path / ".gitignore").write_text("*.log\nbuild/\n")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / "copy.txt").write_text("ay")
    (tmp_path / "void.txt").write_text(" \n")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(str(tmp_path))
    assert [d.source for d in corpus.documents] == ["a.txt", "b.md", "sub/c.py", "sub/keep.log"]
    assert corpus.corpus_id == tmp_path.name
    assert "skipped 3 files (1 binary, 1 duplicate, 1 empty)" in caplog.text


def test_a_subfolder_goes_by_the_rules_of_its_repository(tmp_path):
    for name in ("pkg/a.py", "pkg/a.gen.py", "pkg/sub/b.gen.py", "pkg/sub/keep.gen.py", "pkg/own.txt", "build/out.py",
                 "build/in/deep.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / ".gitignore").write_text("*.gen.py\nbuild/\n")
    (tmp_path / "pkg" / "sub" / ".gitignore").write_text("!keep.gen.py\n")

    def read(folder):
        return [document.source for document in load_corpus(str(tmp_path / folder)).documents]

    assert "a.gen.py" in read("pkg")  # no repository: rules above say nothing
    (tmp_path / ".git" / "info").mkdir(parents=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("own.txt\n")
    assert read("pkg") == ["a.py", "sub/keep.gen.py"]
    assert read("pkg/sub") == ["keep.gen.py"] and "build/out.py" not in read(".")
    assert read("build") == ["out.py", "in/deep.py"] and read("build/in") == ["deep.py"]  # asked for by name


def test_all_files_that_are_not_utf8_are_named_at_once(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "fine.py").write_text("x = 1")
    one_line(lambda: load_corpus(str(tmp_path)), "12 files", "00.py", "07.py and 4 more", "iconv")


def test_rows_in_a_folder_are_their_text(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "One lamp.", "id": 1}, {"text": "Two keepers."}])
    write_jsonl(tmp_path / "events.ndjson", [{"event": "lit"}])
    corpus = load_corpus(str(tmp_path))
    assert {one.source: one.text.strip() for one in corpus.documents} == {
        "rows.jsonl": "One lamp.\n\nTwo keepers.", "events.ndjson": '{"event": "lit"}'}


def test_what_is_nested_too_deeply_is_one_line(tmp_path):
    for name in ("deep.jsonl", "deep.ipynb"):
        (tmp_path / name).write_text("[" * 100_000)
        one_line(lambda name=name: load_corpus(str(tmp_path / name)), name)


def test_rows_that_stand_there_twice_are_counted(tmp_path, caplog):
    texts = ["Same", "Same", "Other", "Same", ""]
    with caplog.at_level(logging.WARNING):
        assert len(load_corpus(write_jsonl(tmp_path / "rows.jsonl", [
            {"corpus_id": f"r/{n}", "text": text} for n, text in enumerate(texts[:4])]), "r/*").documents) == 2
        pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
        assert len(load_corpus(str(tmp_path / "rows.parquet")).documents) == 2
    assert "rows.jsonl: skipped 2 rows (2 duplicate)" in caplog.text
    assert "rows.parquet: skipped 3 rows (2 duplicate, 1 without text)" in caplog.text


def test_fingerprint_follows_bytes_and_order(tmp_path):
    rows = [{"corpus_id": "a", "text": "one"}, {"corpus_id": "b", "text": "two"}]
    forward = load_corpus(write_jsonl(tmp_path / "f.jsonl", rows), "*")
    backward = load_corpus(write_jsonl(tmp_path / "g.jsonl", rows[::-1]), "*")
    again = load_corpus(str(tmp_path / "f.jsonl"), "?")
    assert forward.fingerprint == again.fingerprint != backward.fingerprint
    assert len(forward.documents[0].document_id) == 32
    assert forward.text == "one\n\ntwo"


def test_html_and_notebook_become_text(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><head><title>no</title></head><body><h2>Tolls</h2><p>A <b>bold</b> fee.</p>"
                    "<script>no()</script><table><tr><td>oar</td><td>3</td></tr></table></body></html>")
    text = load_corpus(str(page)).text
    assert text.startswith("## Tolls\n\nA bold fee.") and "| oar | 3" in text and "no" not in text
    notebook = tmp_path / "n.ipynb"
    notebook.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T\n", "prose"]},
                                              {"cell_type": "code", "source": "x = 1", "outputs": [1]}]}))
    assert load_corpus(str(notebook)).text == "# T\nprose\n\nx = 1"


def test_pdf_text_is_read(tmp_path):
    content = b"BT /F1 12 Tf 20 100 Td (Harbour toll is 41 crowns.) Tj ET"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
               b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R/Resources<</Font<</F1 "
               b"5 0 R>>>>>>",
               b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
               b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    pdf, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(pdf))
        pdf += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % o for o in offsets)
    path = tmp_path / "tolls.pdf"
    path.write_bytes(pdf + table + b"trailer<</Root 1 0 R/Size 6>>\nstartxref\n%d\n%%%%EOF" % len(pdf))
    assert load_corpus(str(path)).text == "Harbour toll is 41 crowns."
    path.write_bytes(b"%PDF-1.4 nothing")
    one_line(lambda: load_corpus(str(path)), "tolls.pdf", "not a readable PDF")


def test_each_file_mistake_has_its_line(tmp_path):
    one_line(lambda: load_corpus(str(tmp_path / "none")), "does not exist")
    one_line(lambda: load_corpus(str(tmp_path)), "is empty")
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n")
    one_line(lambda: load_corpus(str(blank)), "is empty")
    binary = tmp_path / "a.bin"
    binary.write_bytes(b"\x7fELF\0\0\x01")
    one_line(lambda: load_corpus(str(binary)), "a.bin", "binary")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("abc é".encode("latin-1"))
    one_line(lambda: load_corpus(str(latin)), "latin.txt", "not UTF-8", "byte 4", "iconv")
    one_line(lambda: load_corpus(str(tmp_path)), "latin.txt", "not UTF-8")
    latin.write_bytes("abc".encode("utf-16"))
    one_line(lambda: load_corpus(str(latin)), "UTF-16", "iconv")
    os.mkfifo(tmp_path / "pipe.txt")
    one_line(lambda: load_corpus(str(tmp_path / "pipe.txt")), "neither a file nor a folder")


# ---------------------------------------------------------------- JSONL

def test_rows_are_picked_by_id_and_joined_by_pattern(tmp_path):
    rows = [{"corpus_id": f"{kind}/{n}", "text": f"{kind} {n}",
             "questions": [{"id": f"{kind}{n}", "question": "q?", "answers": [str(n)]}]}
            for kind in ("x", "y") for n in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    one = load_corpus(path, "x/1")
    assert one.corpus_id == "x/1" and one.text == "x 1" and one.questions[0].answers == ("1",)
    joined = load_corpus(path, "y/*")
    assert joined.text == "y 0\n\ny 1\n\ny 2" and [q.question_id for q in joined.questions] == [
        "y0", "y1", "y2"]
    assert joined.corpus_id == "y/*"
    assert [q.question_id for q in load_questions(path, "y/*")] == ["y0", "y1", "y2"]
    assert holds_text(path)
    one_line(lambda: load_corpus(path), "6 corpora", "--corpus-id", "x/0", "6 in all")
    one_line(lambda: load_corpus(path, "z"), "no corpus id 'z'", "x/0")


def test_each_row_mistake_has_its_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"corpus_id": "a", "text": "t"}\n\n{"corpus_id": \n')
    one_line(lambda: load_corpus(str(path), "a"), "line 3", "not JSON")
    path.write_text("[1]\n")
    one_line(lambda: load_corpus(str(path)), "line 1", "not a JSON object")
    path.write_text("\n")
    one_line(lambda: load_corpus(str(path)), "is empty")
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"eng": "a", "kgv": "b"}, {"eng": "c", "kgv": "d"}])
    for corpus_id in (None, "a"):
        one_line(lambda chosen=corpus_id: load_corpus(pairs, chosen),
                 "line 1", "eng, kgv", "corpus_id and text")
    for text, word in (("", "empty"), (3, "not a string"), ("a\ud800", "surrogate")):
        row = write_jsonl(tmp_path / "row.jsonl", [{"corpus_id": "a", "text": text}])
        one_line(lambda path=row: load_corpus(path), "line 1", word)


@pytest.mark.parametrize("question,words", [
    ({"question": "q?"}, ("answers",)),
    ({"question": "q?", "answers": []}, ("answers",)),
    ({"question": "q?", "answers": "x"}, ("answers",)),
    ({"question": " ", "answers": ["x"]}, ("question",)),
    ({"question": "q?", "options": ["x"], "gold": 0}, ("options",)),
    ({"question": "q?", "options": ["x", "y"], "gold": 2}, ("gold", "0 to 1")),
    ({"question": "q?", "options": ["x", "y"], "gold": True}, ("gold",)),
    ("q?", ("question",)),
])
def test_malformed_questions_have_their_line(tmp_path, question, words):
    path = write_jsonl(tmp_path / "q.jsonl", [{"corpus_id": "a", "questions": [
        {"question": "fine?", "answers": ["x"]}, question]}])
    one_line(lambda: load_questions(path), "line 1 question 2", *words)


def test_questions_without_text_options_and_plain_rows(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"corpus_id": "a", "questions": [
        {"question": "which?", "options": ["x", "y"], "gold": 1}]}])
    (question,) = load_questions(path)
    assert question.answers == ("y",) and question.gold == 1 and question.question_id == "a#0"
    assert not holds_text(path)
    plain = write_jsonl(tmp_path / "p.jsonl", [{"question": "who?", "answers": ["me"]}] * 2)
    assert [q.question_id for q in load_questions(plain)] == ["1", "2"]
    twice = write_jsonl(tmp_path / "t.jsonl", [{"id": "s", "question": "who?", "answers": ["me"]}] * 2)
    one_line(lambda: load_questions(twice), "'s'", "twice")
    empty = write_jsonl(tmp_path / "e.jsonl", [{"corpus_id": "a", "text": "t"}])
    one_line(lambda: load_questions(empty, "a"), "no questions", "'a'")
    (tmp_path / "none.jsonl").write_text("")
    one_line(lambda: load_questions(str(tmp_path / "none.jsonl")), "is empty")
    one_line(lambda: load_questions(str(tmp_path / "gone.jsonl")), "does not exist")


# ---------------------------------------------------------------- chunks

def check_chunks(document: Document, tokenizer, max_tokens: int) -> list[str]:
    chunks = chunk_document(document, tokenizer, ChunkSettings(max_tokens=max_tokens))
    at = 0
    for chunk in chunks:
        assert document.text[chunk.start:chunk.end] == chunk.text and chunk.text.strip()
        assert len(tokenizer(chunk.text, add_special_tokens=False)["input_ids"]) <= max_tokens
        assert not document.text[at:chunk.start].strip(), "text lost between chunks"
        at = chunk.end
    assert not document.text[at:].strip()
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)
    return [chunk.text for chunk in chunks]


@pytest.mark.parametrize("seed", range(40))
def test_chunks_lose_nothing_and_stay_short(byte_tokenizer, seed):
    rng = random.Random(seed)
    atoms = ["word ", "Ends. ", "\n", "\n\n", "# Head\n", "| a | b |\n", "- item\n", "漢字。", "é", " \t",
             "x" * 50, "    code()\n", "\n\ndef f():\n", "😀", "\u2028"]
    text = "".join(rng.choice(atoms) for _ in range(rng.randint(1, 400)))
    source = rng.choice(["a.md", "b.py", "c"])
    check_chunks(Document("d", source, text), byte_tokenizer, rng.choice([16, 40, 200]))


def test_chunks_keep_paragraphs_sections_and_rows_whole(byte_tokenizer):
    prose = "# One\n\nAlpha is here and stays.\n\nBeta follows it closely.\n\n# Two\n\nGamma is last of all."
    assert check_chunks(Document("d", "a.md", prose), byte_tokenizer, 70) == [
        "# One\n\nAlpha is here and stays.\n\nBeta follows it closely.", "# Two\n\nGamma is last of all."]
    table = "\n".join(f"| boat{n} | {n} |" for n in range(30))
    for chunk in check_chunks(Document("d", "t.md", table), byte_tokenizer, 64):
        assert all(line.startswith("| boat") and line.endswith(" |") for line in chunk.split("\n"))
    wrapped = "The long first sentence runs\nover a line. The second one\ndoes so too. Third ends."
    assert check_chunks(Document("d", "w.txt", wrapped), byte_tokenizer, 45) == [
        "The long first sentence runs\nover a line.", "The second one\ndoes so too. Third ends."]


def test_code_is_cut_between_definitions(byte_tokenizer):
    code = "\n\n".join(f"def f{n}():\n    # note\n    return {n}\n" for n in range(5))
    chunks = check_chunks(Document("d", "m.py", code), byte_tokenizer, 80)
    assert len(chunks) > 1 and all(chunk.startswith("def f") for chunk in chunks)


def test_chunk_ids_are_deterministic_and_differ_by_document(byte_tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "f.jsonl", [{"corpus_id": "a", "text": "same words " * 20},
                                              {"corpus_id": "b", "text": "same words " * 20 + "."}])
    settings = ChunkSettings(max_tokens=32)
    first = chunk_corpus(load_corpus(path, "*"), byte_tokenizer, settings)
    assert first == chunk_corpus(load_corpus(path, "*"), byte_tokenizer, settings)
    assert len({chunk.chunk_id for chunk in first}) == len(first)
