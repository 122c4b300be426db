"""Documents in order, however much text they are.

A long text stands as several documents, so that what a pass holds at once is bounded; documents that together
are more than `HELD_CHARACTERS` are read again in every pass.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

from cartridges.errors import UserError
from cartridges.records import Document

logger = logging.getLogger(__name__)

LONGEST_CHARACTERS = 2**20
"""Of one document. A tokenizer takes some hundred bytes a token while it works."""
HELD_CHARACTERS = 2**26
"""That are kept in memory, of all documents of a corpus."""


def stretches(blocks: Iterable[str]) -> Iterator[str]:
    """The text of `blocks` in parts of at most `LONGEST_CHARACTERS`, cut behind the last paragraph that fits, else
    behind a line, a word, or anywhere; the last ones alike. Where blocks begin and end makes no difference."""
    rest, at = "", 0
    for block in blocks:
        rest, at = rest[at:] + block, 0
        while len(rest) - at > 2 * LONGEST_CHARACTERS:
            begun, at = at, _cut(rest, at, LONGEST_CHARACTERS)
            yield rest[begun:at]
    while at < len(rest):
        left = len(rest) - at
        begun, at = at, _cut(rest, at, -(-left // 2)) if left > LONGEST_CHARACTERS else len(rest)
        yield rest[begun:at]


def _cut(text: str, start: int, most: int) -> int:
    """Where a part of at most `most` characters, and more than half of them, ends best."""
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, start, start + most) + len(mark)
        if end > start + most // 2:
            return end
    return start + most


class Reread:
    """Documents that are not kept: every pass reads them anew. Raises `UserError` where they are others by then."""

    def __init__(self, read: Callable[[], Iterable[Document]], ids: tuple[str, ...]):
        self._read, self.ids = read, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Document]:
        expected = iter(self.ids)
        for document in distinct(self._read()):
            if next(expected, None) != document.document_id:
                raise _changed(f"at {document.source}")
            yield document
        if next(expected, None) is not None:
            raise _changed("at its end")


def _changed(where: str) -> UserError:
    return UserError(f"the corpus changed while it was read ({where}); leave it as it is and run again")


Documents = tuple[Document, ...] | Reread


def ids_of(documents: Documents) -> tuple[str, ...]:
    """Without a pass."""
    if isinstance(documents, Reread):
        return documents.ids
    return tuple(document.document_id for document in documents)


def gather(read: Callable[[], Iterable[Document]]) -> Documents:
    """The distinct documents that `read` gives: held, or where they are too much read again. One pass."""
    held: list[Document] = []
    ids: list[str] = []
    characters = 0
    for document in distinct(read()):
        ids.append(document.document_id)
        characters += len(document.text)
        if characters <= HELD_CHARACTERS:
            held.append(document)
        elif held:
            held.clear()
    if characters <= HELD_CHARACTERS:
        return tuple(held)
    logger.info("%d documents, %d characters: read again in every pass", len(ids), characters)
    return Reread(read, tuple(ids))


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """Those that have not come before, by id."""
    seen: set[str] = set()
    for document in documents:
        if document.document_id not in seen:
            seen.add(document.document_id)
            yield document
