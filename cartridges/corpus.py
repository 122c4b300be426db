"""Reads the user's files into a `Corpus` and its questions.

A corpus is a folder, one file, or rows with `corpus_id` and `text` (and `questions`) of a JSONL, of
Parquet files or of a Hugging Face dataset on disk.
"""

import fnmatch
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from cartridges import jsonl
from cartridges.documents import LONGEST_CHARACTERS, Documents, gather, ids_of
from cartridges.errors import UserError
from cartridges.jsonl import Row
from cartridges.readers import ROW_SUFFIXES, check_unicode, hash_bytes, read_file, split, walk
from cartridges.records import Corpus, Document, Question
from cartridges.tables import Table, is_table, open_table

logger = logging.getLogger(__name__)

IDS_SHOWN = 4


def load_corpus(path: str, corpus_id: str | None = None) -> Corpus:
    """The corpus at `path`: a folder (read recursively), one file, a JSONL, Parquet, or a Hugging Face dataset.

    In a JSONL, and in a table with a column `corpus_id`, `corpus_id` selects one row, or by a shell pattern
    (`services/*`) several, joined in file order with their questions. Otherwise it only names the corpus: a
    table without that column is one corpus, and each row is a document.
    Raises a one-line `UserError` for anything that cannot be read as requested.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UserError(f"corpus {path} does not exist")
    if is_table(where):
        return _from_table(open_table(where), corpus_id)
    if where.is_dir():
        return _from_folder(where, corpus_id)
    if not where.is_file():
        raise UserError(f"corpus {path} is neither a file nor a folder")
    if where.suffix.lower() in ROW_SUFFIXES:
        return _from_jsonl(where, corpus_id)
    return _build(corpus_id or where.stem, gather(lambda: read_file(where, source=where.name)), where)


def load_questions(path: str, corpus_id: str | None = None) -> tuple[Question, ...]:
    """The questions of the rows that `corpus_id` selects in the JSONL at `path`, as in `load_corpus`.

    Rows are corpora with a `questions` list (`text` is not needed), or plain questions, one per line.
    Raises `UserError` for an empty file, no questions under that id, or a malformed question.
    """
    where = Path(path).expanduser()
    if not where.is_file():
        raise UserError(f"questions file {path} does not exist" if not where.exists()
                        else f"questions file {path} is not a file")
    if "question" in next(jsonl.rows(where))[1]:
        return _unique([_parse_question(row, f"{where} {line}", line.removeprefix("line "))
                        for line, row in jsonl.rows(where)], where)
    places = {place for place, _ in _select(_outlines(where), corpus_id, where)}
    questions = _questions_of(_at(places, jsonl.rows(where)), where)
    if not questions:
        asked = f" for corpus id {corpus_id!r}" if corpus_id else ""
        raise UserError(f"{path} has no questions{asked}; each row needs a non-empty \"questions\" list")
    return questions


def ids_with_questions(path: str) -> frozenset[str]:
    """The corpus ids of the rows with questions in the JSONL at `path`. Raises `UserError` for a row without an id."""
    return frozenset(name for name, row in _rows_by_id(path) if row.get("questions"))


def corpus_ids(path: str) -> tuple[str, ...]:
    """The corpus ids in the JSONL at `path`, one per row. Raises `UserError` for a row without one."""
    return tuple(name for name, _ in _rows_by_id(path))


def _rows_by_id(path: str) -> Iterator[tuple[str, dict]]:
    for place, row in jsonl.rows(Path(path).expanduser()):
        if not row.get("corpus_id"):
            raise UserError(f"{path} {place} has no corpus_id")
        yield str(row["corpus_id"]), row


def holds_text(path: str) -> bool:
    """Whether the JSONL at `path` contains corpus texts, so that `load_corpus` can read it too."""
    return any(str(row.get("text") or "").strip() for _, row in jsonl.rows(Path(path).expanduser()))


def has_corpus(path: str, corpus_id: str) -> bool:
    """Whether `corpus_id` selects rows of the JSONL at `path`."""
    return bool(_matching(_outlines(Path(path).expanduser()), corpus_id))


def fingerprint(document_ids: Iterable[str]) -> str:
    """SHA-256 (32 hex digits) over the document ids in order."""
    return hashlib.sha256("\n".join(document_ids).encode()).hexdigest()[:32]


def _build(corpus_id: str, documents: Documents, where: Path, questions: tuple[Question, ...] = ()) -> Corpus:
    if not any(document.text.strip() for document in documents):
        raise UserError(f"corpus {where} is empty: there is no text in it")
    return Corpus(corpus_id, documents, fingerprint(ids_of(documents)), questions)


def _from_folder(folder: Path, corpus_id: str | None) -> Corpus:
    skipped: Counter = Counter()

    def read() -> Iterator[Document]:
        skipped.clear()
        return walk(folder, skipped)

    documents = gather(read)
    _say_skipped(folder, "files", skipped)
    if not documents:
        raise UserError(f"corpus {folder} is empty: no readable text file in it (hidden and git-ignored "
                        f"files are left out; {skipped.total()} skipped)")
    return _build(corpus_id or folder.resolve().name, documents, folder)


def _from_jsonl(where: Path, corpus_id: str | None) -> Corpus:
    chosen = _select(_outlines(where), corpus_id, where)
    places, repeated = {place for place, _ in chosen}, set()

    def read() -> Iterator[Document]:
        seen: set[str] = set()
        for place, row in _at(places, jsonl.rows(where)):
            text = _row_text(row, f"{where} {place}")
            if _is_new(text, seen, place, repeated):
                yield from _documents(text, f"{where.name}:{row.get('corpus_id', where.stem)}")

    documents = gather(read)
    _say_skipped(where, "rows", Counter(duplicate=len(repeated)))
    picked = corpus_id or str(chosen[0][1].get("corpus_id", where.stem))
    return _build(picked, documents, where, _questions_of(_at(places, jsonl.rows(where)), where))


def _from_table(table: Table, corpus_id: str | None) -> Corpus:
    where, places, picked = table.where, None, corpus_id or table.where.stem
    if "corpus_id" in table.columns:
        ids = list(_numbered(table, "corpus_id"))
        one_corpus = corpus_id is None and len({row.get("corpus_id") for _, row in ids}) == 1
        chosen = ids if one_corpus else _select(ids, corpus_id, where)
        places, picked = {place for place, _ in chosen}, corpus_id or str(chosen[0][1].get("corpus_id", picked))
    skipped: set[str] = set()
    repeated: set[str] = set()

    def read() -> Iterator[Document]:
        seen: set[str] = set()
        for place, row in _at(places, _numbered(table, table.text_column)):
            text = row.get(table.text_column, "")
            if isinstance(text, str) and not text.strip():
                skipped.add(place)
                continue
            text = _row_text({"text": text}, f"{where} {place}")
            if _is_new(text, seen, place, repeated):
                yield from _documents(text, f"{where.name}:{place.removeprefix('row ')}")

    documents = gather(read)
    _say_skipped(where, "rows", Counter({"without text": len(skipped), "duplicate": len(repeated)}))
    asked = _at(places, _numbered(table, "corpus_id", "questions"))
    return _build(picked, documents, where, _questions_of(asked, where))


def _is_new(text: str, seen: set[str], place: str, repeated: set[str]) -> bool:
    """Whether no row before, of those `seen` in this pass, has the same text; else `place` is among the `repeated`."""
    digest = hash_bytes(text.encode())
    if digest in seen:
        repeated.add(place)
        return False
    seen.add(digest)
    return True


def _say_skipped(where: Path, things: str, skipped: Counter) -> None:
    if skipped.total():
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()) if count)
        logger.warning("corpus %s: skipped %d %s (%s)", where, skipped.total(), things, counts)


def _numbered(table: Table, *columns: str) -> Iterator[Row]:
    return ((f"row {number}", row) for number, row in enumerate(table.rows(*columns), start=1))


def _outlines(where: Path) -> list[Row]:
    """The rows of a JSONL with the values of all fields but the id removed, to save memory."""
    return [(place, {key: value if key == "corpus_id" else None for key, value in row.items()})
            for place, row in jsonl.rows(where)]


def _at(places: set[str] | None, rows: Iterable[Row]) -> Iterator[Row]:
    """The `rows` at `places`; None selects all."""
    return (one for one in rows if places is None or one[0] in places)


def _documents(text: str, source: str) -> Iterator[Document]:
    """A row's text as one document, or as several if it is long."""
    if len(text) > LONGEST_CHARACTERS:
        return split([text], source)
    return iter([Document(hash_bytes(text.encode()), source, text)])


def _row_text(row: dict, place: str) -> str:
    _check_has_text(row, place)
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: \"text\" is empty or not a string")
    check_unicode(text, place)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_has_text(row: dict, place: str) -> None:
    if "text" not in row:
        fields = ", ".join(list(row)[:6]) or "none"
        raise UserError(f"{place} has no \"text\" (its fields: {fields}); a JSONL corpus has rows with "
                        "corpus_id and text")


def _select(rows: list[Row], corpus_id: str | None, where: Path) -> list[Row]:
    """The rows that `corpus_id` selects; without one, the only row. Raises `UserError` unless that is clear."""
    if corpus_id is None:
        if len(rows) > 1 and any("corpus_id" in row for _, row in rows):
            raise UserError(f"{where} holds {len(rows)} corpora; pick one with --corpus-id, or several "
                            f"by pattern: {_some_ids(rows)}")
        if len(rows) > 1:
            _check_has_text(rows[0][1], f"{where} {rows[0][0]}")
            raise UserError(f"{where}: its {len(rows)} rows have no corpus_id to pick by; add one a row")
        return rows
    named = [(line, row) for line, row in rows if "corpus_id" in row]
    if not named:
        raise UserError(f"{where} {rows[0][0]} has no \"corpus_id\" (its fields: "
                        f"{', '.join(list(rows[0][1])[:6])}); a JSONL corpus has rows with corpus_id and "
                        "text")
    chosen = _matching(named, corpus_id)
    if not chosen:
        raise UserError(f"{where} has no corpus id {corpus_id!r}; it has {_some_ids(named)}")
    return chosen


def _matching(rows: list[Row], corpus_id: str) -> list[Row]:
    """The rows with exactly this id, else those that match it as a pattern: an id may contain `*` or `[`."""
    ids = [(str(row["corpus_id"]), (line, row)) for line, row in rows if "corpus_id" in row]
    return ([item for name, item in ids if name == corpus_id]
            or [item for name, item in ids if fnmatch.fnmatchcase(name, corpus_id)])


def _some_ids(rows: list[Row]) -> str:
    ids = list(dict.fromkeys(str(row["corpus_id"]) for _, row in rows if "corpus_id" in row))
    return ", ".join(ids[:IDS_SHOWN]) + (f", ... ({len(ids)} in all)" if len(ids) > IDS_SHOWN else "")


def _questions_of(rows: Iterable[Row], where: Path) -> tuple[Question, ...]:
    parsed = []
    for line, row in rows:
        raw = row.get("questions", [])
        if not isinstance(raw, list):
            raise UserError(f"{where} {line}: \"questions\" must be a list")
        for index, item in enumerate(raw):
            default_id = f"{row.get('corpus_id', where.stem)}#{index}"
            parsed.append(_parse_question(item, f"{where} {line} question {index + 1}", default_id))
    return _unique(parsed, where)


def _unique(questions: list[Question], where: Path) -> tuple[Question, ...]:
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise UserError(f"{where}: question id {question.question_id!r} appears twice")
        seen.add(question.question_id)
    return tuple(questions)


def _parse_question(raw, place: str, default_id: str) -> Question:
    if not isinstance(raw, dict) or not _is_text(raw.get("question")):
        raise UserError(f"{place} has no \"question\" text")
    check_unicode(json.dumps(raw, ensure_ascii=False), place)
    question_id = str(raw.get("id", default_id))
    if "options" in raw:
        options, gold = raw["options"], raw.get("gold")
        if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
            raise UserError(f"{place}: \"options\" must list at least two texts")
        if type(gold) is not int or not 0 <= gold < len(options):
            raise UserError(f"{place}: \"gold\" must be the index of the right option, "
                            f"0 to {len(options) - 1}")
        return Question(question_id, raw["question"], (options[gold],), tuple(options), gold)
    answers = raw.get("answers")
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise UserError(f"{place} needs \"answers\" (a list of accepted texts), or \"options\" and "
                        "\"gold\"")
    return Question(question_id, raw["question"], tuple(answers))


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())
