"""A collection: several corpora in one place, each of which gets its own cartridge."""

import fnmatch
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridges.corpus import corpus_ids, load_corpus
from cartridges.errors import UserError
from cartridges.readers import ROW_SUFFIXES
from cartridges.registry import LONGEST_NAME
from cartridges.tables import is_table, open_table


@dataclass(frozen=True)
class Part:
    """One corpus of a collection, as `load_corpus(path, corpus_id)` reads it. Its id is unique in the collection; for
    a document of a folder it is the relative path."""

    path: str
    corpus_id: str


def parts(path: str, pattern: str | None = None) -> list[Part]:
    """The corpora at `path`: rows of a JSONL or a table by their `corpus_id`, or the documents of a folder by their
    relative paths. `pattern`, a shell pattern of ids or paths, selects some. Raises `UserError` if there are none.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UserError(f"corpus {path} does not exist")
    if is_table(where):
        found = [Part(path, name) for name in _ids_of_table(where)]
    elif where.is_dir():
        # A long file is split into several documents.
        sources = dict.fromkeys(document.source for document in load_corpus(path).documents)
        found = [Part(str(where / source), source) for source in sources]
    elif where.suffix.lower() in ROW_SUFFIXES:
        found = [Part(path, name) for name in dict.fromkeys(corpus_ids(path))]
    else:
        raise UserError(f"{path} is one document; --each wants a folder, or rows with corpus_id")
    if not found:
        raise UserError(f"{path} has no row with a corpus_id")
    if pattern is None:
        return found
    # An exact id is tried first, as for a single corpus, since an id may contain `*` or `[`.
    chosen = ([part for part in found if part.corpus_id == pattern]
              or [part for part in found if fnmatch.fnmatchcase(part.corpus_id, pattern)])
    if not chosen:
        raise UserError(f"{path} has no corpus {pattern!r}; it has {', '.join(part.corpus_id for part in found[:4])}"
                        + (f", ... ({len(found)} in all)" if len(found) > 4 else ""))
    return chosen


def _ids_of_table(where: Path) -> list[str]:
    table = open_table(where)
    if "corpus_id" not in table.columns:
        raise UserError(f"{where} has no column corpus_id, so all of it is one corpus; leave --each out")
    return list(dict.fromkeys(str(row["corpus_id"]) for row in table.rows("corpus_id")
                              if row.get("corpus_id") not in (None, "")))


def names(prefix: str, chosen: Sequence[Part]) -> list[str]:
    """`PREFIX.ID` of each, in the characters of a registry name: `kb.squad-geology`. A digest of the id is appended
    where that would be empty, too long or ambiguous."""
    slugs = [re.sub(r"[^a-z0-9]+", "-", part.corpus_id.lower()).strip("-") for part in chosen]
    plain = [f"{prefix}.{slug}" for slug in slugs]
    says = [bool(slug) and plain.count(name) == 1 and len(name) <= LONGEST_NAME
            for slug, name in zip(slugs, plain, strict=True)]
    return [name if enough else _with_digest(name, part.corpus_id)
            for name, enough, part in zip(plain, says, chosen, strict=True)]


def _with_digest(name: str, corpus_id: str) -> str:
    digest = hashlib.sha256(corpus_id.encode()).hexdigest()[:8]
    return f"{name[:LONGEST_NAME - len(digest) - 1].rstrip('-.')}-{digest}"
